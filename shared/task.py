"""A task: the folder that states it, checked when it is loaded, and what an attempt and the evaluator get of it."""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sia_events.shared.items import Item, TaskError, read_items, split
from sia_events.shared.plain import Key, deal, find_key
from sia_events.shared.ports import Limits

ITEM_SPLITS = ("train", "dev", "gate", "test")
ITEMS = "data/private/items.jsonl"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Splits:
    """How many items each scored split draws, by a hash with this seed; all other items are the train split."""

    seed: int
    dev: Annotated[int, Field(gt=0)]
    gate: Annotated[int, Field(gt=0)]
    test: Annotated[int, Field(gt=0)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Task:
    """A task as its folder states it: `path`, `name` and `description` (task.md) are found, the rest is task.toml's.

    With `splits`, its items are the lines of data/private/items.jsonl (id, text, label) and an attempt answers one
    split. Without (a folder of SIA's layout, which has no task.toml), the folder is plain: an attempt gets all of
    data/public, as the split "whole", and what is held out is which ids of its answer key count (`plain_splits`);
    `held_out` = false scores everything in one figure instead. `metric` names the score, a fraction for the evaluator
    "labels", which compares answers with labels; `floor` is the score of one constant answer. `ranking`: scores tell
    which of two attempts is better, and nothing by their size. `question`, `item` and `opening` word a prompt about one
    item and the start of its answer ("What kind of thing …?", "Definition", "Kind:"); `words` has plainer words for
    labels. `kernel` names a problem of kernel_bench that the agent's kernel.py is measured on; for the evaluator
    "kernel" the speed-up over `repeats` timings is the score: such a task is plain, and needs no private data, since
    inputs are drawn anew each time.
    """

    path: Path
    name: str
    description: str
    title: str
    metric: str = "accuracy"
    direction: Literal["maximize", "minimize"] = "maximize"
    evaluator: Literal["labels", "evaluate.py", "kernel"] = "evaluate.py"
    floor: float | None = None
    ranking: bool = False
    labels: tuple[str, ...] = ()
    question: str = ""
    item: str = "Item"
    opening: str = "Answer:"
    words: Mapping[str, str] = field(default_factory=dict)
    kernel: str | None = None
    repeats: Annotated[int, Field(ge=6, le=100)] = 15
    splits: Splits | None = None
    held_out: bool = True
    limits: Limits = Limits()


def known_tasks() -> tuple[str, ...]:
    """Names of the built-in tasks, sorted."""
    built_in = Path(str(resources.files("sia_events.tasks")))
    return tuple(sorted(folder.name for folder in built_in.iterdir() if (folder / "data").is_dir()))


def find_task(name_or_path: str) -> Task:
    """The built-in task of that name, or the task in that folder. Raises TaskError."""
    known = known_tasks()
    if name_or_path in known:
        return load_task(Path(str(resources.files("sia_events.tasks"))) / name_or_path)
    if Path(name_or_path).is_dir():
        return load_task(Path(name_or_path))
    raise TaskError(
        f"no task {name_or_path!r}: neither a built-in task nor a folder.{_guess(name_or_path, known)} "
        f"Built in: {', '.join(known)}. For a task of your own give the path of its folder."
    )


def load_task(path: Path) -> Task:
    """The task in folder `path`, every part of it checked. Raises TaskError; writes nothing."""
    path = path.resolve()
    description = path / "data/public/task.md"
    if not description.is_file():
        raise TaskError(f"{description}: missing. Write there what an agent has to do and which file it must write.")
    task = _declared(path, description.read_text(encoding="utf-8"))
    private = path / "data/private"
    if task.evaluator != "kernel" and not (private.is_dir() and any(private.iterdir())):
        raise TaskError(f"{private}: no private data. Put what the evaluator compares with there; no agent sees it.")
    if task.evaluator == "evaluate.py":
        _check_evaluator(task)
    if task.splits:
        scored, items = sum(_sizes(task.splits).values()), len(read_items(path / ITEMS, task.labels))
        if scored >= items:
            raise TaskError(
                f"{path / 'task.toml'}: [splits] takes {scored} of {items} items and leaves none to train on."
            )
    return task


def split_names(task: Task) -> tuple[str, ...]:
    """Names of the task's splits."""
    return ITEM_SPLITS if task.splits else ("whole",)


def split_sizes(task: Task) -> dict[str, int]:
    """Items by split, or timings of a kernel; empty where they cannot be told apart."""
    if task.evaluator == "kernel":
        return dict.fromkeys(("dev", "gate", "test"), task.repeats)
    if task.splits:
        return {name: len(answers(task, name)) for name in ITEM_SPLITS}
    return {name: len(ids) for name, ids in plain_splits(task).items()}


def answer_key(task: Task) -> Key | None:
    """Where the answers of a plain task stand item by item; None where that cannot be found out."""
    return find_key(private_files(task)) if task.held_out and not task.splits else None


def plain_splits(task: Task) -> dict[str, tuple[str, ...]]:
    """Ids by split of a plain task, empty without an answer key: then no score of it is held out."""
    key = answer_key(task)
    return deal(key.ids, private_files(task)[key.file]) if key else {}


def private_files(task: Task) -> dict[str, bytes]:
    """What stands in data/private, by relative name. For the evaluator alone."""
    private = task.path / "data/private"
    return {file.relative_to(private).as_posix(): file.read_bytes() for file in private.rglob("*") if file.is_file()}


def judge_files(task: Task) -> dict[str, bytes]:
    """All that a plain task's own evaluator may find in the task's folder, by its path there."""
    program = evaluator_file(task)
    assert program is not None, "a plain task has an evaluator of its own"
    public = {f"data/public/{name}": body for name, body in public_files(task, "whole").items()}
    private = {f"data/private/{name}": body for name, body in private_files(task).items()}
    return {**public, **private, program.relative_to(task.path).as_posix(): program.read_bytes()}


def evaluator_file(task: Task) -> Path | None:
    """The task's own evaluator, in data/public or else at its root; None with a built-in one."""
    if task.evaluator != "evaluate.py":
        return None
    inner = task.path / "data/public/evaluate.py"
    return inner if inner.is_file() else task.path / "evaluate.py"


def reference_agent(task: Task) -> Path | None:
    """The task's reference agent, or None where its folder has none."""
    file = task.path / "reference/reference_target_agent.py"
    return file if file.is_file() else None


def digest(task: Task) -> str:
    """Lower-case hex SHA-256 over the names and bytes of the task's settings and data: what a score depends on."""
    files = [task.path / "task.toml", task.path / "evaluate.py", *(task.path / "data").rglob("*")]
    total = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        name = file.relative_to(task.path).as_posix()
        total.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def public_files(task: Task, split: str, samples: int = 1, limit: int | None = None) -> dict[str, bytes]:
    """What an attempt on `split` finds in its dataset folder, by relative name. No answer of an asked item is in it.

    `limit` asks at most that many items instead of all. With `samples` > 1 each item is asked that often, as "ID#0",
    "ID#1" and so on. Raises TaskError for a split that the task does not have.
    """
    public = task.path / "data/public"
    files: dict[str, bytes] = {}
    for file in sorted(public.rglob("*")):
        if not file.resolve().is_relative_to(public):
            raise TaskError(f"{file}: a link to outside data/public. Replace it by the file itself.")
        if file.is_file() and file.name != "evaluate.py":
            files[file.relative_to(public).as_posix()] = file.read_bytes()
    if task.splits:
        asked, examples = _asked(task, split, limit)
        files["items.jsonl"] = _lines({"id": id, "text": item.text} for item in asked for id in _ids(item, samples))
        files["train.jsonl"] = _lines({"id": item.id, "text": item.text, "label": item.label} for item in examples)
        files["labels.json"] = json.dumps(task.labels).encode()
    elif split != "whole" or samples != 1 or limit is not None:
        raise TaskError(f"{task.path}: has the split whole only, asked once. State items and splits in a task.toml.")
    return files


def answers(task: Task, split: str, samples: int = 1, limit: int | None = None) -> dict[str, str]:
    """The right label by id, for what `public_files` asks under the same arguments. For the evaluator alone."""
    asked, _ = _asked(task, split, limit)
    return {id: item.label for item in asked for id in _ids(item, samples)}


def _asked(task: Task, name: str, limit: int | None) -> tuple[list[Item], list[Item]]:
    """(items to answer, solved examples to give along)."""
    if not task.splits or name not in ITEM_SPLITS:
        raise TaskError(f"{task.path}: has no items in a split {name!r}. Its splits: {', '.join(split_names(task))}.")
    parts = split(read_items(task.path / ITEMS), task.splits.seed, _sizes(task.splits))
    if name != "train":
        return parts[name][:limit], parts["train"]
    # Asked from the far end, so that a harness that takes its examples from the head shows the same ones on any split.
    first = 0 if limit is None else max(0, len(parts["train"]) - limit)
    return parts["train"][first:], parts["train"][:first]


def _sizes(splits: Splits) -> dict[str, int]:
    return {"test": splits.test, "gate": splits.gate, "dev": splits.dev}


def _declared(path: Path, description: str) -> Task:
    file = path / "task.toml"
    heading = next((line.strip("# ") for line in description.splitlines() if line.startswith("#")), path.name)
    found: dict[str, Any] = {"path": path, "name": path.name, "description": description}
    try:
        stated = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TaskError(f"{file}: not valid TOML: {error}.") from error
    if reserved := found.keys() & stated.keys():
        raise TaskError(f"{file}: unknown key {min(reserved)!r}. It is found, not stated: remove it.")
    try:
        task = TypeAdapter(Task).validate_python({"title": heading, **stated, **found})
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "unexpected_keyword_argument":
            known = [field.name for table in (Task, Splits, Limits) for field in fields(table)]
            raise TaskError(f"{file}: unknown key {place!r}.{_guess(str(problem['loc'][-1]), known)}") from error
        raise TaskError(f"{file}: {place}: {problem['msg']}; it is {problem['input']!r}.") from error
    if task.evaluator == "labels" and not (task.labels and task.question and task.splits):
        raise TaskError(f'{file}: evaluator = "labels" needs labels, question and [splits] too.')
    if task.evaluator == "kernel" and (task.kernel is None or task.splits or task.direction == "minimize"):
        raise TaskError(f'{file}: evaluator = "kernel" needs kernel, and takes neither [splits] nor direction.')
    if task.evaluator == "labels" and task.direction == "minimize":
        raise TaskError(f'{file}: evaluator = "labels" counts right answers: leave direction out, more is better.')
    if strange := task.words.keys() - set(task.labels):
        raise TaskError(f"{file}: [words] names {min(strange)!r}, which is not one of the labels.")
    return task


def _guess(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _check_evaluator(task: Task) -> None:
    file = evaluator_file(task)
    if file is None or not file.is_file():
        raise TaskError(
            f"{task.path}: no evaluator: neither data/public/evaluate.py nor evaluate.py. Write one that is started as "
            "`evaluate.py --gen-dir FOLDER`, compares what the agent left in FOLDER with data/private and writes "
            'FOLDER/results.json; or state evaluator = "labels" in a task.toml.'
        )
    try:
        compile(file.read_bytes(), str(file), "exec")
    except (SyntaxError, ValueError) as error:
        raise TaskError(f"{file}: does not compile: {error}. Mend it and try again.") from error


def _ids(item: Item, samples: int) -> list[str]:
    return [item.id] if samples == 1 else [f"{item.id}#{sample}" for sample in range(samples)]


def _lines(rows: Iterable[Mapping[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
