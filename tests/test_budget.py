"""The run's budget: no call passes a limit, however many ask at once, and what is refused stands in the run."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bus_on import note, opened

from sia_events.infra.memory import MemoryBus
from sia_events.model_gateway import budget
from sia_events.model_gateway.budget import Ledger, OverBudget
from sia_events.shared.calls import ModelCall, encode_call
from sia_events.shared.events import (
    Budget,
    BudgetChanged,
    BudgetExhausted,
    RunPaused,
    RunResumed,
    RunSettings,
    RunStarted,
)
from sia_events.shared.oversight import active_minutes
from sia_events.shared.ports import Envelope, ModelFailed
from sia_events.shared.record import answers, opening

MODEL = "openai/priced"


class Watch:
    """A clock that stands until it is turned."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self.time


def price(model: str, usage: Mapping[str, Any]) -> float | None:
    """One dollar a thousand tokens, of one model."""
    return (usage["prompt_tokens"] + usage["completion_tokens"]) / 1000 if model == MODEL else None


async def books(limits: Budget, clock: Watch | None = None) -> tuple[MemoryBus, Ledger]:
    bus = MemoryBus(clock=clock or Watch())
    await bus.append("r", opening("r", [RunStarted(settings=RunSettings(budget=limits), code="test")]))
    return bus, Ledger(bus, clock or Watch(), price)


def used(tokens: int) -> Mapping[str, int]:
    return {"prompt_tokens": tokens // 2, "completion_tokens": tokens - tokens // 2}


async def exhausted(bus: MemoryBus) -> list[BudgetExhausted]:
    return [r.event for r in await bus.history("r") if isinstance(r.event, BudgetExhausted)]


@pytest.mark.parametrize("limits", [Budget(calls=50), Budget(tokens=5000), Budget(usd=5.0)])
async def test_two_hundred_calls_at_once_never_pass_the_limit(limits: Budget):
    bus, ledger = await books(limits)
    made = 0

    async def call() -> bool:
        nonlocal made
        try:
            room = await ledger.reserve("r", MODEL, 50, 50)
        except OverBudget:
            return False
        made += 1
        await asyncio.sleep(0)
        await ledger.settle(room, used(100))
        return True

    answered = await asyncio.gather(*(call() for _ in range(200)))
    assert sum(answered) == made == 50
    (told,) = await exhausted(bus)
    assert told.spent == told.allowed


async def test_room_that_was_held_and_not_used_is_there_for_those_who_wait():
    _, ledger = await books(Budget(tokens=1100))
    rooms = [await ledger.reserve("r", MODEL, 250, 250) for _ in range(2)]
    third = asyncio.create_task(ledger.reserve("r", MODEL, 250, 250))
    await asyncio.sleep(0)
    assert not third.done()
    await ledger.settle(rooms[0], used(10))
    assert (await third).worst.tokens == 500


async def test_a_call_without_a_reply_gives_all_its_room_back():
    _, ledger = await books(Budget(calls=1))
    assert await ledger.settle(await ledger.reserve("r", MODEL, 1, 1), None) == 0.0
    assert await ledger.settle(await ledger.reserve("r", MODEL, 1, 1), used(2)) == 0.002
    with pytest.raises(OverBudget, match=r"budget of 1 calls.*not made.*sia budget RUN --calls"):
        await ledger.reserve("r", MODEL, 1, 1)


async def test_what_was_spent_before_a_restart_is_still_spent():
    bus, _ = await books(Budget(tokens=100))
    told: dict[str, Any] = {"attempt": "g0a.dev", "version": "g0a", "kind": "chat", "model": MODEL, "request": {}}
    calls = [
        ModelCall(call="1", digest="a", n=0, seed=0, reply={}, prompt_tokens=40, completion_tokens=40, **told),
        ModelCall(call="2", digest="b", n=0, seed=0, error="gone", prompt_tokens=0, **told),
    ]
    for key, call in zip(("g0a.dev", "meta.g0a"), calls, strict=True):
        await bus.trace(Envelope("r", "model_call", key, (encode_call(call),)))
    ledger = Ledger(bus, Watch(), price)
    with pytest.raises(OverBudget, match="80 spent"):
        await ledger.reserve("r", MODEL, 10, 20)
    assert await ledger.reserve("r", MODEL, 10, 10)


async def test_more_budget_lets_calls_through_again_and_its_end_is_told_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "LOOK_S", -1.0)
    bus, ledger = await books(Budget(calls=1))
    await ledger.settle(await ledger.reserve("r", MODEL, 1, 1), used(2))
    for _ in range(2):
        with pytest.raises(OverBudget):
            await ledger.reserve("r", MODEL, 1, 1)
    last = (await bus.history("r"))[-1]
    await bus.append("r", answers("r", last, "cli", [BudgetChanged(budget=Budget(calls=2))]))
    await ledger.settle(await ledger.reserve("r", MODEL, 1, 1), used(2))
    with pytest.raises(OverBudget):
        await ledger.reserve("r", MODEL, 1, 1)
    assert [(e.limit, e.allowed) for e in await exhausted(bus)] == [("calls", 1), ("calls", 2)]


async def test_minutes_end_a_run_that_waits_for_nothing():
    clock = Watch()
    _, ledger = await books(Budget(minutes=10), clock)
    assert await ledger.reserve("r", MODEL, 1, 1)
    clock.time += timedelta(minutes=10)
    with pytest.raises(OverBudget, match="10 minutes"):
        await ledger.reserve("r", MODEL, 1, 1)


async def test_a_limit_in_dollars_refuses_a_model_without_a_price_before_it_is_called():
    bus, ledger = await books(Budget(usd=1))
    with pytest.raises(ModelFailed, match=r"no price: nothing was called.*prices"):
        await ledger.reserve("r", "openai/unknown", 1, 1)
    assert not await exhausted(bus)
    _, free = await books(Budget())
    assert await free.settle(await free.reserve("r", "openai/unknown", 1, 1), used(2)) is None


async def test_time_in_which_a_person_had_paused_the_run_is_not_counted():
    clock = Watch()
    bus = MemoryBus(clock=clock)
    await opened(bus, "r", note("begin"))
    for event, minutes in ((RunPaused(reason=""), 3), (RunResumed(reason=""), 60), (RunPaused(reason=""), 4)):
        clock.time += timedelta(minutes=minutes)
        await bus.append("r", answers("r", (await bus.history("r"))[-1], "cli", [event]))
    assert active_minutes(await bus.history("r"), clock.time + timedelta(days=1)) == 7
