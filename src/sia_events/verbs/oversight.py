"""The verbs by which a person has a say in a run: each records one event."""

from typing import TYPE_CHECKING, Annotated

import typer

from sia_events.terminal import Json, RunName, settings, tell, wait_for

if TYPE_CHECKING:
    from sia_events.oversight import Say

By = Annotated[str | None, typer.Option(metavar="NAME", help="Who says so; the user's name when left out.")]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; it stands in the record.")]


def approve(run: RunName, by: By = None, as_json: Json = False) -> None:
    """Let through what the run waits for a person's approval of."""
    from sia_events import oversight

    _record(run, oversight.approve(by), as_json)


def refuse(run: RunName, reason: Reason = "", by: By = None, as_json: Json = False) -> None:
    """Refuse what the run waits for approval of; its generation is closed and the run goes on."""
    from sia_events import oversight

    _record(run, oversight.refuse(by, reason), as_json)


def pause(run: RunName, reason: Reason = "asked for", as_json: Json = False) -> None:
    """Begin nothing new in the run until it is resumed."""
    from sia_events import oversight

    _record(run, oversight.pause(reason), as_json)


def resume(run: RunName, reason: Reason = "asked for", as_json: Json = False) -> None:
    """Let a paused run go on."""
    from sia_events import oversight

    _record(run, oversight.resume(reason), as_json)


def steer(run: RunName, text: Annotated[str, typer.Argument(metavar="TEXT")], as_json: Json = False) -> None:
    """Tell the run something that its next feedback reads."""
    from sia_events import oversight

    _record(run, oversight.steer(text), as_json)


def cancel(run: RunName, reason: Reason = "asked for", as_json: Json = False) -> None:
    """End the run for good, without a sealed test. What it recorded stays, and can be branched."""
    from sia_events import oversight

    _record(run, oversight.cancel(reason), as_json)


def budget(
    run: RunName,
    usd: Annotated[float | None, typer.Option(help="US dollars, all roles together.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes since the run began.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Prompt and completion tokens.")] = None,
    calls: Annotated[int | None, typer.Option(help="Model calls.")] = None,
    as_json: Json = False,
) -> None:
    """Change the run's limits; a run that has used up its budget goes on."""
    from sia_events import oversight

    _record(run, oversight.budget(usd=usd, minutes=minutes, tokens=tokens, calls=calls), as_json)


def _record(run: str, word: "Say", as_json: bool) -> None:
    from sia_events import oversight

    said = wait_for(oversight.say(settings(), run, word))
    go_on = said["status"] == "running"
    hint = f"; where no services are up, sia run --resume {said['run']} goes on" if go_on else ""
    tell(said, as_json, lambda _: f"{said['event']} is record {said['position']} of {said['run']}{hint}")
