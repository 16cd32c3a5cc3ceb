"""The run so far as tables: versions with dev scores and verdicts, what each lever cost and gave, what is left.

Nothing of the gate but its verdict and nothing of the sealed test goes in here, not by way of a recorded reason either:
what a prompt tells of those items, the loop would tune on.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime

from sia_events.agents.fit import Part
from sia_events.shared.calls import journal_key
from sia_events.shared.events import (
    Budget,
    ExecutionLogged,
    Lever,
    ProposalFailed,
    VersionAccepted,
    VersionRejected,
    WeightsUpdated,
)
from sia_events.shared.record import Record
from sia_events.shared.run import Run, Version
from sia_events.shared.summary import shown

CELL_CHARS = 160
GAINS = 8
HEAD = (
    "| version | parent | lever | change | dev, 95 % interval | verdict | records |\n"
    "| --- | --- | --- | --- | --- | --- | --- |\n"
)


def versions(run: Run, records: Sequence[Record]) -> list[Part]:
    """A row a version: the accepted ones count most, then the newest."""
    where = _positions(records)
    rows: list[tuple[tuple[bool, int], Part]] = []
    for place, version in enumerate(run.versions.values()):
        accepted = isinstance(run.verdicts.get(version.name), VersionAccepted)
        positions = tuple(sorted(where.get(version.name, ())))
        row = (
            f"| {version.name} | {version.parent or ''} | {version.lever or 'first'} | {_cell(_change(version))} "
            f"| {_dev(run, version)} | {_cell(_verdict(run, version))} | {', '.join(map(str, positions))} |"
        )
        rows.append(((not accepted, -place), Part(row, version.name, place, positions)))
    return [part for _, part in sorted(rows, key=lambda row: row[0])]


def barren(records: Sequence[Record]) -> list[Part]:
    """A line for each generation that had no candidate, the newest first."""
    failures = [(r.position, r.event) for r in records if isinstance(r.event, ProposalFailed)]
    lines = [
        Part(
            f"Generation {failed.generation} ({failed.lever}) had no candidate: {_cell(failed.reason)} "
            f"(record {position}).",
            f"generation {failed.generation}",
            position,
            (position,),
        )
        for position, failed in failures
    ]
    return lines[::-1]


def levers(run: Run, records: Sequence[Record]) -> str:
    """What each lever was given and what came of it; gains over the parent are on dev, towards better."""
    trained = [r.event for r in records if isinstance(r.event, WeightsUpdated)]
    rows = [
        "| lever | generations | candidates | accepted | last gains on dev, generation: best candidate's "
        "| tokens | calls | agent seconds | training seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for lever in ("harness", "weights"):
        generations = sorted({f.generation for f in run.feedback if f.lever == lever and f.generation < run.generation})
        mine = [v for v in run.versions.values() if v.lever == lever]
        accepted = sum(isinstance(run.verdicts.get(v.name), VersionAccepted) for v in mine)
        gains = ", ".join(f"{generation}: {_best_gain(run, generation)}" for generation in generations[-GAINS:])
        spent = [e for e in executions(records) if lever_of(run, e) == lever]
        tokens = sum(e.prompt_tokens + e.completion_tokens for e in spent)
        calls, seconds = sum(e.calls for e in spent), sum(e.seconds for e in spent)
        training = f"{sum(e.seconds for e in trained):.0f}" if lever == "weights" else "0"
        rows.append(
            f"| {lever} | {len(generations)} | {len(mine)} | {accepted} | {gains or 'none yet'} | {tokens:,} "
            f"| {calls:,} | {seconds:.0f} | {training} |"
        )
    return "\n".join(rows)


def remaining(run: Run, records: Sequence[Record], usd: float | None) -> str:
    """The budget's limits and what was used up to the last of the records. `usd` is None where nobody counted it."""
    limits: Budget = run.settings.budget
    spent = executions(records)
    tokens = sum(e.prompt_tokens + e.completion_tokens for e in spent)
    rows = (
        ("generations", run.settings.generations, float(run.generation - 1)),
        ("money, USD", limits.usd, usd),
        ("wall time, minutes", limits.minutes, _minutes(records)),
        ("model tokens", limits.tokens, float(tokens)),
        ("model calls", limits.calls, float(sum(e.calls for e in spent))),
    )
    lines = ["| of | limit | used | left |", "| --- | --- | --- | --- |"]
    for name, limit, used in rows:
        left = "" if limit is None or used is None else _figure(max(0.0, limit - used))
        shown_limit = "none" if limit is None else _figure(limit)
        lines.append(f"| {name} | {shown_limit} | {'not counted here' if used is None else _figure(used)} | {left} |")
    return "\n".join(lines)


def _change(version: Version) -> str:
    edits = ", ".join(version.edits)
    return f"{edits}: {version.reason}" if edits else version.reason


def _dev(run: Run, version: Version) -> str:
    scores = run.scored(version.name, "dev")
    return shown(scores[-1].score) if scores else "none"


def _verdict(run: Run, version: Version) -> str:
    """The verdict by its kind. A reason as recorded may quote figures or failures of the gate, so none is passed on."""
    verdict = run.verdicts.get(version.name)
    if isinstance(verdict, VersionAccepted):
        return "accepted"
    if failure := run.failed(version.name, "dev"):
        return f"refused: failed on dev, {failure.kind}: {failure.message}"
    if failure := run.failed(version.name, "gate"):
        return f"refused: failed on the gate, {failure.kind}"
    if isinstance(verdict, VersionRejected) and verdict.comparison:
        return "refused: no proven gain on the gate"
    return "refused on dev: not the best, or worse than the incumbent" if verdict else "open"


def _best_gain(run: Run, generation: int) -> str:
    sign = 1 if run.task is None or run.task.maximize else -1
    gains: list[float] = []
    for version in run.of_generation(generation):
        own, parents = run.scored(version.name, "dev"), run.scored(version.parent or "", "dev")
        if own and parents:
            gains.append(sign * (own[-1].score.value - parents[-1].score.value))
    return f"{max(gains):+.3f}" if gains else "none"


def executions(records: Sequence[Record]) -> list[ExecutionLogged]:
    """The executions, one an attempt: its last try tells of every call of the earlier ones."""
    logged = (r.event for r in records if isinstance(r.event, ExecutionLogged))
    return list({journal_key(event.attempt): event for event in logged}.values())


def lever_of(run: Run, logged: ExecutionLogged) -> Lever | None:
    """Whose cost an attempt is: rollouts belong to the weights, whichever version was asked for them."""
    if logged.split == "train":
        return "weights"
    version = run.versions.get(logged.version)
    return version.lever if version else None


def _positions(records: Sequence[Record]) -> Mapping[str, set[int]]:
    """Positions of the records that tell of a version: its proposal, its dev score and its verdict."""
    where: dict[str, set[int]] = {}
    for record in records:
        event = record.event
        name = getattr(event, "version", None)
        told = ("AgentProposed", "HarnessPatched", "WeightsUpdated", "VersionAccepted", "VersionRejected")
        on_dev = record.type in ("Scored", "AttemptFailed") and getattr(event, "split", None) == "dev"
        if isinstance(name, str) and (record.type in told or on_dev):
            where.setdefault(name, set()).add(record.position)
    return where


def _minutes(records: Sequence[Record]) -> float:
    """Wall time by the records' stamps; a branch stands idle behind its parent until somebody opens it."""
    spans: dict[str, list[datetime]] = {}
    for record in records:
        spans.setdefault(record.run, []).append(record.time)
    return sum((times[-1] - times[0]).total_seconds() for times in spans.values()) / 60


def _figure(value: float) -> str:
    return f"{value:,.2f}".rstrip("0").rstrip(".")


def _cell(text: str) -> str:
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= CELL_CHARS else flat[: CELL_CHARS - 1] + "…"
