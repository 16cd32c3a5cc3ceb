"""The verbs that give a run: a new one, one to go on with, one of SIA's."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sia_events.terminal import DONE, Json, Wrong, pairs, say, settings, tell, wait_for

if TYPE_CHECKING:
    from sia_events.shared.events import RunSettings

Backend = Literal["builtin", "direct", "agentic", "claude", "openhands"]
Autonomy = Literal["full", "approve-weights", "approve-each"]
Lever = Literal["auto", "harness", "weights", "alternate", "random"]
Search = Literal["line", "best-of-k", "archive"]


def run(
    task: Annotated[
        str | None, typer.Argument(metavar="TASK", help="A built-in task or the folder of your own.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--run", metavar="NAME", help="The run's name; the next free rN when left out.")
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="Go on with an unfinished run.")] = None,
    generations: Annotated[int, typer.Option(min=1, max=1000, help="Generations after the first agent.")] = 3,
    candidates: Annotated[int, typer.Option(min=1, max=26, help="Harness candidates a generation, side by side.")] = 3,
    lever: Annotated[Lever, typer.Option(help="What a generation may change; all but auto are controls.")] = "auto",
    search: Annotated[Search, typer.Option(help="Which version each harness candidate starts from.")] = "line",
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=2**31 - 1,
            help="Seed of everything that is drawn. Repeats lie 10000 apart: a generation adds its number.",
        ),
    ] = 0,
    target_model: Annotated[
        str | None, typer.Option(metavar="M", help="The agent's model, provider/name; the embedded one if left out.")
    ] = None,
    meta_model: Annotated[
        str | None, typer.Option(metavar="M", help="The model of the meta- and, unless named, the feedback-agent.")
    ] = None,
    feedback_model: Annotated[str | None, typer.Option(metavar="M", help="The feedback-agent's model.")] = None,
    backend: Annotated[
        Backend | None, typer.Option(help="Who writes harnesses; direct where a meta model is named, else builtin.")
    ] = None,
    budget_usd: Annotated[float | None, typer.Option(metavar="X", help="US dollars the run may spend.")] = None,
    budget_minutes: Annotated[float | None, typer.Option(metavar="X", help="Minutes the run may take.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(metavar="N", help="Tokens the run may use.")] = None,
    budget_calls: Annotated[int | None, typer.Option(metavar="N", help="Model calls the run may make.")] = None,
    autonomy: Annotated[Autonomy, typer.Option(help="What a person has to approve first.")] = "full",
    steer: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What every feedback of the run has to read.")
    ] = None,
    sandbox: Annotated[
        Literal["bubblewrap", "process"], typer.Option(help="process is UNSAFE: the agent's code runs as you.")
    ] = "bubblewrap",
    reference: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Start from this agent, a file or a folder; not the task's.")
    ] = None,
    entry: Annotated[
        str | None, typer.Option(metavar="FILE", help="The program in --reference PATH; target_agent.py if left out.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of the run (docs/configuration.md)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the run would cost, and start nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Improve an agent for TASK. The same command, or --resume NAME, goes on after a stop or a crash."""
    from sia_events import driver, roles
    from sia_events.run_settings import merged
    from sia_events.shared.events import RunSettings

    asked = {"generations": generations, "candidates": candidates, "lever": lever, "search": search, "seed": seed}
    limits = {"usd": budget_usd, "minutes": budget_minutes, "tokens": budget_tokens, "calls": budget_calls}
    named = {"target_model": target_model, "meta_model": meta_model, "feedback_model": feedback_model}
    chosen = {**roles.cast(settings(), named, backend), "sandbox": sandbox, "autonomy": autonomy}
    wanted = merged(RunSettings(), {**asked, **chosen, "budget": limits, **pairs(set_)})
    if (task is None) == (resume is None):
        raise Wrong("name a task to start a run, or --resume NAME to go on with one (sia tasks list, sia runs)")
    if task is not None:
        _tell_costs(task, name, wanted, dry_run, as_json)
    elif dry_run:
        raise Wrong(f"--dry-run is for a run that is not there yet; sia cost {resume} tells what {resume} has cost")
    first = (reference, entry)
    work = driver.run(settings(), task, resume or name, wanted, resume is not None, as_json, first, steer)
    raise typer.Exit(wait_for(work))


def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="A runs/run_N of SIA's.")],
    name: Annotated[
        str | None, typer.Option("--run", metavar="NAME", help="Its name here; the folder's if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a run of SIA's into the log, as a run that is over: its scores as reported, no verdicts."""
    from sia_events import driver

    told = wait_for(driver.import_run(settings(), folder, name))
    said = f"{told['run']}: {told['versions']} versions, {told['records']} records; sia show {told['run']}"
    tell(told, as_json, lambda _: said)


def _tell_costs(task: str, name: str | None, wanted: "RunSettings", dry_run: bool, as_json: bool) -> None:
    """What a run that is not there yet will cost: on stderr where somebody bills it; a dry run ends with it."""
    from sia_events import estimate
    from sia_events.views import costs

    told = wait_for(estimate.before(settings(), task, name, wanted))
    if dry_run:
        if told is None:
            raise Wrong(f"run {name} is there already; sia cost {name} tells what it has cost")
        say(json.dumps(estimate.as_object(told)) if as_json else costs.estimate_text(told))
        raise typer.Exit(DONE)
    if told and told.lines:
        print(f"sia: {costs.estimate_text(told)}", file=sys.stderr)
