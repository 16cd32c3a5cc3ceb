from dataclasses import replace

import pytest

from sia_events.feedback_svc.proposer import Evidence, propose
from sia_events.feedback_svc.template import Spec, digest

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
