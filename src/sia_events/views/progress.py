"""A run as it goes, on stderr: a live panel on a terminal, elsewhere a line a change and now and then a step's."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sia_events.shared.events import ProposalFailed, ServiceFailed, VersionAccepted, WeightsUpdated
from sia_events.shared.record import Record
from sia_events.shared.run import Run
from sia_events.shared.summary import shown
from sia_events.views.records import news, record_line

Step = Mapping[str, Any]
"""A line of the learner's, as the trace has it."""

STEP_EVERY_S = 10.0
LEARNED = (WeightsUpdated, ProposalFailed, ServiceFailed)
"""What ends learning."""


@dataclass(frozen=True)
class Screen:
    """Where a run is told of: `tell` takes each record with the state behind it, `step` the learner's newest step."""

    tell: Callable[[Record, Run], None]
    step: Callable[[Step], None]


@contextmanager
def progress(name: str, quiet: bool) -> Iterator[Screen]:
    """On a terminal one live panel; elsewhere a line a change, and a step of learning at most every STEP_EVERY_S."""
    console = Console(stderr=True)
    if quiet:
        yield Screen(lambda record, run: None, lambda step: None)
    elif console.is_terminal:
        with _live(name, console) as screen:
            yield screen
    else:
        yield _lines()


@contextmanager
def _live(name: str, console: Console) -> Iterator[Screen]:
    told: list[str] = []
    latest, newest = Run(), ""
    started = time.monotonic()

    def tell(record: Record, run: Run) -> None:
        nonlocal latest, newest
        latest = run
        told.append(record_line(record))
        if isinstance(record.event, LEARNED):
            newest = ""

    def step(line: Step) -> None:
        nonlocal newest
        newest = f"learning: {step_text(line)}"

    def drawn() -> Panel:
        return _panel(name, latest, newest, told[-8:], started)

    with Live(get_renderable=drawn, console=console, refresh_per_second=4, transient=True):
        yield Screen(tell, step)


def _lines() -> Screen:
    last = -STEP_EVERY_S

    def tell(record: Record, run: Run) -> None:
        if said := news(record.event):
            print(f"{record.time:%H:%M:%S}  {said}", file=sys.stderr, flush=True)

    def step(line: Step) -> None:
        nonlocal last
        if time.monotonic() - last >= STEP_EVERY_S:
            last = time.monotonic()
            print(f"{datetime.now(UTC):%H:%M:%S}  learning: {step_text(line)}", file=sys.stderr, flush=True)

    return Screen(tell, step)


def step_text(line: Step) -> str:
    """A step of learning in one line; what the learner did not tell of is left out."""
    told = [
        f"{word} {line[name]:{form}}"
        for name, word, form in (
            ("reward", "reward", ".3f"),
            ("held_out_last", "held out", ".3f"),
            ("loss", "loss", ".4f"),
            ("kl", "KL", ".4f"),
            ("entropy", "entropy", ".3f"),
            ("clip_fraction", "clipped", ".1%"),
        )
        if name in line
    ]
    return "   ".join([f"step {line['step']} of {line['steps']}", *told, f"{line['tokens_per_second']:,.0f} tokens/s"])


def _panel(name: str, run: Run, step: str, told: Sequence[str], started: float) -> Panel:
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
    below = [step, ""] if step else []
    return Panel(
        Group(head, "", table, "", *below, Text("\n".join(told), style="dim", no_wrap=True)), title=f"sia run {name}"
    )


def _last(run: Run, version: str, split: str) -> str:
    scored = run.scored(version, split)
    return shown(scored[-1].score) if scored else ""
