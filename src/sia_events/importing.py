"""Reads a run folder of SIA's as facts of a run of ours: scores as they were reported, and no verdict of a gate."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sia_events.errors import Unusable
from sia_events.evaluator.estimate import estimate
from sia_events.exporting import CONTEXT, HARNESS_LIST, IMPROVEMENT, PROFILES, PROMPTS, RESULTS
from sia_events.shared.events import (
    AgentProposed,
    AttemptFailed,
    AttemptRequested,
    Estimate,
    Event,
    ExecutionLogged,
    FeedbackRequested,
    HarnessPatched,
    RunFinished,
    RunSettings,
    RunStarted,
    Scored,
    TaskRegistered,
    Weights,
    Written,
)
from sia_events.shared.ports import Blobs
from sia_events.shared.registration import ENTRY
from sia_events.shared.task import Task
from sia_events.shared.tree import TreeRefused, read_tree, store_tree
from sia_events.sia_spelling import BACKENDS

REASON = "imported: scores are as reported, on the one set that was tuned on; SIA has no gate and no sealed test"
UNKNOWN = "unknown/unknown"
# Of a generation's folder, what SIA wrote about the attempt: no part of the agent, and no output of it.
ABOUT = (RESULTS, "evaluation_results.json", "evaluation.log", IMPROVEMENT, HARNESS_LIST, *PROMPTS)
# More than these no results.json is believed: an interval is taken over every item.
MOST_ITEMS = 1_000_000
MOST_GENERATIONS = 1000
TOTALS, RIGHT, ACCURACY = (
    ("total_questions", "total", "n_total"),
    ("correct", "n_correct"),
    ("accuracy_percent", "accuracy"),
)
_TASK = TypeAdapter(Task)


@dataclass(frozen=True)
class Generation:
    """One gen_N folder: the agent's files, what it wrote, what was reported of it. `number` counts from 1.

    `score` is what `reported` finds in `results`.
    """

    number: int
    harness: Mapping[str, bytes]
    outputs: Mapping[str, bytes]
    results: Mapping[str, Any] | None
    score: tuple[float, int] | None
    improvement: bytes | None
    prompt: bytes | None


@dataclass(frozen=True)
class SiaRun:
    """A run folder as it was read. `profiles` and `context` are empty where SIA wrote none."""

    name: str
    generations: tuple[Generation, ...]
    profiles: Mapping[str, Any]
    context: Mapping[str, str]


def read_run(folder: Path) -> SiaRun:
    """The run in `folder`, a runs/run_N of SIA's. Raises Unusable naming what is missing or wrong; writes nothing."""
    found = (re.fullmatch(r"gen_(\d+)", each.name) for each in folder.glob("gen_*") if each.is_dir())
    numbers = sorted(int(each[1]) for each in found if each)
    if not numbers or numbers != list(range(1, len(numbers) + 1)):
        have = ", ".join(f"gen_{n}" for n in numbers) or "none"
        raise Unusable(f"{folder}: no run of SIA's: it needs folders gen_1, gen_2 … without a gap, and has {have}")
    if len(numbers) > MOST_GENERATIONS:
        raise Unusable(
            f"{folder}: {len(numbers)} generations, and up to {MOST_GENERATIONS} are read; nothing was written"
        )
    context = folder / CONTEXT
    text = context.read_text(encoding="utf-8", errors="replace") if context.is_file() else ""
    head = text.partition("\n## ")[0]
    return SiaRun(
        name=folder.resolve().name,
        generations=tuple(_read_generation(folder / f"gen_{n}", n) for n in numbers),
        profiles=_object(folder / PROFILES) or {},
        context=dict(re.findall(r"^\*\*([^*]+)\*\*: *(.*)$", head, flags=re.MULTILINE)),
    )


def reported(results: Mapping[str, Any]) -> tuple[float, int] | None:
    """(score as a fraction, items) as a results.json reports them, or None where it has no accuracy.

    "accuracy_percent" is percent. "accuracy" is percent above 1; at most 1 it is a fraction, unless as percent it is
    what right answers by items come to. Items are what "total_questions", "total" or "n_total" counts, else 1. Raises
    Unusable for a figure above MOST_ITEMS.
    """
    summary = results.get("summary")
    figures = {**results, **summary} if isinstance(summary, dict) else dict(results)
    told = {name: figures[name] for name in (*TOTALS, *RIGHT, *ACCURACY) if name in figures}
    number = {k: v for k, v in told.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    if beyond := [name for name, figure in number.items() if abs(figure) > MOST_ITEMS]:
        raise Unusable(f"{beyond[0]} is above {MOST_ITEMS:,}, which no task has; nothing was written")
    asked = next((number[k] for k in TOTALS if number.get(k, 0) >= 1), 1)
    right = next((number[k] for k in RIGHT if k in number), None)
    if "accuracy_percent" in number:
        value = number["accuracy_percent"] / 100
    elif "accuracy" in number:
        value = number["accuracy"]
        if value > 1 or (right and isclose(value / 100, right / asked)):
            value /= 100
    else:
        return None
    return (value, int(asked)) if 0 <= value <= 1 else None


async def facts(run: SiaRun, blobs: Blobs, private: Blobs) -> list[Event]:
    """The events of the run, in order. The task is a stub: its data is not in the folder."""
    task = Path(run.context.get("Task", "")).name or "unknown"
    model = _model(run)
    first = await store_tree(blobs, run.generations[0].harness)
    asked = max((generation.score[1] for generation in run.generations if generation.score), default=1)
    spec = Task(path=Path(task), name=task, description="", title=f"{task}, imported from SIA")
    settings = RunSettings(
        generations=max(1, len(run.generations) - 1), candidates=1, lever="harness", target_model=model
    )
    events: list[Event] = [
        TaskRegistered(
            task=task,
            title=spec.title,
            metric="accuracy",
            maximize=True,
            spec=await blobs.put(_TASK.dump_json(spec)),
            datasets={},
            answers=await private.put(b"{}"),
            reference=first,
            sizes={"dev": asked},
            floor=None,
        ),
        RunStarted(settings=settings, code="sia-agent, imported"),
    ]
    for generation in run.generations:
        events += await _generation(run, generation, model, blobs)
    return [*events, RunFinished(outcome="no proven gain", best=None, sealed=None, reason=REASON)]


async def _generation(run: SiaRun, generation: Generation, model: str, blobs: Blobs) -> list[Event]:
    number = generation.number - 1
    version = f"g{number}a"
    harness = await store_tree(blobs, generation.harness)
    written = await _written(run, generation, blobs)
    weights = Weights(model=model)
    events: list[Event] = []
    if number:
        parent = f"g{number - 1}a"
        note = (generation.improvement or b"").decode(errors="replace").strip().splitlines()
        said = next((line.strip("# ") for line in note if line.strip("# ")), "no improvement note")
        events += [
            FeedbackRequested(generation=number, incumbent=parent),
            HarnessPatched(
                version=version,
                generation=number,
                candidate=0,
                parent=parent,
                harness=harness,
                weights=weights,
                edits=(),
                reason=f"imported: {said[:200]}",
                written=written,
            ),
        ]
    else:
        events.append(
            AgentProposed(
                version=version, candidate=0, harness=harness, weights=weights, reason="imported", written=written
            )
        )
    attempt = f"{version}.dev"
    events.append(AttemptRequested(attempt=attempt, version=version, split="dev", seed=0))
    if generation.score is None:
        why = f"imported without a score: {'no accuracy in' if generation.results is not None else 'no'} {RESULTS}"
        failed = AttemptFailed(attempt=attempt, version=version, split="dev", kind="invalid_output", message=why)
        return [*events, failed]
    value, n = generation.score
    events.append(
        ExecutionLogged(
            attempt=attempt,
            version=version,
            split="dev",
            outputs=await store_tree(blobs, generation.outputs),
            # What SIA's agents write of themselves is no record of model calls: it is kept among the outputs.
            trajectory=await blobs.put(b""),
            calls=0,
            prompt_tokens=0,
            completion_tokens=0,
            seconds=0.0,
        )
    )
    right = round(value * n)
    around = estimate([1.0] * right + [0.0] * (n - right))
    score = Estimate(value=value, low=min(around.low, value), high=max(around.high, value), n=n)
    events.append(
        Scored(attempt=attempt, version=version, split="dev", score=score, items=(value,), failures={}, skew=0.0)
    )
    return events


async def _written(run: SiaRun, generation: Generation, blobs: Blobs) -> Written | None:
    """By what and from what it was written, where the folder says so."""
    meta = run.profiles.get("meta") or {}
    named = meta.get("agent_impl") or run.context.get("Agent impl", "")
    backend = BACKENDS.get(named)
    silent = generation.prompt is None and generation.improvement is None
    if backend not in ("agentic", "claude", "openhands") or silent:
        return None
    return Written(
        backend=backend,
        model=str(meta.get("model") or run.context.get("Meta Model", UNKNOWN)),
        prompt=await blobs.put(generation.prompt or b""),
        trajectory=await blobs.put(b""),
        note=await blobs.put(generation.improvement or b""),
    )


def _read_generation(folder: Path, number: int) -> Generation:
    try:
        files = read_tree(folder)
    except TreeRefused as refused:
        raise Unusable(f"{folder}: {refused}; nothing was written") from refused
    if ENTRY not in files:
        raise Unusable(f"{folder / ENTRY}: missing; nothing was written. A generation without an agent is none")
    listed = _object(folder / HARNESS_LIST, list)
    # SIA does not say which files are the agent's: its program, what it may import, and what it needs.
    agent = set(listed) if listed else {n for n in files if n.endswith(".py") or n == "requirements.txt"}
    prompt = next((files[name] for name in PROMPTS if name in files), None)
    results = _object(folder / "evaluation_results.json") or _object(folder / RESULTS)
    try:
        score = None if results is None else reported(results)
    except Unusable as unusable:
        raise Unusable(f"{folder / RESULTS}: {unusable}") from unusable
    return Generation(
        number=number,
        harness={name: body for name, body in files.items() if name in agent},
        outputs={name: body for name, body in files.items() if name not in agent and name not in ABOUT},
        results=results,
        score=score,
        improvement=files.get(IMPROVEMENT),
        prompt=prompt,
    )


def _model(run: SiaRun) -> str:
    profile = run.profiles.get("target") or {}
    model = str(profile.get("model") or run.context.get("Task Model") or UNKNOWN)
    provider = profile.get("provider")
    provider = provider.get("provider_id") if isinstance(provider, dict) else profile.get("provider_id")
    return f"{provider}/{model}" if provider else model


def _object(file: Path, kind: type = dict) -> Any:
    """The JSON object (or list) in a file, or None where there is no file. Raises Unusable for anything else."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{file}: does not read as JSON: {error}; nothing was written") from error
    if not isinstance(found, kind):
        raise Unusable(f"{file}: not a JSON {'object' if kind is dict else 'list'}; nothing was written")
    return found
