"""The engine's batches: who was answered together is waited for, and one that cannot be answered fails alone."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from time import sleep

import pytest
from tiny import VOCABULARY, make_model

from sia_events.local_model import engine as engine_module
from sia_events.local_model import network
from sia_events.local_model.engine import Engine
from sia_events.local_model.policy import ChoiceRequest, Chosen, Policy, Sampled, TextRequest

PROMPT = (1, 2, 9)
IMPOSSIBLE = (1, VOCABULARY, 9)


class Counting(Policy):
    """A policy that notes how many texts it is asked for at once."""

    def __init__(self, tiny: Path) -> None:
        super().__init__(network.load(tiny), 0)
        self.asked = list[int]()

    def generate(self, requests: Sequence[TextRequest]) -> list[Sampled]:
        self.asked.append(len(requests))
        return super().generate(requests)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return Engine(Policy(network.load(tiny), 0))


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


@dataclass
class Crowd:
    """An engine, and four texts that it has answered together."""

    policy: Counting
    engine: Engine

    @classmethod
    def of(cls, tiny: Path) -> "Crowd":
        made, waiting = cls(policy := Counting(tiny), Engine(policy)), Event()
        held = made.engine.call(lambda _: waiting.wait(60))
        replies = [made.engine.generate(text(PROMPT)) for _ in range(4)]
        waiting.set()
        assert held.result(60) and all(reply.result(60) for reply in replies) and policy.asked == [4]
        made.engine.call(lambda _: None).result(60)
        made.engine._took = 60  # the tiny model took no time worth waiting for
        return made

    def taken(self, prompt: tuple[int, ...]) -> "Future[Sampled]":
        """A text that the engine has taken from what is waiting."""
        reply = self.engine.generate(text(prompt))
        while not self.engine._jobs.empty():
            sleep(0.001)
        return reply


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "GATHER_S", 0)
    monkeypatch.setattr(engine_module, "RETURN_S", 60)
    monkeypatch.setattr(engine_module, "RETURNED_S", 60)


@pytest.mark.usefixtures("patient")
def test_texts_wait_for_as_many_as_were_answered_together(tiny: Path):
    crowd = Crowd.of(tiny)
    replies = [crowd.taken(PROMPT)] + [crowd.engine.generate(text(PROMPT)) for _ in range(3)]
    assert all(reply.result(60) for reply in replies) and crowd.policy.asked == [4, 4]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("bound", ["RETURN_S", "RETURNED_S"])
def test_they_wait_so_long_and_no_longer(tiny: Path, monkeypatch: pytest.MonkeyPatch, bound: str):
    crowd = Crowd.of(tiny)
    monkeypatch.setattr(engine_module, bound, 0)
    assert crowd.engine.generate(text(PROMPT)).result(30) and crowd.policy.asked == [4, 1]


@pytest.mark.usefixtures("patient")
def test_a_choice_waits_for_nobody_and_those_who_come_back_are_waited_for_behind_it(tiny: Path):
    crowd = Crowd.of(tiny)
    assert crowd.engine.choose(choice(PROMPT)).result(30)
    first = crowd.taken(PROMPT)
    assert crowd.engine.choose(choice(PROMPT)).result(30) and first.result(30) and crowd.policy.asked == [4, 1]
    replies = [crowd.taken(PROMPT)] + [crowd.engine.generate(text(PROMPT)) for _ in range(3)]
    assert all(reply.result(60) for reply in replies) and crowd.policy.asked == [4, 1, 4]
