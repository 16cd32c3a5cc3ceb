"""The verbs of `sia experiment`: many runs under one question, and a report of what they show."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from sia_events.terminal import DONE, FAILED, Json, Wrong, pairs, settings, tell, wait_for

POLICIES = "auto,harness,weights,alternate,random"


def levers(
    task: Annotated[str, typer.Option(metavar="TASK", help="A built-in task or the folder of your own.")],
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each policy.")] = 5,
    generations: Annotated[int, typer.Option(min=1, max=1000, help="Generations of each run.")] = 3,
    policies: Annotated[
        str, typer.Option(metavar="P,P", help="Lever policies; the first is compared with the others.")
    ] = POLICIES,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", file_okay=False, help="Where the report goes; levers-TASK if left out."),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option("--run", metavar="NAME", help="What its runs' names begin with; levers-TASK.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of all its runs (docs/configuration.md)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run lever policies on TASK, every seed of each, and report what they show. The same command goes on."""
    from sia_events import experiment
    from sia_events.run_settings import merged
    from sia_events.shared.events import LeverPolicy, RunSettings

    known = get_args(LeverPolicy)
    named = [policy.strip() for policy in policies.split(",")]
    if wrong := [policy for policy in named if policy not in known]:
        raise Wrong(f"no lever policy {wrong[0]!r}; there are: {', '.join(known)}")
    if len(set(named)) < len(named):
        raise Wrong(f"--policies {policies}: each policy once")
    changes = pairs(set_)
    if taken := {"lever", "generations"} & changes.keys():
        raise Wrong(f"--set {min(taken)}: --policies and --generations say it here")
    wanted = merged(RunSettings(), {"generations": generations, **changes})
    chosen: list[LeverPolicy] = [policy for policy in known if policy in named]
    chosen.sort(key=named.index)
    work = experiment.levers(settings(), task, chosen, seeds, wanted, prefix, out, as_json)
    found = wait_for(work)
    tell(found, as_json, lambda told: "\n".join([*told["shows"], f"report: {told['folder']}/report.md"]))
    raise typer.Exit(FAILED if found["left_out"] else DONE)
