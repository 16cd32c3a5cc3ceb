"""Turns an attempt's answers into per-item scores. Pure: what the agent wrote is data, and all items count."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

ANSWERS = "answers.jsonl"
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class OutputRefused(Exception):
    """The attempt's outputs cannot be judged; the message says what is wrong, and never what would be right."""


class _Line(msgspec.Struct):
    id: str
    answer: str | None = None


@dataclass(frozen=True)
class Grades:
    """Per-item scores in the split's order, items counted by class of failure, and the commonest answer's share."""

    items: tuple[float, ...]
    failures: Mapping[str, int]
    skew: float


def grade_labels(outputs: Mapping[str, bytes], right: Mapping[str, str], labels: tuple[str, ...]) -> Grades:
    """Right or wrong, over every item asked: a missing answer is wrong, an unknown or doubled id refuses the lot."""
    if ANSWERS not in outputs:
        raise OutputRefused(f"no {ANSWERS} among the files written: {', '.join(sorted(outputs)[:5])}")
    given: dict[str, str | None] = {}
    for number, line in enumerate(outputs[ANSWERS].splitlines(), start=1):
        try:
            row = msgspec.json.decode(line, type=_Line)
        except UNREADABLE as error:
            raise OutputRefused(f"{ANSWERS} line {number}: {error}") from error
        if row.id not in right:
            raise OutputRefused(f"{ANSWERS} line {number}: no item {row.id[:40]!r} was asked")
        if row.id in given:
            raise OutputRefused(f"{ANSWERS} line {number}: item {row.id!r} answered twice")
        given[row.id] = row.answer
    failures: Counter[str] = Counter()
    items: list[float] = []
    for item, label in right.items():
        answer = given.get(item)
        items.append(float(answer == label))
        if answer is None:
            failures["unanswered"] += 1
        elif answer not in labels:
            failures["invalid"] += 1
        elif answer != label:
            failures["wrong"] += 1
    valid = [answer for answer in given.values() if answer in labels]
    skew = max(Counter(valid).values()) / len(valid) if valid else 0.0
    return Grades(tuple(items), dict(sorted(failures.items())), round(skew, 6))


def read_results(outputs: Mapping[str, bytes], right: Mapping[str, str]) -> Grades:
    """Grades from an own evaluator's results.json: {"items": {id: score}}; every item asked has to be there, once."""
    try:
        scores = msgspec.json.decode(outputs["results.json"], type=dict[str, dict[str, float]])["items"]
    except (KeyError, *UNREADABLE) as error:
        raise OutputRefused(
            f'the evaluator must write results.json with {{"items": {{id: score}}}}: {error}'
        ) from error
    if missing := right.keys() - scores.keys():
        raise OutputRefused(f"the evaluator left out {len(missing)} of {len(right)} items")
    items = tuple(float(scores[item]) for item in right)
    return Grades(items, {"wrong": sum(score <= 0 for score in items)}, 0.0)
