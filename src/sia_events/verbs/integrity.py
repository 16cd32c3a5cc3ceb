"""The verbs that verify what was recorded and keep it: each place held against the others, archives, blobs, figures."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sia_events.terminal import DONE, FAILED, Json, RunName, Wrong, say, settings, tell, wait_for


def verify(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="The run's name, or an unambiguous beginning of it.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All runs, and the streams and blobs as wholes.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Mend from the other places what can be mended.")] = False,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="PLACE", help="Other blobs to repair from: a folder or a URL."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold stream, tables and blobs against each other and the hash chain; exit 1 when something is wrong."""
    from sia_events import verifying
    from sia_events.views import integrity

    if (run is None) != everything:
        raise Wrong("name a run, or give --all")
    if source and not repair:
        raise Wrong("--from names where --repair finds blobs; give both")
    found = wait_for(verifying.verify(settings(), run, repair, source))
    say(json.dumps(found) if as_json else integrity.verify_text(found))
    raise typer.Exit(FAILED if found["left"] else DONE)


def archive(
    run: RunName,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="RUN.sia.tar.zst when left out; it must not be there.")
    ] = None,
    answers: Annotated[
        bool, typer.Option("--answers/--no-answers", help="With the task's answers, which judging needs.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write RUN, with the runs it branched from, to one file: records, traces and blobs (docs/archive.md)."""
    from sia_events import archiving
    from sia_events.views import integrity

    tell(wait_for(archiving.archive_run(settings(), run, file, answers)), as_json, integrity.archive_text)


def restore(file: Annotated[Path, typer.Argument(metavar="FILE")], as_json: Json = False) -> None:
    """Put a run that was archived back, here or on another machine: same ids, same chain. What is there stays."""
    from sia_events import archiving
    from sia_events.views import integrity

    tell(wait_for(archiving.restore(settings(), file)), as_json, integrity.restore_text)


def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it they are only counted.")] = False,
    as_json: Json = False,
) -> None:
    """Blobs that no record, trace or other blob names; none of the last hour, or of a run that is not over."""
    from sia_events import sweeping
    from sia_events.views import integrity

    tell(wait_for(sweeping.sweep(settings(), yes)), as_json, integrity.sweep_text)


def status(
    as_json: Json = False,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="OpenMetrics text, as a monitoring system reads it.")
    ] = False,
) -> None:
    """Who is up, how far the recorder is, how full streams and tables are, and how many dead letters wait."""
    from sia_events import status
    from sia_events.views import integrity

    found = wait_for(status.status(settings()))
    if metrics:
        from sia_events.metrics import metrics_text

        return say(metrics_text(found).rstrip())
    tell(found, as_json, integrity.status_text)
