"""A run ends once: whatever fails side by side on the sealed test, and whether it was held meanwhile."""

import pytest
from given import given, recorded
from story import SECOND, accepted, asked, failed, scored, started

from sia_events.feedback_svc.service import feedback_svc
from sia_events.shared.events import (
    AttemptFailed,
    Budget,
    BudgetChanged,
    BudgetExhausted,
    Event,
    RunFinished,
    RunPaused,
    RunResumed,
)
from sia_events.shared.run import fold

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
