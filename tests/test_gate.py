"""The gate's arithmetic: against closed forms, against scipy's own tests, and what must hold for any scores."""

import random
from math import comb, sqrt

import pytest
from given import recorded
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from story import OPENING, patched, registered, scored

from sia_events.feedback_svc.gate import compare, compare_on, hopeless, proven
from sia_events.shared.events import Comparison
from sia_events.shared.run import fold

marks = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=2, max_size=60)
scores = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=40)


def test_two_right_answers_more_and_none_less_have_the_closed_form():
    found = compare([0, 0, 1, 1], [1, 1, 1, 1])
    spread = sqrt((2 * 0.5**2 + 2 * 0.5**2) / 3 / 4)
    reach = 3.182446305284263 * spread  # Student's t, 3 degrees of freedom, 97.5 %
    assert (found.gain, found.better, found.worse, found.n) == (0.5, 2, 0, 4)
    assert found.low == pytest.approx(0.5 - reach) and found.high == pytest.approx(0.5 + reach)
    assert found.p_value == 2 * 0.5**2


@pytest.mark.parametrize(("better", "worse"), [(1, 0), (5, 0), (8, 2), (3, 3), (1, 9), (40, 22)])
def test_the_p_value_is_the_binomial_tail_counted_out(better: int, worse: int):
    found = compare([0.0] * better + [1.0] * worse + [1.0] * 5, [1.0] * better + [0.0] * worse + [1.0] * 5)
    n, few = better + worse, min(better, worse)
    tail = sum(comb(n, k) for k in range(few + 1)) / 2**n
    assert found.p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-5)


@settings(max_examples=60)
@given(marks)
def test_gain_interval_and_p_value_are_scipys(pairs: list[tuple[float, float]]):
    before, after = (list(column) for column in zip(*pairs, strict=True))
    found = compare(before, after)
    assert found.gain == pytest.approx(sum(after) / len(after) - sum(before) / len(before), abs=1e-8)
    differences = [b - a for a, b in pairs]
    if len(set(differences)) > 1:
        interval = stats.ttest_rel(after, before).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-8)
    else:
        assert found.low == found.high == found.gain
    if found.better + found.worse:
        exact = stats.binomtest(found.better, found.better + found.worse).pvalue
        assert found.p_value == pytest.approx(exact, rel=1e-5)
    else:
        assert found.p_value == 1.0


@settings(max_examples=60)
@given(scores)
def test_seen_from_the_other_side_the_comparison_is_its_mirror_image(pairs: list[tuple[float, float]]):
    before, after = (list(column) for column in zip(*pairs, strict=True))
    there, back = compare(before, after), compare(after, before)
    assert there.gain == pytest.approx(-back.gain, abs=2e-9) and there.low == pytest.approx(-back.high, abs=2e-9)
    assert (there.better, there.worse, there.p_value) == (back.worse, back.better, back.p_value)


@settings(max_examples=60)
@given(scores)
def test_no_comparison_is_both_proven_and_hopeless_and_a_proven_one_gains(pairs: list[tuple[float, float]]):
    found = compare(*(list(column) for column in zip(*pairs, strict=True)))
    assert not (proven(found, 0.05) and hopeless(found))
    assert not proven(found, 0.05) or found.gain > 0


def test_no_difference_proves_nothing_and_rules_nothing_out():
    found = compare([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (found.gain, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert not proven(found, 0.05) and not hopeless(found)


@pytest.mark.parametrize("gain", [0.25, 1.0, -1.0, 70.0, -70.0])
def test_one_item_is_never_enough(gain: float):
    found = compare([0.0], [gain])
    assert found.low <= 0 <= found.high and not proven(found, 0.49) and not hopeless(found)


def on_gate(maximize: bool, before: str, after: str) -> Comparison:
    past = (registered(maximize=maximize), *OPENING[1:], patched("g1a"))
    run = fold(recorded(*past, scored("g0a", "gate", before), scored("g1a", "gate", after)))
    assert compare_on(run, "dev", "g0a", "g1a") is None and compare_on(run, "gate", "g0a", "g9z") is None
    found = compare_on(run, "gate", "g0a", "g1a")
    assert found is not None
    return found


def test_two_versions_are_compared_on_a_split_that_both_were_scored_on_with_more_being_better():
    assert on_gate(True, "0011", "0111") == compare([0, 0, 1, 1], [0, 1, 1, 1])


def test_where_less_is_better_the_comparison_is_the_mirror_image():
    assert on_gate(False, "0111", "0011") == on_gate(True, "0011", "0111")
    assert on_gate(False, "0011", "0111").gain == -0.25


def test_a_large_gain_on_few_items_does_not_pass_where_the_exact_test_disagrees():
    found = compare([0.0] * 4, [1.0] * 4)
    assert found.low > 0 and found.p_value == 0.125 and not proven(found, 0.05)


def test_a_smaller_alpha_asks_for_more():
    found = compare([0.0] * 8 + [1.0] * 8, [1.0] * 16)
    assert proven(found, 0.05) and not proven(found, 0.05 / 10)


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], [1.0, 0.0])])
def test_scores_of_different_items_cannot_be_compared(before: list[float], after: list[float]):
    with pytest.raises(ValueError, match="same items"):
        compare(before, after)


def test_versions_that_are_no_better_pass_at_most_as_often_as_alpha_says():
    draw = random.Random(20260101)
    passed = 0
    for _ in range(1000):
        before = [float(draw.random() < 0.5) for _ in range(64)]
        after = [float(draw.random() < 0.5) for _ in range(64)]
        passed += proven(compare(before, after), 0.05)
    # One-sided by the sign of the gain: 2.5 % and less, the sign test being exact. 45 is three deviations above that.
    assert passed < 45
