"""Registering a task: its public data laid down split by split, its answers where the evaluator alone reads them."""

from collections.abc import Mapping
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
    judge_files,
    plain_splits,
    public_files,
    reference_agent,
    split_names,
    split_sizes,
)
from sia_events.shared.tree import store_tree

ENTRY = "target_agent.py"
REQUIREMENTS = "requirements.txt"
# What SIA installs beside every target agent, less its agent SDK: its tasks' agents and evaluators import from these.
PLAIN_REQUIREMENTS = b"""\
anthropic
google-genai
numpy
openai
pandas
pydantic
python-dotenv
scikit-learn
tqdm
"""
# The one item of a plain task whose items cannot be told apart.
WHOLE = "whole"

_TASK = TypeAdapter(Task)
_ANSWERS = msgspec.json.Decoder(dict[str, dict[str, str]])


def reference_files(task: Task) -> dict[str, bytes]:
    """The harness a run starts from: the task's reference agent. Raises TaskError for a task without one.

    A plain task's agent also gets the list of the packages it may import: its folder's own, else SIA's.
    """
    reference = reference_agent(task)
    if reference is None:
        raise TaskError(f"{task.path / 'reference/reference_target_agent.py'}: missing. Write there a first agent.")
    asked = requirements(task)
    return {ENTRY: reference.read_bytes(), **({REQUIREMENTS: asked} if asked else {})}


def requirements(task: Task) -> bytes | None:
    """The packages that the task's first agent may import, and a plain task's evaluator: its own list, or SIA's."""
    stated = task.path / "reference" / REQUIREMENTS
    if stated.is_file():
        return stated.read_bytes()
    return None if task.splits or task.evaluator == "kernel" else PLAIN_REQUIREMENTS


async def register(
    task: Task, blobs: Blobs, private: Blobs, asked_on_train: int, reference: Mapping[str, bytes] | None = None
) -> TaskRegistered:
    """Store what runners and the evaluator need of `task`; after this its folder is not read again.

    On the train split up to `asked_on_train` items, half of it at most, are there to be answered by rollouts; all
    others are open examples. `reference` is the first agent, the task's own when None. Of a plain task the dev, gate
    and test data are the same files, and no labels are kept: the evaluator gets its private files as a tree.
    Raises TaskError for a task that the loop cannot run.
    """
    first = reference_files(task) if reference is None else reference
    if task.splits:
        # At least half of the train split stays open, for a harness to take examples from.
        limit = {"train": min(asked_on_train, split_sizes(task)["train"] // 2)}
        datasets = {s: public_files(task, s, limit=limit.get(s)) for s in split_names(task)}
        right = {s: answers(task, s, limit=limit.get(s)) for s in split_names(task)}
        program = evaluator_file(task)
        judge = await private.put(program.read_bytes()) if program else None
    else:
        apart = plain_splits(task)
        dealt = apart or dict.fromkeys(("dev", "gate", "test"), (WHOLE,))
        if apart or task.evaluator == "kernel":
            # What dev is scored on is what rollouts are rewarded by: both search, and gate and test stay held out.
            dealt = {"train": dealt["dev"], **dealt}
        datasets = dict.fromkeys(dealt, public_files(task, "whole"))
        right = {s: dict.fromkeys(ids, "") for s, ids in dealt.items()}
        files = {**judge_files(task), REQUIREMENTS: requirements(task) or b""} if evaluator_file(task) else None
        judge = await store_tree(private, files) if files else None
    return TaskRegistered(
        task=task.name,
        title=task.title,
        metric=task.metric,
        maximize=task.direction == "maximize",
        spec=await blobs.put(_TASK.dump_json(replace(task, path=Path(task.name)))),
        datasets={s: await store_tree(blobs, files) for s, files in datasets.items()},
        answers=await private.put(msgspec.json.encode(right)),
        judge=judge,
        reference=await store_tree(blobs, first),
        sizes=_sizes(task, right),
        floor=task.floor,
        whole=not task.splits,
    )


def _sizes(task: Task, right: Mapping[str, Mapping[str, str]]) -> dict[str, int]:
    """Items by split; of a task whose rollouts are whole attempts those that it holds apart."""
    if task.evaluator == "kernel":
        return split_sizes(task)
    return {split: len(labels) for split, labels in right.items() if task.splits or split != "train"}


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
