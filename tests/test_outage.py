"""What is given up when a provider fails a request again, and what is not: the choice of a lever, and an adapter."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from story import D, registered, started
from test_backends_feedback import BACKENDS, Words, answered, feedback_asked, words
from test_trainer import SECRET, House, home, house
from tiny_served import MODEL
from writing import Scripted, said, serving, writing_room

from sia_events.infra.delivery import give_up
from sia_events.infra.memory import SystemTime
from sia_events.infra.models import LocalModels
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.door import gateway
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.ledger import Unlimited
from sia_events.model_gateway.token import TokenDoor
from sia_events.shared.events import (
    AgentProposed,
    FeedbackGiven,
    FeedbackRequested,
    Learning,
    ProposalFailed,
    Weights,
    WeightUpdateRequested,
)
from sia_events.shared.ports import Chat, ModelFailed, Ports, ProviderAway, Text
from sia_events.shared.record import opening
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.trainer.service import trainer

__all__ = ["home", "house", "words"]

FORBIDDEN = ModelFailed(403, "not with these words", "no_key")


async def stopped(ports: Ports, service: str, away: Exception) -> None:
    """A dead letter of what feedback was asked for."""
    (last,) = [record for record in await ports.bus.history("r1") if isinstance(record.event, FeedbackRequested)]
    await give_up(ports.bus, ports.blobs, service, last, last.wire, 1, away, 1)


def failing(fails: Callable[[Chat], bool]) -> Scripted:
    return Scripted(lambda call: FORBIDDEN if fails(call) else said("hello"))


async def test_the_lever_is_chosen_by_rule_where_the_request_for_a_choice_fails_again(tmp_path: Path, words: Words):
    models = failing(lambda call: "Say hello." not in call.messages[-1]["content"])
    async with writing_room(tmp_path, models, BACKENDS, blobs=words[1]) as ports:
        with pytest.raises(ProviderAway) as away:
            await answered(ports, words[0], feedback_asked(1))
        assert len(models.asked) == 1, "the first time nobody asks anything else"
        await stopped(ports, "feedback_svc", away.value)
        (given,) = await answered(ports, words[0], feedback_asked(1))
    assert isinstance(given, FeedbackGiven) and given.written is None
    assert (
        "given up, since its provider answers others" in given.reasons[-1]
        and "not with these words" in given.reasons[-1]
    )


async def test_a_dead_letter_of_another_kind_or_a_provider_that_answers_nothing_gives_nothing_up(
    tmp_path: Path, words: Words
):
    models = failing(lambda call: "Say hello." not in call.messages[-1]["content"])
    async with writing_room(tmp_path, models, BACKENDS, blobs=words[1]) as ports:
        with pytest.raises(ProviderAway):
            await answered(ports, words[0], feedback_asked(1))
        await stopped(ports, "feedback_svc", OSError("disk on fire"))
        with pytest.raises(ProviderAway) as away:
            await answered(ports, words[0], feedback_asked(1))
        await stopped(ports, "feedback_svc", away.value)
    silent = failing(lambda call: True)
    async with writing_room(tmp_path, silent, like=ports, backends=BACKENDS) as later:
        with pytest.raises(ProviderAway):
            await answered(later, words[0], feedback_asked(1))
    assert len(silent.asked) == 2, "the choice, and something plain"


@dataclass(frozen=True)
class Chatting:
    """The `Models` port of a server that chats, and fails whatever an adapter is probed by."""

    served: LocalModels

    def __getattr__(self, name: str) -> Any:
        return getattr(self.served, name)

    async def logprobs(self, text: Text) -> tuple[float, ...]:
        raise FORBIDDEN


@pytest.mark.slow  # tries that are waited for
async def test_an_update_whose_probe_fails_again_comes_to_nothing(house: House, home: Path, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        bus, blobs, door = house.ports.bus, house.ports.blobs, TokenDoor(tmp_path / "chatting", SECRET)
        models = LocalModels(blobs, tmp_path / "others", home / "s")
        stack.push_async_callback(models.aclose)
        journal = Journal(bus)
        stack.push_async_callback(journal.close)
        calls = Calls(journal, lambda _: Chatting(models), SystemTime(), Unlimited(), 20.0)
        await stack.enter_async_context(serving(gateway(calls, SECRET, SystemTime()), door.socket))
        ports = replace(house.ports, door=door)
        trajectory, rewards = await house.recorded(house.lines)
        parent = AgentProposed(version="g0a", candidate=0, harness=D, weights=Weights(model=MODEL), reason="first")
        learning = Learning(lr=2e-2, rank=4, batch_prompts=12)
        asked = WeightUpdateRequested(
            generation=1,
            parent="g0a",
            algorithm="reinforce",
            trajectory=trajectory,
            rewards=rewards,
            epochs=1,
            seed=0,
            learning=learning,
        )
        records = await bus.append("r7", opening("r7", [registered(), started(), parent, asked]))
        work = Work(fold(records), records[-1], ports)
        with pytest.raises(ProviderAway, match="did not answer the probe") as away:
            await trainer.performs[WeightUpdateRequested](work, asked)
        await give_up(bus, blobs, "trainer", records[-1], records[-1].wire, 1, away.value, 1)
        (told,) = await trainer.performs[WeightUpdateRequested](work, asked)
    assert isinstance(told, ProposalFailed) and told.lever == "weights"
    assert "given up, since what serves" in told.reason and "not with these words" in told.reason
