"""A run in figures: what it cost, what each lever gave, and what chance would have scored."""

from pathlib import Path
from typing import Any

import pytest
from given import recorded
from story import (
    ACCEPTED,
    OPENING,
    accepted,
    asked,
    failed,
    feedback_asked,
    logged,
    patched,
    registered,
    started,
)

from sia_events.shared.events import (
    Comparison,
    Estimate,
    RunBranched,
    RunFinished,
    RunSettings,
    Sealed,
    VersionRejected,
)
from sia_events.shared.record import Draft, Record, derived_id, place
from sia_events.shared.summary import cost, whole
from sia_events.views.summaries import ending_text, summary_text


def spent(*events: Any) -> tuple[int, int]:
    found = cost(recorded(*events))
    return found["model_calls"], found["tokens"]


def test_every_attempts_calls_and_tokens_are_counted():
    assert spent(*OPENING) == (0, 0)
    assert spent(*ACCEPTED) == (16, 176)


def test_calls_that_two_tries_share_are_paid_and_counted_once():
    first = (asked("g0a", "dev"), logged("g0a", "dev"), failed("g0a", "dev", "infrastructure"))
    again = logged("g0a", "dev").model_copy(update={"attempt": "g0a.dev~1", "calls": 10, "prompt_tokens": 100})
    assert spent(*OPENING, *first, asked("g0a", "dev", tries=1), again) == (10, 108)


def test_an_attempt_that_failed_has_cost_what_it_has_cost():
    lost = failed("g0a", "dev").model_copy(update={"calls": 5, "prompt_tokens": 50, "completion_tokens": 1})
    assert spent(*OPENING, asked("g0a", "dev"), lost) == (5, 51)


def test_what_a_failed_try_had_asked_is_counted_once_with_the_try_that_had_it_recorded():
    first = failed("g0a", "dev", "infrastructure").model_copy(update={"calls": 5, "prompt_tokens": 50})
    again = logged("g0a", "dev").model_copy(update={"attempt": "g0a.dev~1"})
    assert spent(*OPENING, asked("g0a", "dev"), first, asked("g0a", "dev", tries=1), again) == (8, 88)


def test_an_attempt_whose_outputs_could_not_be_judged_costs_what_its_execution_said():
    refused = failed("g0a", "dev", "invalid_output")
    assert refused.calls == 0
    assert spent(*OPENING, asked("g0a", "dev"), logged("g0a", "dev"), refused) == (8, 88)


def test_a_branch_counts_what_it_shares_and_what_it_did_itself():
    parent = recorded(*ACCEPTED)
    opened = RunBranched(parent="r1", at=len(parent), generation=0, overrides={}, settings=RunSettings(), code="test")
    branch = list[Record]()
    for event in (opened, asked("g0a", "dev"), logged("g0a", "dev")):
        last = (branch or parent)[-1]
        name = derived_id("b1", last.id, "test", 0)
        draft = Draft(event, "test", last.id, parent[0].id, name)
        branch.append(place(draft, "b1", last.position + 1, last.chain, last.time))
    found = cost([*parent, *branch])
    assert (found["model_calls"], found["tokens"]) == (24, 264)


@pytest.mark.parametrize("floor", [0.125, None])
def test_chance_is_what_the_task_states(floor: float | None):
    assert whole(recorded(registered(floor=floor), started()))["chance"] == floor


@pytest.mark.parametrize(("floor", "shown"), [(0.125, True), (None, False)])
def test_people_are_shown_chance_beside_the_sealed_scores_where_the_task_states_it(floor: float | None, shown: bool):
    score = Estimate(value=0.5, low=0.4, high=0.6, n=8)
    gain = Comparison(gain=0, low=0, high=0, p_value=1, n=8, better=0, worse=0)
    end = RunFinished(
        outcome="no proven gain", best="g0a", sealed=Sealed(first=score, final=score, comparison=gain), reason="none"
    )
    summary = whole(recorded(registered(floor=floor), *ACCEPTED[1:], end))
    assert ("    chance  0.125   one answer for every item" in ending_text(summary, Path()).splitlines()) == shown
    assert ("chance 0.125" in summary_text(summary).splitlines()[0]) == shown


def test_a_run_without_a_task_yet_has_no_chance():
    assert whole([])["chance"] is None


def test_a_lever_gave_what_its_accepted_versions_gained_and_tried_the_refused_ones_too():
    gain = Comparison(gain=0.5, low=0.4, high=0.6, p_value=0.001, n=8, better=4, worse=0)
    yes = accepted("g1a", "g0a").model_copy(update={"comparison": gain})
    no = VersionRejected(version="g1b", over="g0a", comparison=gain, reason="not the best")
    summary = whole(recorded(*ACCEPTED, feedback_asked(1), patched("g1a"), patched("g1b"), yes, no))
    assert summary["levers"]["harness"] == {"tried": 2, "accepted": 1, "gain": 0.5}
    assert summary["levers"]["weights"] == {"tried": 0, "accepted": 0, "gain": 0}
    assert [v["accepted"] for v in summary["generations"]] == [True, True, False] and summary["best"] == "g1a"
