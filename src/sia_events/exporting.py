"""Writes a run in SIA's layout, runs/run_N/gen_G/…, for whatever reads SIA's run folders."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sia_events.errors import Unusable
from sia_events.shared.calls import decode_call
from sia_events.shared.events import AgentProposed, ExecutionLogged, HarnessPatched, Scored, VersionAccepted, Written
from sia_events.shared.ports import Blobs
from sia_events.shared.record import Record
from sia_events.shared.run import Run, Version, fold
from sia_events.shared.tree import TreeRefused, load_tree, write_tree

HARNESS_LIST = "harness_files.json"
EXECUTION, IMPROVEMENT, RESULTS, CONTEXT, PROFILES = (
    "agent_execution.json",
    "improvement.md",
    "results.json",
    "context.md",
    "profiles.json",
)
LOG = "evaluation.log"
PROMPTS = ("meta_agent_prompt.txt", "feedback_agent_prompt.txt")
ROOT = PurePosixPath("/")
# Names that readers take for the evaluator's word or the platform's.
TOLD = (RESULTS, "evaluation_results.json", LOG, HARNESS_LIST, IMPROVEMENT, *PROMPTS)


async def export(records: Sequence[Record], blobs: Blobs, into: Path) -> Path:
    """Write the run under `into`/run_N and return that folder; N ends the run's name, or is 1.

    gen_1 has the first agent, gen_G the version that came furthest in generation G - 1: the accepted one, else the
    one that met the gate, else the best on dev. results.json has the dev score, which the loop may tune on, and
    beside it the gate's. Raises Unusable for a folder with something in it, and for a file of the run's that leads out
    of it; nothing was written then.
    """
    run = fold(records)
    ending = re.search(r"(\d+)$", run.name)
    folder = into / f"run_{ending[1] if ending else 1}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Unusable(f"{folder} is there and not empty; nothing was written. Name another folder, or empty it")
    written = {
        r.event.version: r.event.written
        for r in records
        if isinstance(r.event, AgentProposed | HarnessPatched) and r.event.written
    }
    chosen = [_furthest(run, versions) for g in range(run.generation + 1) if (versions := run.of_generation(g))]
    files: dict[str, bytes] = {CONTEXT: _context(run, records, chosen).encode(), PROFILES: _json(_profiles(run))}
    for version in chosen:
        place = f"gen_{version.generation + 1}/"
        made = await _generation(run, version, written.get(version.name), blobs)
        files.update({place + name: body for name, body in made.items()})
    try:
        write_tree(files, folder)
    except TreeRefused as refused:
        raise Unusable(f"{run.name} has a file that cannot be laid down: {refused}; nothing was written") from refused
    return folder


def _furthest(run: Run, versions: Sequence[Version]) -> Version:
    better = 1 if run.task is None or run.task.maximize else -1

    def how_far(version: Version) -> tuple[bool, bool, float]:
        dev = run.scored(version.name, "dev")
        accepted = isinstance(run.verdicts.get(version.name), VersionAccepted)
        return (
            accepted,
            bool(run.scored(version.name, "gate")),
            better * dev[-1].score.value if dev else float("-inf"),
        )

    return max(versions, key=how_far)


async def _generation(run: Run, version: Version, written: Written | None, blobs: Blobs) -> dict[str, bytes]:
    """The files of one generation's folder. What is told of it keeps its names whatever the agent or its author wrote:
    who reads the folder would take a results.json of theirs for the evaluator's.
    """
    harness = _clear_of([*TOLD, EXECUTION], await load_tree(blobs, version.harness))
    files: dict[str, bytes] = {}
    logged = [e for e in run.executions.values() if e.version == version.name and e.split == "dev"]
    if logged:
        files = _clear_of([*TOLD, *harness], await load_tree(blobs, logged[-1].outputs))
        if EXECUTION not in files:
            files = {**_clear_of([EXECUTION], files), EXECUTION: await _execution(logged[-1], blobs)}
    for scored in run.scored(version.name, "dev")[-1:]:
        files[RESULTS] = _json(_results(run, scored))
    if failure := run.failed(version.name, "dev"):
        files[LOG] = f"{failure.kind}: {failure.message}\n".encode()
    if written:
        files[PROMPTS[version.generation > 0]] = await blobs.get(written.prompt)
    if version.generation:
        files[IMPROVEMENT] = await blobs.get(written.note) if written else _improvement(run, version).encode()
    return {**files, **harness, HARNESS_LIST: _json(sorted(harness))}


def _clear_of(ours: Iterable[str], theirs: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those of their files that stand at none of our paths, and in the way of none."""
    taken = {ROOT / name for name in ours}
    folders = {folder for path in taken for folder in path.parents}
    paths = {name: ROOT / name for name in theirs}
    apart = {name for name, path in paths.items() if path not in folders and taken.isdisjoint([path, *path.parents])}
    return {name: body for name, body in theirs.items() if name in apart}


async def _execution(logged: ExecutionLogged, blobs: Blobs) -> bytes:
    """The attempt's model calls as one list of messages, each call's request before its reply."""
    messages: list[Mapping[str, Any]] = []
    for line in (await blobs.get(logged.trajectory)).splitlines():
        call = decode_call(line)
        messages += call.request.get("messages") or [{"role": "user", "content": json.dumps(call.request)}]
        choices = (call.reply or {}).get("choices") or []
        reply = choices[0].get("message") if choices and isinstance(choices[0], dict) else None
        messages.append(reply or {"role": "assistant", "content": json.dumps(call.reply)})
    return _json(messages)


def _results(run: Run, scored: Scored) -> dict[str, Any]:
    metric = run.task.metric if run.task else "accuracy"
    found: dict[str, Any] = {metric: scored.score.value, "low": scored.score.low, "high": scored.score.high}
    found |= {"split": "dev", "total_questions": scored.score.n}
    if set(scored.items) <= {0.0, 1.0} and len(scored.items) == scored.score.n:
        right = sum(scored.items)
        missing = scored.failures.get("unanswered", 0)
        found |= {"correct": int(right), "incorrect": int(len(scored.items) - right - missing), "missing": missing}
    if metric == "accuracy":
        found["accuracy_percent"] = 100 * scored.score.value
    gate = run.scored(scored.version, "gate")
    return {**found, "gate": gate[-1].score.model_dump() if gate else None}


def _improvement(run: Run, version: Version) -> str:
    verdict = run.verdicts.get(version.name)
    lines = [f"# {version.name}, from {version.parent}", "", version.reason, ""]
    lines += [f"- {edit}" for edit in version.edits]
    return "\n".join([*lines, "", f"Verdict: {verdict.reason}" if verdict else "No verdict.", ""])


def _context(run: Run, records: Sequence[Record], chosen: Sequence[Version]) -> str:
    s = run.settings
    lines = ["# Run context", ""]
    lines += [f"**Task**: {run.task.task if run.task else ''}", f"**Meta Model**: {s.meta_model or 'none'}"]
    lines += [f"**Task Model**: {s.target_model}", f"**Agent impl**: {s.backend}"]
    lines += [f"**Started**: {records[0].time:%Y-%m-%d %H:%M:%S}", f"**Max Generations**: {s.generations + 1}", ""]
    for version in chosen:
        dev, verdict = run.scored(version.name, "dev"), run.verdicts.get(version.name)
        lines += [f"## Generation {version.generation + 1}", "", f"**Version**: {version.name}"]
        lines += [f"**Status**: {'success' if dev else 'failed'}", f"**Lever**: {version.lever or 'first agent'}"]
        lines += [f"**dev**: {dev[-1].score.value:.4f} (n = {dev[-1].score.n})"] if dev else []
        lines += [f"**Verdict**: {verdict.reason}" if verdict else "**Verdict**: none", ""]
    if run.finished:
        lines += ["## Summary", "", f"{run.finished.outcome}: {run.finished.reason}", ""]
    return "\n".join(lines)


def _profiles(run: Run) -> dict[str, Any]:
    s = run.settings
    return {
        "meta": {"agent_impl": s.backend, "model": s.meta_model},
        "target": {"model": s.target_model, "agent_reference": "default"},
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()
