"""The threshold of spending: a run that costs more in a minute than it may is held; one that costs just that is not."""

from collections.abc import Sequence

import pytest
from given import given
from story import proposed, registered, started
from test_budget import MODEL, Watch, price, used
from test_held_runs import DECIDING

from sia_events.infra.memory import MemoryBus
from sia_events.meta_svc.service import meta_svc
from sia_events.model_gateway import budget
from sia_events.model_gateway.budget import Ledger
from sia_events.shared.events import AttemptRequested, RunPaused, RunResumed
from sia_events.shared.record import answers, opening
from sia_events.shared.replay import replay
from sia_events.shared.run import fold
from sia_events.target_runner.service import target_runner

DOLLAR = 1000  # tokens


async def books(pause_usd_per_minute: float | None) -> tuple[MemoryBus, Ledger]:
    bus = MemoryBus(clock=Watch())
    await bus.append("r", opening("r", [registered(), started(pause_usd_per_minute=pause_usd_per_minute)]))
    return bus, Ledger(bus, Watch(), price)


async def spend(ledger: Ledger, *tokens: int, model: str = MODEL) -> None:
    for each in tokens:
        await ledger.settle(await ledger.reserve("r", model, each, 0), used(each))


async def pauses(bus: MemoryBus) -> list[str]:
    return [r.event.reason for r in await bus.history("r") if isinstance(r.event, RunPaused)]


@pytest.mark.parametrize(
    ("tokens", "paused"),
    [
        ([2 * DOLLAR], 0),
        ([DOLLAR // 10] * 20, 0),
        ([2 * DOLLAR + 1], 1),
        ([DOLLAR // 10] * 20 + [1], 1),
        ([5 * DOLLAR], 1),
    ],
    ids=["just that", "just that in twenty calls", "a thousandth more", "one call more", "one dear call"],
)
async def test_a_run_is_held_when_its_last_minute_cost_more_than_it_may(tokens: Sequence[int], paused: int):
    bus, ledger = await books(2.0)
    await spend(ledger, *tokens)
    assert len(told := await pauses(bus)) == paused and fold(await bus.history("r")).held == bool(paused)
    assert all("US dollars in 60 s of model calls: over 2 a minute" in reason for reason in told)


async def test_what_was_spent_longer_ago_does_not_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "RATE_S", 0.0)
    bus, ledger = await books(2.0)
    await spend(ledger, *[2 * DOLLAR] * 5)
    assert not await pauses(bus)
    await spend(ledger, 2 * DOLLAR + 1)
    assert len(await pauses(bus)) == 1


async def test_a_run_that_goes_on_is_measured_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "LOOK_S", -1.0)
    bus, ledger = await books(2.0)
    await spend(ledger, 3 * DOLLAR)
    await bus.append("r", answers("r", (await bus.history("r"))[-1], "cli", [RunResumed(reason="go on")]))
    await spend(ledger, 2 * DOLLAR)
    assert len(await pauses(bus)) == 1
    await spend(ledger, 1)
    assert len(await pauses(bus)) == 2 and fold(await bus.history("r")).held


async def test_calls_without_a_price_or_without_a_threshold_hold_nothing():
    for rate, model in ((2.0, "openai/unknown"), (None, MODEL)):
        bus, ledger = await books(rate)
        await spend(ledger, 100 * DOLLAR, model=model)
        assert not await pauses(bus)


async def test_calls_without_a_reply_cost_nothing():
    bus, ledger = await books(2.0)
    await ledger.settle(await ledger.reserve("r", MODEL, 100 * DOLLAR, 0), None)
    assert not await pauses(bus)


async def test_held_so_the_run_replays_and_begins_nothing_until_it_goes_on():
    bus, ledger = await books(2.0)
    await bus.append("r", answers("r", (await bus.history("r"))[-1], "meta_svc", [proposed("g0a")]))
    await spend(ledger, 3 * DOLLAR)
    history = await bus.history("r")
    assert history[-1].type == "RunPaused" and history[-1].producer == "model_gateway"
    assert replay(history, (meta_svc, *DECIDING)).divergence is None
    (reason,) = await pauses(bus)
    hold = RunPaused(reason=reason)
    given(target_runner, registered(), started(), hold).when(proposed("g0a")).then()
    (asked,) = (
        given(target_runner, registered(), started(), hold, proposed("g0a"))
        .when(RunResumed(reason="go on"))
        .then_types(AttemptRequested)
    )
    assert isinstance(asked, AttemptRequested) and asked.version == "g0a"
