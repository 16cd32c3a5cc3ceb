"""The verbs that go back in time: a run decided again from the log, or all of them, and the state at a position."""

import json
from typing import Annotated

import typer

from sia_events.terminal import DONE, FAILED, Json, RunName, Wrong, say, settings, tell, wait_for

SPEED, SUBJECT = "1x", "sia.replay.RUN.TYPE"


def replay(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="The run's name, or an unambiguous beginning of it.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All runs, as a regression test of the code.")] = False,
    first: Annotated[
        int | None, typer.Option("--from", min=1, metavar="P", help="Decide again from this position on.")
    ] = None,
    last: Annotated[int | None, typer.Option("--to", min=1, metavar="Q", help="And up to this one.")] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Show every divergence, not the first.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Decide nothing: publish RUN's records on NATS as if they came now.")
    ] = False,
    speed: Annotated[
        str | None, typer.Option(metavar="10x|max", help=f"How fast --publish is; {SPEED} if left out.")
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help=f"Where --publish goes; RUN and TYPE stand for the run and the event. {SUBJECT} if left out.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Decide everything again with today's code and compare. Calls no model and starts no sandbox."""
    from sia_events import broadcasting, replaying
    from sia_events.views import replays

    if (run is None) != every:
        raise Wrong("name a run to replay, or --all for every run")
    if publish:
        if run is None or first is not None or last is not None:
            raise Wrong("--publish takes one whole run")
        if keep_going:
            raise Wrong("--keep-going is for deciding again, and --publish decides nothing: leave one of them out")
        factor = broadcasting.speed_of(SPEED if speed is None else speed)
        work = broadcasting.broadcast(settings(), run, factor, SUBJECT if subject is None else subject)
        tell(
            wait_for(work),
            as_json,
            lambda told: f"{told['records']} records of {told['run']} published to {told['subject']}",
        )
        return
    if speed is not None or subject is not None:
        raise Wrong(f"{'--subject' if speed is None else '--speed'} goes with --publish: add that, or leave it out")
    if run is None:
        if first is not None or last is not None:
            raise Wrong("--from and --to are positions of one run: name it in place of --all")
        all_found = wait_for(replaying.every(settings(), keep_going))
        say(json.dumps(replays.replays_summary(all_found)) if as_json else replays.replays_text(all_found))
        agree = all(not isinstance(each, str) and each.divergence is None for each in all_found.values())
        raise typer.Exit(DONE if agree else FAILED)
    stretch = replaying.Stretch(first or 1, last)
    found = wait_for(replaying.one(settings(), run, stretch, keep_going))
    say(json.dumps(replays.replay_summary(found)) if as_json else replays.replay_text(found))
    raise typer.Exit(FAILED if found.divergence else DONE)


def state(
    run: RunName,
    at: Annotated[
        int | None, typer.Option(min=1, metavar="POSITION", help="After this record; the last if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What RUN stood at after a record: versions, scores, what was under way. --json has every field of the fold."""
    from sia_events import replaying
    from sia_events.views import states

    found = wait_for(replaying.state(settings(), run, at))
    say(json.dumps(states.state_object(found)) if as_json else states.state_text(found))
