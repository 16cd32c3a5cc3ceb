"""People and limits hold a run: nothing is begun meanwhile, nothing is forgotten, and it goes on from where it was."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import SMALL, answered, assert_none_left, log, sia
from given import given, recorded
from story import ACCEPTED, FIRST, OPENING, SECOND, accepted, asked, failed, fed_back, feedback_asked, scored, started

from sia_events.feedback_svc.service import feedback_svc
from sia_events.shared.events import (
    ApprovalGiven,
    ApprovalRefused,
    ApprovalRequested,
    Budget,
    BudgetChanged,
    BudgetExhausted,
    Event,
    HarnessPatchRequested,
    ProposalFailed,
    RunCancelled,
    RunPaused,
    RunResumed,
    RunSteered,
    VersionAccepted,
)
from sia_events.shared.run import fold
from sia_events.target_runner.service import target_runner

PAUSED, RESUMED = RunPaused(reason="look"), RunResumed(reason="looked")
SPENT, MORE = BudgetExhausted(limit="calls", allowed=5, spent=5), BudgetChanged(budget=Budget(calls=9))


def state(*events: Event) -> Any:
    return fold(recorded(*events))


@pytest.mark.parametrize(("hold", "release"), [(PAUSED, RESUMED), (SPENT, MORE)])
def test_what_came_while_a_run_was_held_is_decided_when_it_goes_on(hold: Event, release: Event):
    dev = scored("g0a", "dev", "1000")
    given(feedback_svc, *FIRST[:-2], hold).when(dev).then()
    given(feedback_svc, *FIRST[:-2], hold, dev).when(release).then(asked("g0a", "gate"))
    given(feedback_svc, *FIRST[:-2], hold, dev, release).when(scored("g0a", "gate", "1000")).then_types(VersionAccepted)


def test_two_scores_that_came_while_a_run_was_held_close_their_round_once():
    held = (*SECOND, PAUSED, scored("g1a", "dev", "1100"), scored("g1b", "dev", "1110"))
    open_round = given(feedback_svc, *SECOND, scored("g1a", "dev", "1100")).when(scored("g1b", "dev", "1110")).decided
    assert given(feedback_svc, *held).when(RESUMED).decided == list(open_round)


def test_what_came_before_the_run_was_held_is_not_decided_again():
    dev = scored("g0a", "dev", "1000")
    given(feedback_svc, *FIRST[:-2], dev, asked("g0a", "gate"), PAUSED).when(RESUMED).then()


def test_a_run_held_for_two_reasons_goes_on_when_both_are_gone():
    held = (*FIRST[:-2], PAUSED, SPENT, scored("g0a", "dev", "1000"))
    given(feedback_svc, *held).when(RESUMED).then()
    given(feedback_svc, *held, RESUMED).when(MORE).then(asked("g0a", "gate"))


def test_an_attempt_that_met_the_end_of_the_budget_is_made_again_when_there_is_more():
    short = failed("g0a", "dev", "budget")
    past = (*OPENING, asked("g0a", "dev"), SPENT)
    given(target_runner, *past).when(short).then()
    given(target_runner, *past, short).when(MORE).then(asked("g0a", "dev", tries=1))
    given(feedback_svc, *past, short).when(MORE).then()


def test_a_budget_counts_against_no_candidate_however_often_it_ends():
    settings = started().settings.model_copy(update={"attempt_tries": 1, "pause_after_failures": 1})
    run = replace(state(*OPENING, asked("g0a", "dev"), failed("g0a", "dev", "budget")), settings=settings)
    assert run.failed("g0a", "dev") is None and run.failures_in_a_row == 0


def test_a_changed_budget_is_the_runs_own_from_then_on():
    run = state(*OPENING, SPENT, MORE)
    assert run.settings.budget.calls == 9 and run.status == "running"
    assert state(*OPENING, SPENT).status == "paused"


def test_a_cancelled_run_decides_nothing_more():
    given(feedback_svc, *FIRST[:-2], RunCancelled(reason="enough")).when(scored("g0a", "dev", "1000")).then()
    given(feedback_svc, *FIRST[:-2], RunCancelled(reason="enough"), scored("g0a", "dev", "1000")).when(RESUMED).then()
    assert state(*FIRST, RunCancelled(reason="enough")).status == "cancelled"


def approving(autonomy: str) -> tuple[Event, ...]:
    settings = started().settings.model_copy(update={"autonomy": autonomy})
    first = [started().model_copy(update={"settings": settings}) if e.type == "RunStarted" else e for e in ACCEPTED]
    return (*first, feedback_asked(1))


@pytest.mark.parametrize(
    ("autonomy", "lever", "asks"),
    [
        ("full", "harness", False),
        ("full", "weights", False),
        ("approve-weights", "harness", False),
        ("approve-weights", "weights", True),
        ("approve-each", "harness", True),
        ("approve-each", "weights", True),
    ],
)
def test_a_person_is_asked_where_the_autonomy_ends(autonomy: str, lever: Any, asks: bool):
    decided = given(feedback_svc, *approving(autonomy)).when(fed_back(1, lever)).decided
    assert [isinstance(event, ApprovalRequested) for event in decided] == [asks]


def waiting() -> tuple[Event, ...]:
    past = (*approving("approve-each"), fed_back(1, "harness"))
    return (*past, *given(feedback_svc, *past[:-1]).when(past[-1]).decided)


def test_what_a_person_approves_is_begun():
    assert state(*waiting()).status == "waiting"
    yes = ApprovalGiven(subject="g1", by="ada")
    given(feedback_svc, *waiting()).when(yes).then_types(HarnessPatchRequested)
    assert state(*waiting(), yes).status == "running"


def test_what_a_person_refuses_closes_the_generation():
    no = ApprovalRefused(subject="g1", by="ada", reason="too dear")
    (barren,) = given(feedback_svc, *waiting()).when(no).then_types(ProposalFailed)
    assert isinstance(barren, ProposalFailed) and barren.reason == "refused by ada: too dear"


def test_an_answer_to_something_else_or_a_second_answer_begins_nothing():
    given(feedback_svc, *waiting()).when(ApprovalGiven(subject="g7", by="ada")).then()
    yes = ApprovalGiven(subject="g1", by="ada")
    begun = given(feedback_svc, *waiting()).when(yes).decided
    given(feedback_svc, *waiting(), yes, *begun).when(yes).then()


def test_many_failures_in_a_row_hold_the_run():
    settings = started().settings.model_copy(update={"pause_after_failures": 2})
    opening = [e.model_copy(update={"settings": settings}) if e.type == "RunStarted" else e for e in SECOND]
    one = failed("g1a", "dev")
    assert RunPaused not in map(type, given(feedback_svc, *opening).when(one).decided)
    paused = given(feedback_svc, *opening, one).when(failed("g1b", "dev")).decided[0]
    assert isinstance(paused, RunPaused) and "2 attempts failed in a row" in paused.reason


@pytest.mark.parametrize("limit", [1, 2])
def test_failures_that_came_while_the_budget_was_out_hold_the_run_once(limit: int):
    settings = started().settings.model_copy(update={"pause_after_failures": limit})
    opening = [e.model_copy(update={"settings": settings}) if e.type == "RunStarted" else e for e in SECOND]
    first, last = failed("g1a", "dev"), failed("g1b", "dev").model_copy(update={"message": "the last one"})
    decided = given(feedback_svc, *opening, SPENT, first, last).when(MORE).decided
    (pause,) = [event for event in decided if isinstance(event, RunPaused)]
    assert pause is decided[0] and pause.reason == "2 attempts failed in a row, the last: the last one"


def test_a_pause_for_two_reasons_at_once_is_one_pause():
    settings = started().settings.model_copy(update={"pause_on_gain": 0.3, "pause_after_failures": 1})
    past = [e.model_copy(update={"settings": settings}) if e.type == "RunStarted" else e for e in SECOND]
    past = [*past, scored("g1a", "dev", "1100"), scored("g1b", "dev", "1000"), asked("g1a", "gate"), SPENT]
    past = [*past, scored("g1a", "gate", "1" * 8), failed("g1b", "dev")]
    decided = given(feedback_svc, *past).when(MORE).decided
    assert [event.type for event in decided].count("RunPaused") == 1


def test_a_gain_beyond_belief_is_accepted_into_a_held_run():
    verdict = accepted("g1a")
    settings = started().settings.model_copy(update={"pause_on_gain": 0.3})
    past = [e.model_copy(update={"settings": settings}) if e.type == "RunStarted" else e for e in SECOND]
    past = [*past, scored("g1a", "dev", "1100"), scored("g1b", "dev", "1000"), asked("g1a", "gate")]
    paused, verdict = given(feedback_svc, *past).when(scored("g1a", "gate", "1" * 8)).decided
    assert isinstance(paused, RunPaused) and "over 0.3" in paused.reason and isinstance(verdict, VersionAccepted)
    given(feedback_svc, *past, scored("g1a", "gate", "1" * 8), paused).when(verdict).then()


# ---- by the real command

RUN = ("--run", "r1", *SMALL)


def refused(home: Path, *words: object) -> str:
    done = sia(home, *words)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_a_run_waits_for_a_person_and_goes_on_as_told(
    tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    stopped = sia(tmp_path, "run", task, *RUN, "--autonomy", "approve-each", "--steer", "short words")
    assert stopped.returncode == 3, stopped.stderr
    assert "waits for approval of g1" in stopped.stderr and "sia approve r1" in stopped.stderr
    again = sia(tmp_path, "run", "--resume", "r1")
    assert again.returncode == 3 and "sia refuse r1" in again.stderr
    said = answered(tmp_path, "approve", "r1", "--by", "ada")
    assert (said["event"], said["status"]) == ("ApprovalGiven", "running")
    assert "waits for no approval" in refused(tmp_path, "approve", "r1")
    done = sia(tmp_path, "run", "--resume", "r1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    assert "finished" in refused(tmp_path, "pause", "r1")
    assert RunSteered(text="short words") in [record.event for record in log(tmp_path)]
    assert answered(tmp_path, "replay", "r1")["diverged"] == 0
    assert_none_left(children)


def test_a_used_up_budget_pauses_the_run_and_more_of_it_lets_it_go_on(
    tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    stopped = sia(tmp_path, "run", task, *RUN, "--budget-calls", "13")
    assert stopped.returncode == 3, stopped.stderr
    assert "budget of 13 calls is used up" in stopped.stderr and "sia budget r1 --calls MORE" in stopped.stderr
    assert "used up its budget" in refused(tmp_path, "resume", "r1")
    assert "name a limit" in refused(tmp_path, "budget", "r1")
    assert answered(tmp_path, "show", "r1")["cost"]["model_calls"] == 13
    answered(tmp_path, "budget", "r1", "--calls", "10000")
    done = sia(tmp_path, "run", "--resume", "r1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    assert answered(tmp_path, "replay", "r1")["diverged"] == 0
    assert_none_left(children)


def test_a_cancelled_run_is_over_and_says_so(tmp_path: Path, task: Path):
    assert sia(tmp_path, "run", task, *RUN, "--autonomy", "approve-each").returncode == 3
    assert answered(tmp_path, "pause", "r1", "--reason", "lunch")["status"] == "paused"
    assert "paused already: lunch" in refused(tmp_path, "pause", "r1")
    assert answered(tmp_path, "resume", "r1")["status"] == "waiting"
    assert answered(tmp_path, "cancel", "r1", "--reason", "enough")["status"] == "cancelled"
    ended = sia(tmp_path, "run", "--resume", "r1")
    assert ended.returncode == 1 and "cancelled: enough" in ended.stderr
