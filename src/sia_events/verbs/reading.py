"""The verbs that read the log: all runs, or one of them. They change nothing."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sia_events.terminal import Json, RunName, say, settings, tell, wait_for


def runs(as_json: Json = False) -> None:
    """All runs, oldest first."""
    from sia_events import reading
    from sia_events.views import tables

    tell(wait_for(reading.all_runs(settings())), as_json, tables.runs_table)


def show(run: RunName, as_json: Json = False) -> None:
    """One run: every version with its scores and verdict, the sealed test, the cost."""
    from sia_events import cost, reading
    from sia_events.views import summaries

    async def told() -> dict[str, Any]:
        return await cost.summary(settings(), await reading.records(settings(), run))

    tell(wait_for(told()), as_json, summaries.summary_text)


def cost(run: RunName, as_json: Json = False) -> None:
    """What a run's model calls cost, by role, model and generation, and what is left of its budget."""
    from sia_events import cost
    from sia_events.views import costs

    tell(wait_for(cost.cost(settings(), run)), as_json, costs.cost_text)


def log(
    run: RunName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep printing as records come, to the run's end.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The run's records in order; with --json one CloudEvents object a line, the bytes that are hashed."""
    from sia_events import reading
    from sia_events.shared.record import to_wire
    from sia_events.views import records

    async def printing() -> None:
        async for record in reading.each_record(settings(), run, follow):
            say(to_wire(record).decode() if as_json else records.record_line(record))

    wait_for(printing())


def diff(run: RunName, before: str, after: str, as_json: Json = False) -> None:
    """What changed between two versions: the harness file by file, the adapter, the scores."""
    from sia_events import reading
    from sia_events.views import summaries

    tell(wait_for(reading.diff(settings(), run, before, after)), as_json, summaries.diff_text)


def export(
    run: RunName,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where run_N is made; it must not be there.")],
    as_json: Json = False,
) -> None:
    """Write RUN in SIA's layout, DIR/run_N/gen_G/…: agents, results, trajectories, notes (docs/coming-from-sia.md)."""
    from sia_events import reading

    made = wait_for(reading.export(settings(), run, folder))
    tell({"folder": str(made)}, as_json, lambda told: told["folder"])
