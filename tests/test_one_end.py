"""A run ends once: whatever fails side by side on the sealed test, and whether it was held meanwhile."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from given import given, recorded
from story import SECOND, accepted, asked, failed, fed_back, logged, patched, proposed, registered, scored, started
from test_held_runs import ports

from sia_events.evaluator.service import evaluator
from sia_events.feedback_svc.service import feedback_svc
from sia_events.infra.memory import MemoryBus
from sia_events.meta_svc.service import meta_svc
from sia_events.shared.events import (
    AttemptFailed,
    AttemptRequested,
    Budget,
    BudgetChanged,
    BudgetExhausted,
    Event,
    ExecutionLogged,
    FeedbackRequested,
    HarnessPatchRequested,
    RunFinished,
    RunPaused,
    RunResumed,
    RunStarted,
)
from sia_events.shared.record import Record, answers, opening
from sia_events.shared.replay import replay
from sia_events.shared.run import fold
from sia_events.shared.service import Lineage, Perform, Service, Work, answer
from sia_events.target_runner.service import target_runner

SEALED = (
    *SECOND,
    scored("g1a", "dev", "1111"),
    scored("g1b", "dev", "0000"),
    scored("g1a", "gate", "11111111"),
    accepted("g1a", "g0a"),
    asked("g0a", "test"),
    asked("g1a", "test"),
)
FIRST, SECOND_FAILURE = failed("g0a", "test"), failed("g1a", "test")
HOLDS: list[tuple[Event, Event]] = [
    (RunPaused(reason="look"), RunResumed(reason="looked")),
    (BudgetExhausted(limit="calls", allowed=5, spent=5), BudgetChanged(budget=Budget(calls=9))),
]


def ends(*decided: Event) -> list[str]:
    return [event.reason for event in decided if isinstance(event, RunFinished)]


def test_of_two_sealed_attempts_that_fail_at_the_same_time_the_first_ends_the_run():
    first = given(feedback_svc, *SEALED).when(FIRST).decided
    # Decided on before the end that the first one brings is on record.
    second = given(feedback_svc, *SEALED, FIRST).when(SECOND_FAILURE).decided
    assert ends(*first, *second) == ["the sealed test of g0a failed: boom"]


@pytest.mark.parametrize(("hold", "release"), HOLDS)
def test_two_sealed_attempts_that_failed_while_the_run_was_held_end_it_once(hold: Event, release: Event):
    decided = given(feedback_svc, *SEALED, hold, FIRST, SECOND_FAILURE).when(release).decided
    assert ends(*decided) == ["the sealed test of g0a failed: boom"]


@pytest.mark.parametrize(("hold", "release"), HOLDS)
def test_a_sealed_attempt_that_failed_before_the_hold_is_not_ended_by_another_behind_it(hold: Event, release: Event):
    assert not ends(*given(feedback_svc, *SEALED, FIRST, hold, SECOND_FAILURE).when(release).decided)


def test_a_try_that_is_made_again_is_no_end():
    infrastructure = failed("g0a", "test", "infrastructure")
    assert not ends(*given(feedback_svc, *SEALED).when(infrastructure).decided)
    last: AttemptFailed = failed("g1a", "test")
    assert ends(*given(feedback_svc, *SEALED, infrastructure).when(last).decided) == [
        "the sealed test of g1a failed: boom"
    ]


def test_the_story_that_is_told_here_is_one_that_a_run_lives_through():
    run = fold(recorded(*SEALED))
    assert run.incumbent == "g1a" and run.first == "g0a" and not run.held and started().settings.generations == 2


# ---- runs of earlier releases, which told an end for each sealed attempt that failed


def says(*events: Event) -> Perform:
    async def perform(work: Work, event: Event) -> Sequence[Event]:
        return events

    return perform


async def attempted(work: Work, asked: AttemptRequested) -> Sequence[Event]:
    if asked.split == "test":
        return [failed(asked.version, "test")]
    return [logged(asked.version, asked.split)]


async def judged(work: Work, ran: ExecutionLogged) -> Sequence[Event]:
    right = "1" if ran.version == "g1a" else "0"
    return [scored(ran.version, ran.split, right * {"dev": 4, "gate": 8}[ran.split])]


SERVICES = (
    replace(meta_svc, performs={RunStarted: says(proposed())}),
    replace(target_runner, performs={AttemptRequested: attempted}),
    replace(evaluator, performs={ExecutionLogged: judged}),
    replace(
        feedback_svc,
        performs={FeedbackRequested: says(fed_back(1)), HarnessPatchRequested: says(patched("g1a"))},
    ),
)


async def ended_once() -> MemoryBus:
    """A run through one generation, both of whose sealed attempts fail, decided by today's services."""
    bus = MemoryBus()
    await bus.append("r1", opening("r1", [registered(), started(generations=1, candidates=1)]))
    seen = 0
    while seen < len(history := await bus.history("r1")):
        for service in SERVICES:
            await answered(service, bus, history[seen])
        seen += 1
    return bus


async def answered(service: Service, bus: MemoryBus, record: Record) -> None:
    if type(record.event) in {*service.decides, *service.performs}:
        await answer(service, Lineage(), record, "r1", ports(bus))


async def replayed_with(bus: MemoryBus, cause: Record, end: RunFinished) -> Sequence[Record]:
    await bus.append("r1", answers("r1", cause, "feedback_svc", [end]))
    return await bus.history("r1")


async def test_the_second_end_of_an_earlier_releases_run_is_accounted_for_and_changes_nothing():
    bus = await ended_once()
    records = await bus.history("r1")
    (end,) = [record.event for record in records if isinstance(record.event, RunFinished)]
    _, second = [record for record in records if isinstance(record.event, AttemptFailed)]
    assert replay(records, SERVICES).divergence is None and end.reason == "the sealed test of g0a failed: boom"
    again = end.model_copy(update={"reason": "the sealed test of g1a failed: boom"})
    records = await replayed_with(bus, second, again)
    found = replay(records, SERVICES)
    assert found.divergence is None and found.pending == 0
    assert fold(records).finished == end, "the first end is the end"


@pytest.mark.parametrize("other", [{"outcome": "improved"}, {"best": "g0a"}])
async def test_a_second_end_that_says_something_else_than_the_first_is_found(other: dict[str, str]):
    bus = await ended_once()
    records = await bus.history("r1")
    (end,) = [record.event for record in records if isinstance(record.event, RunFinished)]
    _, second = [record for record in records if isinstance(record.event, AttemptFailed)]
    records = await replayed_with(bus, second, end.model_copy(update=other))
    found = replay(records, SERVICES).divergence
    assert found is not None and found.cause == second and found.reason == "no longer decided"


async def test_a_second_end_that_no_failure_gave_rise_to_is_found():
    bus = await ended_once()
    records = await bus.history("r1")
    (end,) = [record.event for record in records if isinstance(record.event, RunFinished)]
    (stranger,) = [record for record in records if isinstance(record.event, RunStarted)]
    records = await replayed_with(bus, stranger, end)
    assert replay(records, SERVICES).divergence is not None
