"""Judges an attempt: the one place where outputs and right answers meet."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from sia_events.evaluator import plain
from sia_events.evaluator.estimate import estimate
from sia_events.evaluator.grade import Grades, OutputRefused, grade_labels, read_results
from sia_events.shared.events import AttemptFailed, Event, ExecutionLogged, Scored
from sia_events.shared.packages import PACKAGES, environment, script
from sia_events.shared.plain import find_key, keep_only
from sia_events.shared.ports import Job
from sia_events.shared.registration import REQUIREMENTS, WHOLE, asked_ids, decode_answers, decode_task
from sia_events.shared.service import Work
from sia_events.shared.task import Task
from sia_events.shared.tree import TreeRefused, load_tree, read_tree, remove_tree, write_tree

PROGRAM, PRIVATE = "data/public/evaluate.py", "data/private/"
# Blocks of a split that a judge of one figure judges one by one: the sign test on ten can reach p = 0.002.
BLOCKS = 10


async def judge(work: Work, logged: ExecutionLogged) -> Sequence[Event]:
    """Score the attempt over all items it was asked; of items whose answers are open, keep each reward.

    Of a task whose evaluator is the bench nothing is said before the kernel is measured.
    """
    registered, asked = work.run.task, work.run.attempts[logged.attempt]
    assert registered is not None, "an attempt is logged behind its task"
    assert work.ports.private is not None, "the evaluator is the one service that is given the answers"
    task = decode_task(await work.ports.blobs.get(registered.spec))
    if task.evaluator == "kernel":
        return []
    outputs = await load_tree(work.ports.blobs, logged.outputs)
    every = decode_answers(await work.ports.private.get(registered.answers))
    right = asked_ids(every[logged.split], asked.samples, asked.items)
    try:
        if registered.judge and task.splits:
            program = await work.ports.private.get(registered.judge)
            answers = b"".join(msgspec.json.encode({"id": i, "label": label}) + b"\n" for i, label in right.items())
            folder = {PROGRAM: program, "data/private/answers.jsonl": answers}
            grades = read_results(await _own_judge(work, task, folder, outputs), right)
        elif registered.judge:
            folder = await load_tree(work.ports.private, registered.judge)
            grades = await _plain_judge(work, task, folder, outputs, tuple(right))
        else:
            grades = grade_labels(outputs, right, task.labels)
    except OutputRefused as refused:
        return [
            AttemptFailed(
                attempt=logged.attempt,
                version=logged.version,
                split=logged.split,
                kind="invalid_output",
                message=str(refused),
            )
        ]
    rewards = None
    if logged.split == "train" and asked.group is None:
        sign = 1.0 if registered.maximize else -1.0  # the trainer knows one direction: more
        signed = {item: sign * score for item, score in zip(right, grades.items, strict=True)}
        rewards = await work.ports.blobs.put(msgspec.json.encode(signed))
    return [
        Scored(
            attempt=logged.attempt,
            version=logged.version,
            split=logged.split,
            score=estimate(grades.items),
            items=grades.items,
            failures=dict(grades.failures),
            skew=grades.skew,
            rewards=rewards,
        )
    ]


async def _plain_judge(
    work: Work, task: Task, folder: Mapping[str, bytes], outputs: Mapping[str, bytes], ids: Sequence[str]
) -> Grades:
    """Grades by an evaluator that was written for SIA and knows of no splits: it gets the answers of the split alone.

    Where it tells one figure instead of item by item, it judges ten blocks of the split one by one: the score is
    their mean, and two versions can be compared on the same ten. Where items cannot be told apart, the figure is all.
    """
    key = find_key({name.removeprefix(PRIVATE): body for name, body in folder.items() if name.startswith(PRIVATE)})
    if ids == (WHOLE,) or key is None:
        return Grades((plain.figure_of(await _own_judge(work, task, folder, outputs), task.metric),), {}, 0.0)

    def about(some: Sequence[str]) -> Mapping[str, bytes]:
        name = PRIVATE + key.file
        return {**folder, name: keep_only(key.file, folder[name], some)}

    written = await _own_judge(work, task, about(ids), outputs)
    if grades := plain.items_of(written, ids, task.direction == "maximize"):
        return grades
    if len(ids) < BLOCKS:
        return Grades((plain.figure_of(written, task.metric),), {}, 0.0)
    blocks = [ids[first::BLOCKS] for first in range(BLOCKS)]
    results = [await _own_judge(work, task, about(block), outputs) for block in blocks]
    return Grades(tuple(plain.figure_of(result, task.metric) for result in results), {}, 0.0)


async def _own_judge(
    work: Work, task: Task, files: Mapping[str, bytes], outputs: Mapping[str, bytes]
) -> Mapping[str, bytes]:
    """Run the task's evaluate.py in a box of its own, and return what it wrote; the agent's code never runs there.

    `files` are the task's folder as the evaluator sees it; outputs go in as data. An interpreter runs code that it
    finds in its home, in the folder it is started in and in its script's folder. So the outputs lie a level below the
    first two, which hold nothing else, and -I looks into none of the three.
    """
    scratch = work.ports.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="judge-", dir=scratch))
    try:
        write_tree(files, folder / "task")
        written = folder / "work" / "outputs"
        written.mkdir(parents=True)
        write_tree({path: body for path, body in outputs.items() if path.split("/")[0] != "results.json"}, written)
        program = f"/task/{PROGRAM if PROGRAM in files else 'evaluate.py'}"
        packages = environment(work.ports.home, files.get(REQUIREMENTS))
        outcome = await work.ports.sandbox.run(
            Job(
                argv=(*script(program, packages), "--gen-dir", "/work/outputs"),
                work=folder / "work",
                reads={"/task": folder / "task", **({PACKAGES: packages} if packages else {})},
                limits=task.limits,
            )
        )
        if outcome.status != "ok":
            # Its words are not passed on: an evaluator that trips over an answer may quote the right one.
            kept = await work.ports.private.put(outcome.stderr) if work.ports.private else ""
            raise OutputRefused(f"evaluate.py ended with {outcome.status} on these outputs (private blob {kept[:12]})")
        return read_tree(written)
    except TreeRefused as refused:
        raise OutputRefused(str(refused)) from refused
    finally:
        remove_tree(folder)
