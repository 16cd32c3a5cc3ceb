"""Loads what a prompt tells of the version that it starts from: its last scored attempt on dev."""

from collections.abc import Mapping, Sequence

import msgspec

from sia_events.agents.evidence import Attempt, feedback_on
from sia_events.shared.calls import ModelCall, decode_call
from sia_events.shared.events import Scored
from sia_events.shared.ports import Blobs
from sia_events.shared.record import Record
from sia_events.shared.registration import decode_task
from sia_events.shared.run import Run
from sia_events.shared.tree import load_tree

ANSWERS = "answers.jsonl"
ITEMS = "items.jsonl"


async def observe(run: Run, records: Sequence[Record], blobs: Blobs, version: str | None = None) -> Attempt:
    """The last scored attempt on dev of a version, the incumbent if none is named, from public blobs alone.

    Raises LookupError for one that has no score on dev.
    """
    name = version or run.incumbent
    assert run.task is not None and name is not None, "feedback is asked for behind the first verdict"
    position, scored = _last_score(records, name)
    task = decode_task(await blobs.get(run.task.spec))
    logged = run.executions[scored.attempt]
    data = await load_tree(blobs, run.task.datasets["dev"])
    # A plain task's file of that name is its own matter, and dev is a part of it only.
    items = items_in(data.get(ITEMS, b"")) if task.splits else {}
    calls = calls_in(await blobs.get(logged.trajectory))
    outputs = answers_in((await load_tree(blobs, logged.outputs)).get(ANSWERS, b""))
    return seen(scored, position, logged.trajectory, items, outputs, calls, task.labels, run.task.maximize)


def seen(
    scored: Scored,
    position: int,
    trajectory: str,
    items: Mapping[str, str],
    outputs: Mapping[str, str],
    calls: Sequence[ModelCall],
    labels: Sequence[str],
    maximize: bool,
) -> Attempt:
    """The attempt of a score, with what was loaded of it. Items that the split does not list are numbered."""
    ids = list(items) if len(items) == len(scored.items) else [f"item {n}" for n in range(1, len(scored.items) + 1)]
    return Attempt(
        version=scored.version,
        record=position,
        trajectory=trajectory,
        items={item: items.get(item, "") for item in ids},
        scores=tuple(score if maximize else -score for score in scored.items),
        calls=tuple(calls),
        feedback=feedback_on(ids, scored.items, outputs, calls, labels, maximize),
    )


def items_in(lines: bytes) -> dict[str, str]:
    """Public texts by id from an items.jsonl, in its order."""
    rows = (msgspec.json.decode(line) for line in lines.splitlines())
    return {row["id"]: row["text"] for row in rows}


def answers_in(lines: bytes) -> dict[str, str]:
    """What the agent answered, by id, from its answers.jsonl; a line that says nothing readable is passed over.

    The evaluator has judged the file; here its lines are only quoted.
    """
    answers: dict[str, str] = {}
    for line in lines.splitlines():
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("id"), str) and row.get("answer") is not None:
            answers[row["id"]] = str(row["answer"])
    return answers


def calls_in(trajectory: bytes) -> tuple[ModelCall, ...]:
    """The calls of a stored trajectory, one a line; without those whose replies only another start was given."""
    calls = (decode_call(line) for line in trajectory.splitlines() if line)
    return tuple(call for call in calls if not call.other_start)


def _last_score(records: Sequence[Record], version: str) -> tuple[int, Scored]:
    for record in reversed(records):
        event = record.event
        if isinstance(event, Scored) and event.version == version and event.split == "dev":
            return record.position, event
    raise LookupError(f"{version} has no score on dev in {len(records)} records: there is nothing to give feedback on")
