"""The verbs that run services for all runs, and the one that fills the log anew."""

from typing import Annotated

import typer

from sia_events.terminal import Json, Wrong, settings, tell, wait_for


def serve(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Services by name; all when left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run services in the foreground for every run on the stream, until interrupted."""
    from sia_events import app, serving

    known = (*app.SERVICES, *app.LOOPS)
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise Wrong(f"no service {unknown[0]!r}; there are: {', '.join(known)}")
    raise typer.Exit(wait_for(serving.serve(settings(), tuple(names or known), as_json)))


def up(as_json: Json = False) -> None:
    """Start all services in the background; sia run then hands its runs to them."""
    from sia_events import serving

    told = serving.up(settings())
    tell(told, as_json, lambda _: f"services are up: process {told['pid']}; sia down stops them")


def down(as_json: Json = False) -> None:
    """Stop the services that sia up started. Runs stay where they are and go on at the next start."""
    from sia_events import serving

    told = serving.down(settings())
    tell(told, as_json, lambda _: f"stopped process {told['pid']}" if told["pid"] else "no services were up")


def rebuild(
    lose_old: Annotated[
        bool,
        typer.Option("--lose-old-traces", help="Also where tables have what the streams have not: it is lost."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Fill the log anew from the streams; for a log that was lost or damaged. What it alone has is not removed."""
    from sia_events import rebuilding

    runs = wait_for(rebuilding.rebuild(settings(), lose_old))
    tell({"runs": runs}, as_json, lambda _: f"the log is filled anew: {runs} runs")
