"""The verbs of `sia bench`: figures of this machine."""

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from sia_events.terminal import Json, say, settings, wait_for

LogPart = Literal["append", "trace", "events", "rows", "replay", "branch"]


def kernels(
    source: Annotated[
        Path | None,
        typer.Argument(exists=True, dir_okay=False, help="A candidate of yours; the shipped ones when left out."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, max=101)] = 9,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """TriMul on the CPU: reference and candidates side by side, checked on fresh inputs, timed from outside."""
    from sia_events import benches

    say(benches.kernels(source, repeats, seed, as_json))


def loop(
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Whole runs on the real model, one a seed.")] = 3,
    quick: Annotated[bool, typer.Option(help="Leave the real-model runs out.")] = False,
    as_json: Json = False,
) -> None:
    """The loop's figures: gain by seed, start, overhead a generation, publish to queryable, disk, --help."""
    from sia_events import benches

    say(wait_for(benches.loop(settings(), seeds, quick, as_json)))


def gateway(
    sia_agent: Annotated[
        Path | None,
        typer.Option(
            metavar="PYTHON",
            envvar="SIA_AGENT_PYTHON",
            exists=True,
            dir_okay=False,
            help="An interpreter that has sia-agent[pydantic-ai]: a generation of it is measured too.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """The gateway's figures: a call beside a direct one, calls a second, first tokens, a budget race, a generation."""
    from sia_events import benches

    say(wait_for(benches.gateway(settings(), sia_agent and sia_agent.absolute(), as_json)))


def learn(
    prompts: Annotated[int, typer.Option(min=1, max=8, help="Prompts of the batch.")] = 4,
    samples: Annotated[int, typer.Option(min=2, max=64, help="Completions of each.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, max=512, help="Tokens of each completion.")] = 8,
    as_json: Json = False,
) -> None:
    """A step of learning and rollouts, beside TRL's and transformers' where they are installed."""
    from sia_events import benches

    say(benches.learn(settings(), (prompts, samples, tokens), as_json))


def log(
    part: Annotated[LogPart | None, typer.Option(help="Measure only this; a part at full size takes minutes.")] = None,
    scale: Annotated[float, typer.Option(min=0.0001, max=1, help="Times the sizes that the goals are for.")] = 1.0,
    as_json: Json = False,
) -> None:
    """The event log at size, beside nats-py, chDB and eventsourcing: streams, tables, replay, branches, a kill."""
    from sia_events import benches

    say(wait_for(benches.log(settings(), (part,) if part else get_args(LogPart), scale, as_json)))
