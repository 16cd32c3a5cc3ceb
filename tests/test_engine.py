"""The engine's batches: a request that cannot be answered is alone in it."""

from threading import Event

import pytest
from tiny import VOCABULARY, make_model

from sia_events.local_model import network
from sia_events.local_model.engine import Engine
from sia_events.local_model.policy import ChoiceRequest, Chosen, Policy, Sampled, TextRequest

PROMPT = (1, 2, 9)
IMPOSSIBLE = (1, VOCABULARY, 9)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(Policy(network.load(make_model(tmp_path_factory.mktemp("model") / "tiny")), 0))


def text(prompt: tuple[int, ...]) -> TextRequest:
    return TextRequest(None, prompt, 3, 0.0, 1.0, 0, lambda _: False)


def choice(prompt: tuple[int, ...]) -> ChoiceRequest:
    return ChoiceRequest(None, prompt, ((3,), (4,)), None, 0.0, 0)


def drawn(reply: Chosen | Sampled) -> int | tuple[int, ...]:
    return reply.index if isinstance(reply, Chosen) else reply.tokens


@pytest.mark.parametrize("kind", ["text", "choice"])
def test_only_the_request_that_cannot_be_answered_fails_of_its_batch(engine: Engine, kind: str):
    def ask(prompt: tuple[int, ...]):
        return engine.generate(text(prompt)) if kind == "text" else engine.choose(choice(prompt))

    alone = drawn(ask(PROMPT).result(60))
    waiting = Event()
    # While this is at work the requests gather, and become one batch.
    held = engine.call(lambda _: waiting.wait(60))
    replies = [ask(prompt) for prompt in (PROMPT, IMPOSSIBLE, PROMPT)]
    waiting.set()
    assert held.result(60)
    assert [drawn(replies[0].result(60)), drawn(replies[2].result(60))] == [alone, alone]
    with pytest.raises(IndexError):
        replies[1].result(60)
