"""Reads the results.json of an evaluator written for SIA: scores item by item where it lists them, else one figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sia_events.evaluator.grade import UNREADABLE, Grades, OutputRefused

RESULTS = "results.json"
LISTS = ("details", "results")
IDS = ("question_id", "id")
VERDICTS = ("is_correct", "correct", "score")
UNANSWERED = ("missing", "failed_inference")
RIGHT, ASKED = ("correct", "n_correct"), ("total_questions", "total", "n_total")


def items_of(written: Mapping[str, bytes], ids: Sequence[str], maximize: bool = True) -> Grades | None:
    """A score for each of `ids`, where the results list them; None where they list no items, or items without scores.

    What is not listed, or listed without a score, was not answered and counts as 0, or refuses the lot where less is
    better. Ids beside `ids` are left out: their answers were not there to compare with. An id that is listed twice
    refuses the lot.
    """
    rows = _listed(_results(written))
    if rows is None:
        return None
    if rows and not any(_verdict(row) is not None for row in rows):
        return None
    given: dict[str, float | None] = {}
    for row in rows:
        id = str(next((row[name] for name in IDS if name in row), ""))
        if id in given:
            raise OutputRefused("the evaluator lists an item twice: the agent answered it twice")
        answered = str(row.get("status", "")).lower() not in UNANSWERED
        given[id] = _verdict(row) if answered else None
    if not given.keys() & set(ids):
        raise OutputRefused(f"the evaluator lists none of the {len(ids)} items asked: nothing was answered")
    scores = [given.get(id) for id in ids]
    missing = scores.count(None)
    if missing and not maximize:
        raise OutputRefused(f"{missing} of {len(ids)} items have no answer")
    counts = {"unanswered": missing, "wrong": sum(score is not None and score <= 0 for score in scores)}
    return Grades(tuple(s or 0.0 for s in scores), {kind: count for kind, count in counts.items() if count}, 0.0)


def figure_of(written: Mapping[str, bytes], metric: str) -> float:
    """The score as one figure: right answers of those asked where both are counted, else `metric` as it stands.

    An "accuracy" above 1 is read as percent, and so is what is called "accuracy_percent".
    Raises OutputRefused where there is no such figure.
    """
    results = _results(written)
    figures = results | results["summary"] if isinstance(results.get("summary"), dict) else results
    right, asked = (
        next((f for n in names if (f := _number(figures, n)) is not None), None) for names in (RIGHT, ASKED)
    )
    if right is not None and asked:
        return right / asked
    if (value := _number(figures, metric)) is not None:
        return value / 100 if metric == "accuracy" and value > 1 else value
    if (value := _number(figures, f"{metric}_percent")) is not None:
        return value / 100
    raise OutputRefused(f"the evaluator's {RESULTS} has no figure {metric!r}; there are: {', '.join(sorted(figures))}")


def _results(written: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(written[RESULTS], type=dict[str, Any])
    except KeyError as error:
        raise OutputRefused(f"the evaluator wrote no {RESULTS}") from error
    except UNREADABLE as error:
        raise OutputRefused(f"the evaluator's {RESULTS} does not read as a JSON object") from error
    return found


def _listed(results: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    if isinstance(scores := results.get("items"), dict):
        return [{"id": id, "score": score} for id, score in scores.items()]
    for name in LISTS:
        rows = results.get(name)
        if isinstance(rows, list) and all(isinstance(r, dict) and r.keys() & set(IDS) for r in rows):
            return rows
    return None


def _verdict(row: Mapping[str, Any]) -> float | None:
    return next((float(row[name]) for name in VERDICTS if isinstance(row.get(name), bool | int | float)), None)


def _number(figures: Mapping[str, Any], name: str) -> float | None:
    value = figures.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
