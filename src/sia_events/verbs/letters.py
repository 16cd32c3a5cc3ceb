"""The verbs on dead letters: what a service gave up on."""

from typing import Annotated

import typer

from sia_events.terminal import Json, RunName, settings, tell, wait_for

Position = Annotated[int, typer.Argument(metavar="POSITION", help="The letter's position in the run, as listed.")]


def letters_list(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="One run's letters; else those of all.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also those that are answered or dropped.")] = False,
    as_json: Json = False,
) -> None:
    """The open dead letters."""
    from sia_events import dead_letters
    from sia_events.views import integrity

    tell(wait_for(dead_letters.listed(settings(), run, everything)), as_json, integrity.letters_table)


def letters_show(run: RunName, position: Position, as_json: Json = False) -> None:
    """A dead letter: who gave up, why, and what it was given."""
    from sia_events import dead_letters
    from sia_events.views import integrity

    tell(wait_for(dead_letters.shown(settings(), run, position)), as_json, integrity.letter_text)


def letters_retry(run: RunName, position: Position, as_json: Json = False) -> None:
    """Give the record to its service once more, with all its tries."""
    from sia_events import dead_letters
    from sia_events.views import integrity

    tell(wait_for(dead_letters.retry(settings(), run, position)), as_json, integrity.retry_text)


def letters_drop(
    run: RunName,
    position: Position,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; it stands in the record.")] = "",
    by: Annotated[str | None, typer.Option(metavar="NAME", help="Who says so; the user's name when left out.")] = None,
    as_json: Json = False,
) -> None:
    """Give up for good what the letter is about. Nothing is deleted: this is an event, and the letter stays."""
    from sia_events import dead_letters

    said = wait_for(dead_letters.drop(settings(), run, position, by, reason))
    tell(said, as_json, lambda _: f"{said['event']} is record {said['position']} of {said['run']}")
