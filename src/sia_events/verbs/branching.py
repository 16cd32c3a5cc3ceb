"""The verb that branches a run."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sia_events.terminal import Json, RunName, Wrong, pairs, settings, wait_for

Lever = Literal["auto", "harness", "weights", "alternate", "random"]


def branch(
    run: RunName,
    at: Annotated[
        int | None, typer.Option(min=0, metavar="GEN", help="Go on behind this generation's verdict.")
    ] = None,
    at_position: Annotated[
        int | None,
        typer.Option(min=1, metavar="P", help="Go on behind this record, amid what was under way."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="What is different in the branch, e.g. lever=weights."),
    ] = None,
    lever: Annotated[Lever | None, typer.Option(help="Another lever policy.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="M", help="Another model of the agent: the next generation's candidate.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Another seed.")] = None,
    replace_harness: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", exists=True, file_okay=False, help="A harness of your own: the next generation's candidate."
        ),
    ] = None,
    replace_feedback: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help='Feedback of your own for the next generation: {"lever": …, "algorithm": …, "reasons": […]}.',
        ),
    ] = None,
    steer: Annotated[str | None, typer.Option(metavar="TEXT", help="What every feedback of it has to read.")] = None,
    repeats: Annotated[int, typer.Option("--n", min=1, max=100, help="As many branches, a seed each.")] = 1,
    control: Annotated[bool, typer.Option("--control", help="First a branch that changes nothing.")] = False,
    name: Annotated[
        str | None, typer.Option("--run", metavar="NAME", help="The branch's name; several are NAME-1, NAME-2 …")
    ] = None,
    no_go: Annotated[
        bool, typer.Option("--no-go", help="Only open the branch; sia run --resume NAME goes on with it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """A new run that shares RUN's history up to a point and goes on with something changed. Nothing is copied."""
    from sia_events import branching

    if (at is None) == (at_position is None):
        raise Wrong("say where: --at GEN behind a generation's verdict, or --at-position P behind any record")
    if steer is not None and not steer.strip():
        raise Wrong("--steer has no text: say what every feedback has to read, or leave it out")
    overrides = pairs(set_)
    for option, key, value in (
        ("--lever", "lever", lever),
        ("--model", "target_model", model),
        ("--seed", "seed", seed),
    ):
        if value is None:
            continue
        if key in overrides:
            raise Wrong(f"{option} {value} and --set {key}={overrides[key]}: say {key} once")
        overrides[key] = value
    feedback = branching.read_feedback(replace_feedback) if replace_feedback else None
    change = branching.Change(overrides, replace_harness, feedback, steer)
    work = branching.branch(
        settings(), run, at, at_position, change, name, repeats, control, go=not no_go, as_json=as_json
    )
    raise typer.Exit(wait_for(work))
