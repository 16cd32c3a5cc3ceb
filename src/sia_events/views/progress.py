"""A run as it goes, on stderr: a live panel on a terminal, elsewhere a line a change."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sia_events.shared.events import VersionAccepted
from sia_events.shared.record import Record
from sia_events.shared.run import Run
from sia_events.shared.summary import shown
from sia_events.views.records import news, record_line

Tell = Callable[[Record, Run], None]


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
            if said := news(record.event):
                print(f"{record.time:%H:%M:%S}  {said}", file=sys.stderr, flush=True)

        yield line


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
