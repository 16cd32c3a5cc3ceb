"""What people see: a run as it goes, and as it ended; tables, fixed width, times UTC."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sia_events.shared.events import (
    AgentProposed,
    AttemptFailed,
    AttemptRequested,
    Event,
    ExecutionLogged,
    FeedbackGiven,
    HarnessPatched,
    ProposalFailed,
    RunBranched,
    RunFinished,
    RunStarted,
    Scored,
    ServiceFailed,
    TaskRegistered,
    VersionAccepted,
    VersionRejected,
    WeightsUpdated,
    WeightUpdateRequested,
)
from sia_events.shared.record import Record
from sia_events.shared.replay import Replayed
from sia_events.shared.run import Run
from sia_events.shared.summary import shown

Tell = Callable[[Record, Run], None]
NOT_HELD_OUT = "  SCORE IS NOT HELD OUT: dev, gate and test are the same set (docs/coming-from-sia.md)"
CONTROL = {c: None for c in (*range(32), 127, *range(128, 160)) if c not in (9, 10)}


@contextmanager
def progress(name: str, quiet: bool) -> Iterator[Tell]:
    """On a terminal one live panel, elsewhere one line a change; both on stderr."""
    console = Console(stderr=True)
    if quiet:
        yield lambda record, run: None
    elif console.is_terminal:
        told: list[str] = []
        latest = Run()
        started = time.monotonic()

        def drawn() -> Panel:
            return _panel(name, latest, told[-8:], started)

        with Live(get_renderable=drawn, console=console, refresh_per_second=4, transient=True):

            def tell(record: Record, run: Run) -> None:
                nonlocal latest
                latest = run
                told.append(record_line(record))

            yield tell
    else:

        def line(record: Record, run: Run) -> None:
            if said := _change(record.event):
                print(f"{record.time:%H:%M:%S}  {said}", file=sys.stderr, flush=True)

        yield line


def record_line(record: Record) -> str:
    """One record on one line: position, time, producer, type, what it says."""
    said = _change(record.event) or _rest(record.event)
    at = f"{record.time:%H:%M:%S}.{record.time.microsecond // 1000:03d}"
    return clean(f"{record.position:>5}  {at}  {record.producer:<14}{record.type:<22}{said}")


def clean(text: str) -> str:
    """Text from models and agents without the characters that steer a terminal."""
    return text.translate(CONTROL)


def _change(event: Event) -> str:
    """What a person following a run is told of an event; empty for what is of no news."""
    match event:
        case TaskRegistered():
            sizes = ", ".join(f"{split} {n}" for split, n in event.sizes.items())
            return f"task {event.task}: {event.title} ({event.metric}; {sizes})"
        case RunStarted():
            s = event.settings
            plan = f"{s.generations} generations, {s.candidates} candidates, lever {s.lever}, seed {s.seed}"
            return f"started: {plan}, {s.target_model}"
        case RunBranched():
            return (
                f"branch of {event.parent} behind generation {event.generation}: {event.overrides or 'nothing changed'}"
            )
        case AgentProposed():
            return f"{event.version}: {event.reason}"
        case HarnessPatched():
            return f"{event.version} from {event.parent}: {' + '.join(event.edits)}"
        case WeightUpdateRequested():
            return f"learning from {event.parent}'s rollouts ({event.algorithm})"
        case WeightsUpdated():
            learned = f"adapter learned on {event.rollouts} rollouts, {event.seconds:.0f} s"
            return f"{event.version} from {event.parent}: {learned}"
        case Scored():
            return f"{event.version} on {event.split}: {shown(event.score)}"
        case AttemptFailed():
            return f"{event.version} on {event.split} failed: {event.kind}: {event.message}"
        case VersionAccepted():
            return f"{event.version} accepted: {event.reason}"
        case VersionRejected():
            return f"{event.version} rejected: {event.reason}"
        case FeedbackGiven():
            return f"generation {event.generation}: {event.lever}: {'; '.join(event.reasons)}"
        case ProposalFailed():
            return f"generation {event.generation}: no {event.lever} candidate: {event.reason}"
        case ServiceFailed():
            return f"{event.service} gave up after {event.tries} tries: {event.error}"
        case RunFinished():
            return f"finished: {event.outcome}: {event.reason}"
        case _:
            return ""


def _rest(event: Event) -> str:
    match event:
        case AttemptRequested():
            return f"{event.attempt}" + (f", {event.samples} samples an item" if event.samples > 1 else "")
        case ExecutionLogged():
            tokens = event.prompt_tokens + event.completion_tokens
            return f"{event.attempt}: {event.calls} calls, {tokens} tokens, {event.seconds:.1f} s"
        case _:
            return ", ".join(
                f"{k} {v}" for k, v in event.model_dump(exclude={"type"}).items() if isinstance(v, str | int)
            )


def _panel(name: str, run: Run, told: Sequence[str], started: float) -> Panel:
    elapsed = time.monotonic() - started
    closed = max(0, run.generation - 1) + (run.finished is not None)
    total = run.settings.generations
    left = f", about {elapsed / closed * (total - closed):.0f} s left" if closed else ""
    lever = run.feedback[-1].lever if run.feedback else "first agent"
    ended = [*run.executions.values(), *run.failures.values()]
    calls, usd = sum(e.calls for e in ended), sum(e.usd or 0.0 for e in ended)
    spend = f"{calls:,} calls, {usd:.2f} USD"
    head = f"generation {run.generation} of {total}   lever {lever}   {spend}   {elapsed:.0f} s{left}"
    table = Table(box=None, pad_edge=False)
    for column in ("version", "lever", "dev", "gate", "verdict"):
        table.add_column(column)
    for version in list(run.versions.values())[-10:]:
        verdict = run.verdicts.get(version.name)
        mark = "" if verdict is None else ("accepted" if isinstance(verdict, VersionAccepted) else "rejected")
        cells = [_last(run, version.name, split) for split in ("dev", "gate")]
        style = "bold" if version.name == run.incumbent else ""
        table.add_row(version.name, version.lever or "-", *cells, mark, style=style)
    return Panel(Group(head, "", table, "", Text("\n".join(told), style="dim", no_wrap=True)), title=f"sia run {name}")


def _last(run: Run, version: str, split: str) -> str:
    scored = run.scored(version, split)
    return shown(scored[-1].score) if scored else ""


def ending_text(summary: Mapping[str, Any], home: Path) -> str:
    """How a run ended: sealed scores, what each lever gave, where it is, what to do next."""
    run, sealed = summary["run"], summary["sealed"]
    lines = ["", f"run {run}: {summary['outcome'] or summary['status']}"]
    if not summary["held_out"]:
        lines.append(NOT_HELD_OUT)
    if sealed:
        lines += [
            f"  sealed test, {sealed['final']['n']} items, scored once:",
            f"    first   {shown(sealed['first'])}   {summary['generations'][0]['version']}",
            f"    final   {shown(sealed['final'])}   {summary['best']}",
            f"    gain    {_gain(sealed)}   p = {sealed['p_value']:.2g}",
        ]
        if summary["chance"] is not None:
            lines.append(f"    chance  {summary['chance']:.3f}   one answer for every item")
    if summary["outcome"] == "no proven gain":
        lines.append(
            "  No gain could be shown. The final agent is no worse than the first by the gate, and no better by proof."
        )
    if summary["outcome"] == "failed":
        lines.append(f"  {summary['reason']}")
    for lever, gave in summary["levers"].items():
        if gave["tried"]:
            lines.append(
                f"  {lever:<8} {gave['accepted']} of {gave['tried']} versions accepted, {gave['gain']:+.3f} on the gate"
            )
    lines += [f"  {_spent(summary['cost'])}, {summary['records']} records", f"  kept in {home}"]
    lines += ["", "next:", *(f"  {command:<43} {why}" for command, why in _next(summary))]
    return "\n".join(lines)


def _spent(cost: Mapping[str, Any]) -> str:
    calls, tokens = f"{cost['model_calls']:,} model calls", f"{cost['tokens']:,} tokens"
    dollars = "price unknown" if cost["usd"] is None else f"{cost['usd']:.2f} USD"
    return f"{calls}, {tokens}, {dollars}, {cost['seconds']:.0f} s"


def _next(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Commands worth trying behind such an end, and what each does."""
    run = summary["run"]
    if not summary["sealed"]:
        return [
            (f"sia show {run}", "how far it came"),
            (f"sia log {run}", "what happened, record by record"),
            (f"sia run --resume {run}", "go on, if it is not over"),
            ("sia doctor", "what works here, and how to mend what does not"),
        ]
    other = "harness" if summary["lever"] == "weights" else "weights"
    change = f"lever={other}" if summary["settings"]["target_model"].startswith("local/") else "seed=1"
    why = "under the other lever" if change.startswith("lever") else "with other chances"
    first = summary["generations"][0]["version"]
    return [
        (f"sia show {run}", "every version, its scores and its verdict"),
        (f"sia replay {run}", "decide it all again from the log, calling nothing"),
        (f"sia branch {run} --at 1 --set {change}", f"go on from generation 1 {why}"),
        (f"sia diff {run} {first} {summary['best']}", "what changed between first and best"),
    ]


def runs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "no runs yet: sia run words starts one"
    cells = [
        (r["run"], r["task"], r["status"], r["generations"], r["best"], r["outcome"], r["records"], r["started"][:19])
        for r in rows
    ]
    return _table(("run", "task", "status", "generation", "best", "outcome", "records", "started (UTC)"), cells)


def tasks_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [(r["task"], r["title"], r["metric"], ", ".join(f"{s} {n}" for s, n in r["splits"].items())) for r in rows]
    return _table(("task", "title", "metric", "items"), cells)


def summary_text(summary: Mapping[str, Any]) -> str:
    """`sia show` for people."""
    head = f"run {summary['run']}   task {summary['task']}   {summary['status']}   {summary['records']} records"
    if summary["parent"]:
        head += f"   branch of {summary['parent']}"
    if summary["chance"] is not None:
        head += f"   chance {summary['chance']:.3f}"
    cells = [
        (
            v["generation"],
            v["version"],
            v["parent"],
            v["lever"],
            _score(v, "dev"),
            _score(v, "gate"),
            _score(v, "test"),
            _verdict(v),
        )
        for v in summary["generations"]
    ]
    lines = [head, "", _table(("gen", "version", "from", "lever", "dev", "gate", "sealed test", "verdict"), cells)]
    if summary["outcome"]:
        lines += ["", f"{summary['outcome']}: {summary['reason']}"]
    if not summary["held_out"]:
        lines.append(NOT_HELD_OUT)
    for failure in summary["service_failures"]:
        lines += [f"{failure['service']} gave up: {failure['error']} (payload {failure['payload'][:12]})"]
    return clean("\n".join([*lines, "", _spent(summary["cost"])]))


def compare_text(compared: Sequence[Mapping[str, Any]]) -> str:
    """`sia compare` for people: a row a run, then the incumbent's gate score by generation."""
    cells = [
        (
            s["run"],
            s["lever"],
            s["status"],
            s["best"],
            *(
                (shown(s["sealed"]["first"]), shown(s["sealed"]["final"]), f"{s['sealed']['p_value']:.2g}")
                if s["sealed"]
                else ("", "", "")
            ),
            f"{s['cost']['model_calls']:,}",
            f"{s['cost']['seconds']:.0f}",
        )
        for s in compared
    ]
    table = _table(("run", "lever", "status", "best", "first, sealed", "final, sealed", "p", "calls", "seconds"), cells)
    paths = [_path(s) for s in compared]
    depth = max((len(path) for path in paths), default=0)
    rows = [(g, *(path[g] if g < len(path) else "" for path in paths)) for g in range(depth)]
    by_generation = _table(("gen", *(str(s["run"]) for s in compared)), rows)
    shared = compared[0]["shared_records"]
    note = f"the first {shared} records are shared" if shared else "nothing is shared: these are separate runs"
    return f"{table}\n\naccepted version and its gate score, by generation; {note}\n{by_generation}"


def _path(summary: Mapping[str, Any]) -> list[str]:
    path: list[str] = []
    for version in summary["generations"]:
        while len(path) <= version["generation"]:
            path.append(path[-1] if path else "")
        if version["accepted"]:
            lever = f" {version['lever']}" if version["lever"] else ""
            path[version["generation"]] = f"{version['version']}{lever} {_score(version, 'gate')}"
    return path


def diff_text(changes: Mapping[str, Any]) -> str:
    lines = [f"run {changes['run']}: {changes['before']} -> {changes['after']}"]
    lines += [f"  {name:<6}{_made(version)}" for name, version in changes["versions"].items()]
    for name, scores in changes["scores"].items():
        lines.append(f"  {name:<6}" + "  ".join(f"{split} {shown(score)}" for split, score in scores.items()))
    if gains := changes["gains"]:
        lines.append("  gain  " + "  ".join(f"{split} {_gain(gain)}" for split, gain in gains.items()))
    old, new = changes["adapters"]
    lines.append(
        f"  adapter {(old or 'none')[:12]} -> {(new or 'none')[:12]}"
        if old != new
        else f"  same adapter: {(old or 'none')[:12]}"
    )
    for text in changes["files"].values():
        lines += ["", text]
    if not changes["files"]:
        lines.append("  same harness")
    return clean("\n".join(lines))


def _made(version: Mapping[str, Any]) -> str:
    if not version["parent"]:
        return "first agent"
    return f"{version['lever']} of {version['parent']}" + (
        f": {' + '.join(version['edits'])}" if version["edits"] else ""
    )


def _gain(compared: Mapping[str, Any]) -> str:
    return f"{compared['gain']:+.3f} [{compared['low']:+.3f}, {compared['high']:+.3f}]"


def replay_summary(found: Replayed) -> dict[str, Any]:
    """{records, decisions, performed, pending, diverged, first_divergence}."""
    first = found.divergence
    return {
        "records": found.records,
        "decisions": found.decisions,
        "performed": found.performed,
        "pending": found.pending,
        "diverged": first is not None,
        "first_divergence": first
        and {
            "position": first.cause.position,
            "cause": str(first.cause.id),
            "type": first.cause.type,
            "service": first.service,
            "reason": first.reason,
            "recorded": [event.model_dump(mode="json") for event in first.recorded],
            "decided": [event.model_dump(mode="json") for event in first.decided],
        },
    }


def replay_text(found: Replayed) -> str:
    first = found.divergence
    if first is None:
        owed = f", {found.pending} still owed by an unfinished run" if found.pending else ""
        read = f"{found.performed} performances read from the log"
        return f"{found.records} records, {found.decisions} decisions agree, {read}{owed}"
    lines = [
        f"record {first.cause.position} of {found.records}: {first.service} about {first.cause.type}: {first.reason}"
    ]
    lines += [f"  recorded  {_event(event)}" for event in first.recorded] or ["  recorded  nothing"]
    lines += [f"  decided   {_event(event)}" for event in first.decided] or ["  decided   nothing"]
    return clean("\n".join(lines))


def doctor_text(checks: Sequence[Any]) -> str:
    marks = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
    lines: list[str] = []
    for check in checks:
        lines.append(f"{marks[check.status]}  {check.name:<20}{check.detail}")
        if check.fix:
            lines.append(f"{'':<26}mend: {check.fix}")
    return "\n".join(lines)


def _event(event: Event) -> str:
    return f"{type(event).__name__} {event.model_dump_json(exclude={'type'})}"


def _score(version: Mapping[str, Any], split: str) -> str:
    return shown(version["scores"][split]) if split in version["scores"] else ""


def _verdict(version: Mapping[str, Any]) -> str:
    if version["accepted"] is None:
        return "open"
    return ("accepted: " if version["accepted"] else "rejected: ") + version["verdict"]


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = [[("" if cell is None else str(cell)) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[i]) for row in text) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in text
    )
