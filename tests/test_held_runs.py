"""Holds over branches, crashes and replays: what one kept back is decided once; a cancelled run begins nothing."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from story import failed, logged, proposed, registered, scored, started

from sia_events.feedback_svc.service import feedback_svc
from sia_events.infra.memory import MemoryBlobs, MemoryBus, SystemTime
from sia_events.meta_svc.service import meta_svc
from sia_events.model_gateway.budget import Ledger
from sia_events.shared import service as module
from sia_events.shared.events import (
    AttemptRequested,
    Budget,
    BudgetChanged,
    BudgetExhausted,
    Event,
    ExecutionLogged,
    RunBranched,
    RunCancelled,
    RunPaused,
    RunResumed,
    RunSettings,
    RunStarted,
)
from sia_events.shared.oversight import active_minutes
from sia_events.shared.ports import BudgetSpent, Ports
from sia_events.shared.record import SCHEMA, Record, answers, opening, parse_record
from sia_events.shared.replay import replay
from sia_events.shared.run import fold
from sia_events.shared.service import Lineage, Service, Work, answer
from sia_events.target_runner.service import target_runner

DECIDING = (replace(feedback_svc, performs={}), replace(target_runner, performs={}))
NOUGHTS = "0" * 8


def ports(bus: MemoryBus) -> Ports:
    return Ports(bus, MemoryBlobs(), cast(Any, None), SystemTime(), cast(Any, None), cast(Any, None))


class Story:
    """A run on a bus in memory: facts are told, and the services decide on them as they come."""

    def __init__(self, bus: MemoryBus, run: str = "p") -> None:
        self.bus, self.run = bus, run

    async def told(self, *events: Event) -> None:
        for event in events:
            last = (await self.bus.history(self.run))[-1]
            await self.bus.append(self.run, answers(self.run, last, "cli", [event]))
            await self.decided()

    async def decided(self, services: Sequence[Service] = DECIDING) -> None:
        for service in services:
            seen = 0
            while seen < len(history := await self.bus.history(self.run)):
                record, seen = history[seen], seen + 1
                if record.run == self.run:
                    await answer(service, Lineage(), record, self.run, ports(self.bus))

    async def types(self, behind: int = 0) -> list[str]:
        return [record.type for record in (await self.bus.history(self.run))[behind:]]


async def begun(**settings: Any) -> Story:
    bus = MemoryBus()
    await bus.append("p", opening("p", [registered(), started(**settings)]))
    return Story(bus)


async def branched(story: Story, generation: int, settings: RunSettings) -> tuple[Story, int]:
    """A branch behind the last verdict so far, once its services have seen its opening."""
    history = await story.bus.history("p")
    at = max(r.position for r in history if r.type in ("VersionAccepted", "VersionRejected"))
    opened = RunBranched(parent="p", at=at, generation=generation, overrides={}, settings=settings, code="test")
    await story.bus.append("b", opening("b", [opened]))
    branch = Story(story.bus, "b")
    await branch.decided()
    return branch, at + 1


async def test_a_branch_decides_not_again_what_its_parents_hold_kept_back():
    story = await begun(candidates=1)
    await story.told(proposed("g0a"), RunPaused(reason="look"), scored("g0a", "dev", "1000"), RunResumed(reason="go"))
    assert (await story.types()).count("AttemptRequested") == 2
    await story.told(scored("g0a", "gate", "10000000"))
    branch, behind = await branched(story, 0, started().settings)
    assert await branch.types(behind) == ["FeedbackRequested"]


async def test_a_branch_under_other_settings_does_not_reopen_what_was_tried_again():
    story = await begun(candidates=1, generations=3)
    await story.told(proposed("g0a"), failed("g0a", "dev", "infrastructure"))
    await story.told(scored("g0a", "dev", "0000", attempt="g0a.dev~1"), scored("g0a", "gate", NOUGHTS))
    branch, behind = await branched(story, 0, started(attempt_tries=1).settings)
    assert await branch.types(behind) == ["FeedbackRequested"]


async def test_a_cancelled_run_that_was_broken_off_replays():
    story = await begun()
    started_at = (await story.bus.history("p"))[1]
    await story.bus.append("p", answers("p", started_at, "meta_svc", [proposed("g0a")]))
    last = (await story.bus.history("p"))[-1]
    await story.bus.append("p", answers("p", last, "cli", [RunCancelled(reason="enough")]))
    assert replay(await story.bus.history("p"), (meta_svc, *DECIDING)).divergence is None


@pytest.mark.parametrize("end", [RunCancelled(reason="enough"), BudgetChanged(budget=Budget(calls=9))])
async def test_a_writer_out_of_budget_waits_for_more_and_ends_with_its_run(end: Event, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "HELD_S", 0.001)
    story = await begun()
    tries: list[Record] = []

    async def write(work: Work, event: Event) -> Sequence[Event]:
        tries.append(work.cause)
        if isinstance(end, RunCancelled) or len(tries) == 1:
            raise BudgetSpent("nothing left")
        return [proposed("g0a")]

    writer = Service("writer", performs={RunStarted: write})
    cause = (await story.bus.history("p"))[1]
    work = asyncio.create_task(answer(writer, Lineage(), cause, "p", ports(story.bus)))
    await story.told(BudgetExhausted(limit="calls", allowed=1, spent=1), end)
    await asyncio.wait_for(work, 20)
    assert ("AgentProposed" in await story.types()) == (not isinstance(end, RunCancelled))


async def test_what_was_asked_for_before_a_hold_is_begun_when_the_run_goes_on(monkeypatch: pytest.MonkeyPatch):
    """What comes later and begins nothing is done meanwhile; the two are handed out in their order."""
    monkeypatch.setattr(module, "HELD_S", 0.001)
    story = await begun()
    done: asyncio.Queue[str] = asyncio.Queue()

    async def perform(work: Work, event: Event) -> Sequence[Event]:
        await done.put(work.cause.type)
        return []

    runner = Service("runner", performs={AttemptRequested: perform, ExecutionLogged: perform})
    await story.told(proposed("g0a"), RunPaused(reason="look"), logged("g0a", "dev"))
    served = asyncio.create_task(module.serve(runner, story.bus, ports(story.bus), "p", at_once=2))
    async with asyncio.timeout(20):
        assert await done.get() == "ExecutionLogged"
        assert (await story.types()).index("AttemptRequested") < (await story.types()).index("ExecutionLogged")
        await story.told(RunResumed(reason="go"))
        assert await done.get() == "AttemptRequested"
    served.cancel()
    await asyncio.gather(served, return_exceptions=True)


async def test_a_budget_that_was_raised_a_moment_ago_counts():
    story = await begun(budget=Budget(calls=1))
    ledger = Ledger(story.bus, SystemTime(), lambda model, usage: 0.0)
    await ledger.settle(await ledger.reserve("p", "m", 1, 1), {"prompt_tokens": 1, "completion_tokens": 1})
    await story.told(BudgetChanged(budget=Budget(calls=2)))
    assert await ledger.reserve("p", "m", 1, 1)
    assert fold(await story.bus.history("p")).status == "running"


async def test_minutes_stand_still_while_the_budget_is_used_up():
    story = await begun()
    await story.told(BudgetExhausted(limit="minutes", allowed=1, spent=1))
    assert active_minutes(await story.bus.history("p"), datetime(2100, 1, 1, tzinfo=UTC)) < 1


async def test_the_end_of_a_budget_uses_up_no_try():
    story = await begun(candidates=1, attempt_tries=2)
    await story.told(proposed("g0a"), failed("g0a", "dev", "budget"), failed("g0a", "dev", "budget", tries=1))
    await story.told(failed("g0a", "dev", "infrastructure", tries=2))
    assert "VersionRejected" not in await story.types()
    assert (await story.types())[-1] == "AttemptRequested"


async def test_a_threshold_of_nought_never_holds_a_run():
    story = await begun(candidates=1, pause_after_failures=0)
    await story.told(proposed("g0a"), failed("g0a", "dev", "budget"), failed("g0a", "dev", "crash", tries=1))
    assert "RunPaused" not in await story.types()


async def test_a_run_that_was_recorded_before_there_were_thresholds_has_none():
    story = await begun()
    (wire,) = [r.wire for r in await story.bus.history("p") if r.type == "RunStarted"]
    old = wire.replace(b'"schema":%d' % SCHEMA, b'"schema":1').replace(b'"pause_after_failures":10,', b"")
    event = parse_record(old).event
    assert isinstance(event, RunStarted) and event.settings.pause_after_failures == 0
