"""Judges an attempt: the one place where outputs and right answers meet."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from sia_events.evaluator.estimate import estimate
from sia_events.evaluator.grade import Grades, OutputRefused, grade_labels, read_results
from sia_events.shared.events import AttemptFailed, Event, ExecutionLogged, Scored
from sia_events.shared.ports import Job
from sia_events.shared.registration import asked_ids, decode_answers, decode_task
from sia_events.shared.service import Work
from sia_events.shared.task import Task
from sia_events.shared.tree import TreeRefused, load_tree, read_tree, write_tree


async def judge(work: Work, logged: ExecutionLogged) -> Sequence[Event]:
    """Score the attempt over all items it was asked; on the train split, whose answers are open, keep each reward."""
    registered, asked = work.run.task, work.run.attempts[logged.attempt]
    assert registered is not None, "an attempt is logged behind its task"
    assert work.ports.private is not None, "the evaluator is the one service that is given the answers"
    outputs = await load_tree(work.ports.blobs, logged.outputs)
    every = decode_answers(await work.ports.private.get(registered.answers))
    right = asked_ids(every[logged.split], asked.samples, asked.items)
    try:
        task = decode_task(await work.ports.blobs.get(registered.spec))
        if registered.judge:
            grades = await _own_judge(work, task, await work.ports.private.get(registered.judge), outputs, right)
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
    if logged.split == "train":
        rewards = await work.ports.blobs.put(msgspec.json.encode(dict(zip(right, grades.items, strict=True))))
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


async def _own_judge(
    work: Work, task: Task, program: bytes, outputs: Mapping[str, bytes], right: Mapping[str, str]
) -> Grades:
    """Run the task's evaluate.py in a box of its own: outputs go in as data, the agent's code never runs there.

    An interpreter runs code that it finds in its home, in the folder it is started in and in its script's folder. So
    the outputs lie a level below the first two, which hold nothing else, and -I looks into none of the three.
    """
    scratch = work.ports.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="judge-", dir=scratch))
    try:
        answers = b"".join(msgspec.json.encode({"id": i, "label": label}) + b"\n" for i, label in right.items())
        write_tree({"public/evaluate.py": program, "private/answers.jsonl": answers}, folder / "data")
        written = folder / "work" / "outputs"
        written.mkdir(parents=True)
        write_tree({path: body for path, body in outputs.items() if path.split("/")[0] != "results.json"}, written)
        argv = ("python", "-I", "/task/data/public/evaluate.py", "--gen-dir", "/work/outputs")
        outcome = await work.ports.sandbox.run(
            Job(argv=argv, work=folder / "work", reads={"/task/data": folder / "data"}, limits=task.limits)
        )
        if outcome.status != "ok":
            # Its words are not passed on: an evaluator that trips over an answer may quote the right one.
            kept = await work.ports.private.put(outcome.stderr) if work.ports.private else ""
            raise OutputRefused(f"evaluate.py ended with {outcome.status} on these outputs (private blob {kept[:12]})")
        return read_results(read_tree(written), right)
    except TreeRefused as refused:
        raise OutputRefused(str(refused)) from refused
    finally:
        shutil.rmtree(folder, ignore_errors=True)
