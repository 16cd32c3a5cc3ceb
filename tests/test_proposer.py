"""The built-in proposer: what it offers first for which symptoms, and never twice; either way a metric may go."""

from dataclasses import replace
from pathlib import Path

import pytest
from given import recorded
from story import accepted, feedback_asked, patched, proposed, scored, started

from sia_events.feedback_svc.proposer import Evidence, propose
from sia_events.feedback_svc.service import feedback_svc
from sia_events.feedback_svc.template import Spec, digest, naive_spec, render
from sia_events.infra.memory import MemoryBlobs, MemoryBus
from sia_events.shared.events import HarnessPatched, HarnessPatchRequested, VersionRejected
from sia_events.shared.ports import Ports
from sia_events.shared.registration import register
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.task import find_task
from sia_events.shared.tree import store_tree

NAIVE = Spec(
    instruction="Is it hot, warm or cold?",
    item="Place",
    label_words={label: label for label in ("hot", "warm", "cold")},
)
LOST = Evidence(invalid=0.4, skew=0.7, score=0.2, n=128)


def test_for_an_agent_whose_answers_are_no_labels_it_proposes_scoring_without_bias_examples_and_one_small_change():
    proposals = propose(NAIVE, LOST, tried=[], k=3, seed=0)
    scoring = [p for p in proposals if p.edits == ("score_labels", "remove_bias")]
    assert len(scoring) == 1
    assert scoring[0].spec.answer == "choose" and scoring[0].spec.calibrate > 0
    assert any(p.spec.examples for p in proposals)
    assert any(len(p.edits) == 1 and p.expected_cost <= 1.0 for p in proposals)


def test_the_most_promising_proposal_stands_first():
    first, *rest = propose(NAIVE, LOST, tried=[], k=3, seed=0)
    assert all(first.expected_gain > other.expected_gain for other in rest)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_proposals_differ_from_each_other_and_from_the_incumbent(k: int):
    marks = [digest(p.spec) for p in propose(NAIVE, LOST, tried=[], k=k, seed=0)]
    assert len({digest(NAIVE), *marks}) == k + 1


def test_the_same_arguments_give_the_same_proposals():
    assert propose(NAIVE, LOST, [], 5, seed=7) == propose(NAIVE, LOST, [], 5, seed=7)


def test_it_never_proposes_a_tried_spec_and_ends_when_nothing_is_left():
    tried: set[str] = set()
    rounds = 0
    while proposals := propose(NAIVE, LOST, tried, k=20, seed=rounds):
        marks = {digest(p.spec) for p in proposals}
        assert not marks & tried
        tried |= marks
        rounds += 1
    assert rounds > 1


def test_a_skewed_incumbent_that_scores_labels_gets_its_bias_removed_first():
    scored = replace(NAIVE, answer="choose", prefill="Answer:")
    first, *_ = propose(scored, Evidence(invalid=0.0, skew=0.9, score=0.3, n=128), [], 3, seed=0)
    assert "remove_bias" in first.edits


def test_slow_prompts_of_nearest_examples_come_after_fixed_ones():
    order = [p.edits for p in propose(NAIVE, LOST, [], 60, seed=0)]
    few_shot = next(place for place, edits in enumerate(order) if "few_shot" in edits)
    nearest = next(place for place, edits in enumerate(order) if "nearest_examples" in edits)
    assert few_shot < nearest


def test_an_edit_that_lost_before_is_expected_to_gain_less():
    single = {p.edits: p.expected_gain for p in propose(NAIVE, LOST, [], 200, seed=0)}
    after = replace(LOST, gains={"few_shot": -0.1})
    assert {p.edits: p.expected_gain for p in propose(NAIVE, after, [], 200, seed=0)}[("few_shot",)] < single[
        ("few_shot",)
    ]


def test_an_error_to_be_small_is_read_as_the_share_of_right_answers_that_it_leaves():
    right = replace(LOST, gains={"few_shot": 0.1, "vote": -0.2})
    wrong = replace(right, score=1 - right.score, maximize=False)
    assert propose(NAIVE, wrong, [], 60, seed=0) == propose(NAIVE, right, [], 60, seed=0)


def test_the_nearer_to_the_best_score_the_less_is_expected():
    def expected(score: float, maximize: bool) -> float:
        return propose(NAIVE, replace(LOST, score=score, maximize=maximize), [], 1, seed=0)[0].expected_gain

    assert expected(0.9, True) < expected(0.5, True) and expected(0.1, False) < expected(0.5, False)
    assert expected(1.0, True) > 0 and expected(0.0, False) > 0


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("score", [-40.0, 3.0, 250.0])
def test_the_order_does_not_depend_on_the_metrics_unit(score: float, maximize: bool):
    found = propose(NAIVE, replace(LOST, score=score, maximize=maximize), [], 60, seed=0)
    assert [p.edits for p in found] == [p.edits for p in propose(NAIVE, LOST, [], 60, seed=0)]
    assert all(p.expected_gain > 0 for p in found)


@pytest.mark.parametrize("maximize", [True, False])
def test_an_edit_that_gained_more_than_was_thought_possible_stands_first(maximize: bool):
    seen = Evidence(invalid=0.4, skew=0.7, score=0.5, n=128, maximize=maximize, gains={"open_answer": 90.0})
    first, *others = propose(NAIVE, seen, [], 200, seed=0)
    assert "open_answer" in first.edits and 0 < first.expected_gain <= 0.5
    assert all(0 <= p.expected_gain <= 0.5 for p in others)


async def proposed_behind(maximize: bool) -> tuple[str, ...]:
    """The edits that stand first where an opened answer took the score from 0 to 1 and was refused."""
    blobs = MemoryBlobs()
    task = find_task("words")
    told = (await register(task, blobs, MemoryBlobs(), 8)).model_copy(update={"maximize": maximize})
    plain = await store_tree(blobs, render(naive_spec(task), task))
    other = await store_tree(blobs, render(replace(naive_spec(task), votes=3), task))
    asked = HarnessPatchRequested(generation=2, parent="g0a", candidates=1, seed=0)
    history = recorded(
        told,
        started(generations=3),
        proposed().model_copy(update={"harness": plain}),
        scored("g0a", "dev", "0" * 20),
        accepted("g0a"),
        feedback_asked(1),
        patched("g1a", harness=other, edits=("open_answer",)),
        scored("g1a", "dev", "1" * 20),
        VersionRejected(version="g1a", over="g0a", comparison=None, reason="not on the gate"),
        feedback_asked(2),
        asked,
    )
    ports = Ports(MemoryBus(blobs), blobs, None, None, None, Path())  # type: ignore[arg-type]
    (made,) = await feedback_svc.performs[HarnessPatchRequested](Work(fold(history), history[-1], ports), asked)
    assert isinstance(made, HarnessPatched)
    return made.edits


async def test_what_was_tried_before_is_judged_by_the_tasks_direction():
    assert "open_answer" in await proposed_behind(maximize=True)
    assert "open_answer" not in await proposed_behind(maximize=False)


def test_symptoms_seen_on_few_items_count_less():
    def expected(n: int) -> float:
        proposals = propose(NAIVE, replace(LOST, n=n), [], 200, seed=0)
        return next(p.expected_gain for p in proposals if p.edits == ("score_labels",))

    assert expected(4) < expected(400)


def test_expected_costs_are_in_the_unit_of_the_evidence():
    cheap, dear = (propose(NAIVE, replace(LOST, cost=cost), [], 1, seed=0)[0] for cost in (1.0, 30.0))
    assert dear.expected_cost == pytest.approx(30 * cheap.expected_cost)


def test_plainer_words_are_shown_in_the_question_as_well():
    proposals = propose(replace(NAIVE, plain_words={"cold": "freezing"}), LOST, [], 200, seed=0)
    spec = next(p.spec for p in proposals if p.edits == ("plain_words",))
    assert spec.label_words["cold"] == "freezing"
    assert spec.instruction == "Is it hot, warm or freezing?"


def test_reading_edits_are_not_proposed_where_nothing_is_read():
    scored = replace(NAIVE, answer="choose", prefill="Answer:")
    names = {name for p in propose(scored, LOST, [], 200, seed=0) for name in p.edits}
    assert names.isdisjoint({"read_first_word", "read_last_label", "ask_again", "vote", "write_longer"})
