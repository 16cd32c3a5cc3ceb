"""Grades over all items asked, whatever the agent wrote; and the interval of their mean, against closed forms."""

import json
from collections.abc import Mapping
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sia_events.evaluator.estimate import estimate
from sia_events.evaluator.grade import Grades, OutputRefused, grade_labels, read_results

RIGHT = {"a": "hot", "b": "cold", "c": "hot", "d": "cold"}
LABELS = ("hot", "cold", "mild")


def graded(*answers: Mapping[str, object]) -> Grades:
    return grade_labels({"answers.jsonl": b"\n".join(json.dumps(a).encode() for a in answers)}, RIGHT, LABELS)


def answer(item: str, label: object) -> dict[str, object]:
    return {"id": item, "answer": label}


def test_every_item_counts_in_the_order_of_the_split_and_each_failure_has_its_class():
    grades = graded(answer("d", "hot"), answer("c", "lukewarm"), answer("a", "hot"))
    assert grades.items == (1.0, 0.0, 0.0, 0.0)
    assert grades.failures == {"invalid": 1, "unanswered": 1, "wrong": 1}


def test_an_empty_file_is_all_items_unanswered():
    assert graded() == Grades((0.0,) * 4, {"unanswered": 4}, 0.0)


def test_an_answer_of_null_is_no_answer_and_an_empty_one_is_an_invalid_answer():
    assert graded(answer("a", None), answer("b", "")).failures == {"invalid": 1, "unanswered": 3}


def test_labels_are_compared_to_the_letter():
    assert graded(answer("a", "Hot"), answer("c", " hot")).items == (0.0,) * 4


def test_skew_is_the_share_of_the_commonest_valid_answer():
    grades = graded(answer("a", "hot"), answer("b", "hot"), answer("c", "cold"), answer("d", "nonsense"))
    assert grades.skew == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"id": "zz", "answer": "hot"}', "no item 'zz' was asked"),
        (b'{"id": "a", "answer": "hot"}\n{"id": "a", "answer": "cold"}', "line 2: item 'a' answered twice"),
        (b"not json", "line 1"),
        (b'{"id": "a", "answer": "hot"}\n{"id": 3, "answer": "hot"}', "line 2"),
        (b'{"answer": "hot"}', "line 1"),
        (b'{"id": "a", "answer": ["hot"]}', "line 1"),
        (b"\xff\xfe", "line 1"),
    ],
)
def test_what_cannot_be_judged_is_refused_by_line(lines: bytes, message: str):
    with pytest.raises(OutputRefused, match=message):
        grade_labels({"answers.jsonl": lines}, RIGHT, LABELS)


def test_a_missing_file_is_refused_and_the_files_that_are_there_are_named():
    with pytest.raises(OutputRefused, match=r"no answers\.jsonl .* notes\.txt"):
        grade_labels({"notes.txt": b""}, RIGHT, LABELS)


@given(st.binary(max_size=200))
def test_no_bytes_an_agent_may_write_do_more_than_be_graded_or_refused(body: bytes):
    try:
        grades = grade_labels({"answers.jsonl": body}, RIGHT, LABELS)
    except OutputRefused as refused:
        assert not any(f"'{label}'" in str(refused) for label in LABELS)
    else:
        assert len(grades.items) == len(RIGHT)


def test_an_own_evaluators_scores_are_taken_in_the_order_of_the_split():
    results = {"items": {"d": 0.25, "c": 0, "b": 1, "a": 0.5, "more": 1}}
    assert read_results({"results.json": json.dumps(results).encode()}, RIGHT).items == (0.5, 1.0, 0.0, 0.25)


@pytest.mark.parametrize(
    "body",
    [
        None,
        b"",
        b"[]",
        b"{}",
        b'{"items": {"a": 1}}',
        b'{"items": {"a": "1", "b": 1, "c": 1, "d": 1}}',
        b'{"items": {"a": NaN}}',
    ],
)
def test_an_own_evaluators_results_that_are_not_whole_are_refused(body: bytes | None):
    with pytest.raises(OutputRefused):
        read_results({} if body is None else {"results.json": body}, RIGHT)


def test_right_or_wrong_scores_get_wilsons_interval():
    found = estimate([1.0] * 3 + [0.0] * 7)
    z = 1.959963984540054
    centre = (0.3 + z * z / 20) / (1 + z * z / 10)
    reach = z / (1 + z * z / 10) * sqrt(0.3 * 0.7 / 10 + z * z / 400)
    assert (found.value, found.n) == (0.3, 10)
    assert (found.low, found.high) == pytest.approx((centre - reach, centre + reach), abs=1e-9)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_scipys(counts: tuple[int, int]):
    right, n = counts
    found = estimate([1.0] * right + [0.0] * (n - right))
    interval = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-8)
    assert 0 <= found.low <= found.value <= found.high <= 1


@given(st.lists(st.floats(0, 1), min_size=3, max_size=30).filter(lambda items: len(set(items) - {0.0, 1.0}) > 0))
def test_other_scores_get_students_interval(items: list[float]):
    found = estimate(items)
    if len(set(items)) > 1:
        interval = stats.ttest_1samp(items, 0.0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-7)
    assert found.low <= found.value <= found.high


def test_all_wrong_is_not_certain_to_be_zero():
    assert estimate([0.0] * 400).low == 0 and estimate([0.0] * 400).high == pytest.approx(0.009512, abs=1e-6)
