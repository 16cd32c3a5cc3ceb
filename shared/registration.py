"""Registering a task: its public data laid down split by split, its answers where the evaluator alone reads them."""

from dataclasses import replace
from pathlib import Path

import msgspec
from pydantic import TypeAdapter

from sia_events.shared.events import TaskRegistered
from sia_events.shared.items import TaskError
from sia_events.shared.ports import Blobs
from sia_events.shared.task import (
    Task,
    answers,
    evaluator_file,
    public_files,
    reference_agent,
    split_names,
    split_sizes,
)
from sia_events.shared.tree import store_tree

_TASK = TypeAdapter(Task)
_ANSWERS = msgspec.json.Decoder(dict[str, dict[str, str]])


def require_runnable(task: Task) -> Path:
    """The task's reference agent. Raises TaskError for a task that the loop cannot run; writes nothing."""
    reference = reference_agent(task)
    if reference is None:
        raise TaskError(f"{task.path / 'reference/reference_target_agent.py'}: missing. Write there a first agent.")
    if not task.splits:
        raise TaskError(
            f"{task.path}: has no splits, so no gain on it could be shown to be real. "
            "Put its items into data/private/items.jsonl and state [splits] in a task.toml (docs/walkthrough.md)."
        )
    return reference


async def register(task: Task, blobs: Blobs, private: Blobs, asked_on_train: int) -> TaskRegistered:
    """Store what runners and the evaluator need of `task`; after this its folder is not read again.

    On the train split up to `asked_on_train` items, half of it at most, are there to be answered by rollouts; all
    others are open examples.
    Raises TaskError for a task that the loop cannot run.
    """
    reference = require_runnable(task)
    # At least half of the train split stays open, for a harness to take examples from.
    limit = {"train": min(asked_on_train, split_sizes(task)["train"] // 2)}
    datasets = {s: public_files(task, s, limit=limit.get(s)) for s in split_names(task)}
    right = {s: answers(task, s, limit=limit.get(s)) for s in split_names(task)}
    judge = evaluator_file(task)
    return TaskRegistered(
        task=task.name,
        title=task.title,
        metric=task.metric,
        maximize=task.direction == "maximize",
        spec=await blobs.put(_TASK.dump_json(replace(task, path=Path(task.name)))),
        datasets={s: await store_tree(blobs, files) for s, files in datasets.items()},
        answers=await private.put(msgspec.json.encode(right)),
        judge=await private.put(judge.read_bytes()) if judge else None,
        reference=await store_tree(blobs, {"target_agent.py": reference.read_bytes()}),
        sizes={s: len(labels) for s, labels in right.items()},
        floor=task.floor,
    )


def decode_task(body: bytes) -> Task:
    """The task as `register` stored it; its `path` is a name only."""
    return _TASK.validate_json(body)


def decode_answers(body: bytes) -> dict[str, dict[str, str]]:
    """Right answers by split and item id, in the split's order."""
    return _ANSWERS.decode(body)


def repeated(items: bytes, samples: int, limit: int | None) -> bytes:
    """The first `limit` lines of an items.jsonl, each `samples` times under the ids "ID#0", "ID#1" and so on."""
    lines = [msgspec.json.decode(line) for line in items.splitlines()[:limit]]
    copies = [{**line, "id": f"{line['id']}#{k}"} for line in lines for k in range(samples)] if samples > 1 else lines
    return b"".join(msgspec.json.encode(line) + b"\n" for line in copies)


def asked_ids(right: dict[str, str], samples: int, limit: int | None) -> dict[str, str]:
    """The answers to what `repeated` asks, by the same ids in the same order."""
    few = dict(list(right.items())[:limit])
    return {f"{i}#{k}": label for i, label in few.items() for k in range(samples)} if samples > 1 else few
