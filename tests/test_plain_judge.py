"""What a plain task's evaluator leaves out was not answered: no gain where more is better, and none where less is."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_sia_tasks import BOXED, EVALUATOR, judged, plain

from sia_events.evaluator.grade import OutputRefused
from sia_events.evaluator.plain import items_of
from sia_events.shared.events import AttemptFailed, Scored
from sia_events.shared.task import load_task, plain_splits

IDS = ("q0", "q1", "q2", "q3")
ALL = [{"id": "q0", "score": 0.5}, {"id": "q1", "score": 2}, {"id": "q2", "score": 0}, {"id": "q3", "score": 1}]
# Three ways in which an evaluator tells that q3 has no answer, and one in which it tells that half of them have none.
LEFT_OUT: list[Any] = [
    ALL[:3],
    [*ALL[:3], {"id": "q3", "score": None}],
    [*ALL[:3], {"id": "q3", "status": "missing", "score": 0}],
    [*ALL[:3], {"id": "q3", "status": "Failed_Inference", "score": 1}],
]
EVERY_WAY = pytest.mark.parametrize("rows", LEFT_OUT, ids=["not listed", "no score", "missing", "failed"])


def told(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    return {"results.json": json.dumps({"details": rows}).encode()}


@EVERY_WAY
def test_where_less_is_better_an_item_without_an_answer_refuses_the_lot(rows: list[dict[str, Any]]):
    with pytest.raises(OutputRefused, match="1 of 4 items have no answer"):
        items_of(told(rows), IDS, maximize=False)


@EVERY_WAY
def test_where_more_is_better_it_counts_as_nought_and_as_unanswered(rows: list[dict[str, Any]]):
    grades = items_of(told(rows), IDS)
    assert grades and grades.items == (0.5, 2.0, 0.0, 0.0)
    assert grades.failures == {"unanswered": 1, "wrong": 1}


@pytest.mark.parametrize("maximize", [True, False])
def test_where_all_are_answered_each_has_its_score_whichever_way_is_better(maximize: bool):
    grades = items_of(told([*ALL, {"id": "elsewhere", "score": -9}]), IDS, maximize)
    assert grades and grades.items == (0.5, 2.0, 0.0, 1.0) and grades.failures == {"wrong": 1}


ERRORS = '{"items": {id: abs(given[id] - answer) for id, answer in key.items() if id in given}}'


@BOXED
async def test_an_agent_gains_nothing_by_answering_only_what_it_is_sure_of(tmp_path: Path):
    root = plain(tmp_path / "guess", ERRORS)
    assert "{RESULT}" in EVALUATOR
    (root / "task.toml").write_text('metric = "error"\ndirection = "minimize"\n')
    task = load_task(root)
    dev = plain_splits(task)["dev"]
    rough = {f"q{n}": n % 2 + 0.5 for n in range(40)}
    whole = await judged(task, {"answers.json": json.dumps(rough).encode()}, tmp_path)
    assert isinstance(whole, Scored) and whole.score.value == 0.5 and whole.score.n == len(dev)
    sure = {id: answer for id, answer in rough.items() if id != dev[0]} | {dev[1]: int(dev[1][1:]) % 2}
    few = await judged(task, {"answers.json": json.dumps(sure).encode()}, tmp_path)
    assert isinstance(few, AttemptFailed) and few.kind == "invalid_output"
    assert few.message == f"1 of {len(dev)} items have no answer"
