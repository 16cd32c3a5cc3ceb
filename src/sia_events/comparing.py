"""Runs side by side: aligned where they part, version against version on the same items, file against file."""

from collections.abc import Sequence
from typing import Any

import msgspec

from sia_events import app, cost
from sia_events.adapters import adapters
from sia_events.errors import Unusable
from sia_events.feedback_svc.gate import compare
from sia_events.reading import file_diffs, records
from sia_events.shared.events import Scored, Split
from sia_events.shared.ports import Blobs
from sia_events.shared.record import Record
from sia_events.shared.run import Run, fold
from sia_events.shared.settings import Settings
from sia_events.shared.tree import load_tree

SCORED: tuple[Split, ...] = ("dev", "gate", "test")


async def compared(settings: Settings, names: Sequence[str]) -> dict[str, Any]:
    """{shared_records, fork, runs, generations, pairs}.

    `fork` is {run, position, generation} of the last record that all runs share, or None; a pair has its own. `runs`
    has what `sia show` has of each. `generations` has a row a generation: the incumbent of each run behind it, with its
    scores by split. `pairs` sets the first run against each other one, final version against final version: {before,
    after, fork, versions, splits: {split: the paired comparison with its flips}, files: {path: diff}, adapters};
    `adapters` has of each of the two what `sia adapters` tells of its own, or None. Raises Unusable for one run alone.
    """
    if len(names) < 2:
        raise Unusable(f"a comparison takes two runs or more; of {names[0]} alone: sia show {names[0]}")
    histories = [await records(settings, name) for name in names]
    runs = [fold(history) for history in histories]
    made = [learned(history, run) for history, run in zip(histories, runs, strict=True)]
    fork = forked(histories)
    shared = fork["position"] if fork else 0
    blobs = app.open_public_blobs(settings)
    return {
        "shared_records": shared,
        "fork": fork,
        "runs": [{**await cost.summary(settings, history), "shared_records": shared} for history in histories],
        "generations": by_generation(runs),
        "pairs": [
            {**await _pair(blobs, runs[0], other), "fork": forked([histories[0], theirs]), "adapters": [made[0], mine]}
            for other, theirs, mine in zip(runs[1:], histories[1:], made[1:], strict=True)
        ],
    }


def common(histories: Sequence[Sequence[Record]]) -> int:
    """How many records the histories begin with together."""
    count = 0
    for column in zip(*histories, strict=False):
        if len({record.id for record in column}) > 1:
            break
        count += 1
    return count


def forked(histories: Sequence[Sequence[Record]]) -> dict[str, Any] | None:
    """{run, position, generation} of the last record that the histories share; None where they share nothing."""
    shared = histories[0][: common(histories)]
    return {"run": shared[-1].run, "position": len(shared), "generation": fold(shared).generation} if shared else None


def by_generation(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a generation: {generation, runs: {name: {version, lever, scores: {split: estimate}} or None}}."""
    rows = []
    for generation in range(max(run.generation for run in runs) + 1):
        cells = {run.name: _incumbent_behind(run, generation) for run in runs}
        rows.append({"generation": generation, "runs": cells})
    return rows


def learned(history: Sequence[Record], run: Run) -> dict[str, Any] | None:
    """How the adapter that the run's final version has was learned, as `sia adapters` tells it; None without one."""
    adapter = run.versions[run.incumbent].weights.adapter if run.incumbent else None
    return next((row for row in reversed(adapters(history)) if row["adapter"] == adapter), None)


def flips(before: Scored, after: Scored, items: Sequence[str], sign: float) -> dict[str, list[dict[str, Any]]]:
    """The items on which two attempts differ: {better, worse: [{item, before, after}]}."""
    found: dict[str, list[dict[str, Any]]] = {"better": [], "worse": []}
    for item, was, now in zip(items, before.items, after.items, strict=True):
        if was != now:
            found["better" if sign * (now - was) > 0 else "worse"].append({"item": item, "before": was, "after": now})
    return found


def _incumbent_behind(run: Run, generation: int) -> dict[str, Any] | None:
    """The version that the run built on behind a generation that it closed; None for one it has not come to."""
    accepted = [
        run.versions[name]
        for name, verdict in run.verdicts.items()
        if verdict.type == "VersionAccepted" and run.versions[name].generation <= generation
    ]
    if generation > run.generation or not accepted:
        return None
    version = accepted[-1]
    scores = {split: run.scored(version.name, split)[-1].score for split in SCORED if run.scored(version.name, split)}
    return {
        "version": version.name,
        "lever": version.lever,
        "new": version.generation == generation,
        "scores": {split: score.model_dump() for split, score in scores.items()},
    }


async def _pair(blobs: Blobs, before: Run, after: Run) -> dict[str, Any]:
    finals = [run.versions[run.incumbent] if run.incumbent else None for run in (before, after)]
    told: dict[str, Any] = {
        "before": before.name,
        "after": after.name,
        "versions": [final and final.name for final in finals],
        "splits": {split: found for split in SCORED if (found := await _paired(blobs, before, after, split))},
    }
    if finals[0] is None or finals[1] is None:
        return {**told, "files": {}}
    old, new = [await load_tree(blobs, final.harness) for final in finals if final]
    return {**told, "files": file_diffs(old, new, before.name, after.name)}


async def _paired(blobs: Blobs, before: Run, after: Run, split: Split) -> dict[str, Any] | None:
    """The two final versions on the same items; None where one has no score there, or where the items are others."""
    scored = [run.scored(run.incumbent or "", split) for run in (before, after)]
    if not all(scored) or before.task is None or after.task is None:
        return None
    one, other = scored[0][-1], scored[1][-1]
    asked = [(task.datasets.get(split), task.answers) for task in (before.task, after.task)]
    if asked[0] != asked[1] or len(one.items) != len(other.items):
        return None
    sign = 1.0 if before.task.maximize else -1.0
    found = compare([sign * item for item in one.items], [sign * item for item in other.items])
    items = await _items(blobs, before.task.datasets.get(split), len(one.items))
    return {**found.model_dump(), "flips": flips(one, other, items, sign)}


async def _items(blobs: Blobs, dataset: str | None, count: int) -> list[str]:
    """The items' ids in the split's order; their numbers where the task's data names none."""
    lines = (await load_tree(blobs, dataset)).get("items.jsonl", b"").splitlines() if dataset else []
    if len(lines) != count:
        return [str(number) for number in range(1, count + 1)]
    return [str(msgspec.json.decode(line)["id"]) for line in lines]
