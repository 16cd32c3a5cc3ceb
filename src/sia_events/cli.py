"""The verbs of `sia`: parses and prints, decides nothing."""

import json
import re
import shlex
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import typer

from sia_events import sia_spelling

DONE, FAILED, USAGE = 0, 1, 2
T = TypeVar("T")

cli = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: the boxed one takes longer to import than everything else of `sia --help`.
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
    help="An AI agent that gets better at a task by itself. "
    "Every step is an event: nothing is lost, every run replays.",
)
tasks = typer.Typer(no_args_is_help=True, help="The tasks there are, and whether a folder is one.")
bench = typer.Typer(no_args_is_help=True, help="Figures, each beside what it is compared with, in one run.")
cli.add_typer(tasks, name="tasks")
cli.add_typer(bench, name="bench")

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of text.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run's name, or an unambiguous beginning of it.")]
# Rows of the provider table that profiles in SIA's spelling brought to this process.
_PROVIDERS: dict[str, dict[str, str]] = {}
By = Annotated[str | None, typer.Option(metavar="NAME", help="Who says so; the user's name when left out.")]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; it stands in the record.")]
Backend = Literal["builtin", "direct", "agentic", "claude", "openhands"]
Autonomy = Literal["full", "approve-weights", "approve-each"]
Lever = Literal["auto", "harness", "weights", "alternate", "random"]


class Wrong(Exception):
    """What was asked for cannot be done as asked; the message says why and what to do."""


@cli.command()
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
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of everything that is drawn.")] = 0,
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
    steer_: Annotated[
        str | None, typer.Option("--steer", metavar="TEXT", help="What every feedback of the run has to read.")
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

    wanted = {"generations": generations, "candidates": candidates, "lever": lever, "seed": seed}
    limits = {"usd": budget_usd, "minutes": budget_minutes, "tokens": budget_tokens, "calls": budget_calls}
    named = {"target_model": target_model, "meta_model": meta_model, "feedback_model": feedback_model}
    chosen = {**roles.cast(_settings(), named, backend), "sandbox": sandbox, "autonomy": autonomy}
    settings = _run_settings({**wanted, **chosen, "budget": limits}, set_)
    if (task is None) == (resume is None):
        raise Wrong("name a task to start a run, or --resume NAME to go on with one (sia tasks list, sia runs)")
    if task is not None:
        _tell_costs(task, name, settings, dry_run, as_json)
    elif dry_run:
        raise Wrong(f"--dry-run is for a run that is not there yet; sia cost {resume} tells what {resume} has cost")
    first = (reference, entry)
    work = driver.run(_settings(), task, resume or name, settings, resume is not None, as_json, first, steer_)
    raise typer.Exit(_await(work))


@cli.command()
def approve(run: RunName, by: By = None, as_json: Json = False) -> None:
    """Let through what the run waits for a person's approval of."""
    from sia_events import oversight

    _say(run, oversight.approve(by), as_json)


@cli.command()
def refuse(run: RunName, reason: Reason = "", by: By = None, as_json: Json = False) -> None:
    """Refuse what the run waits for approval of; its generation is closed and the run goes on."""
    from sia_events import oversight

    _say(run, oversight.refuse(by, reason), as_json)


@cli.command()
def pause(run: RunName, reason: Reason = "asked for", as_json: Json = False) -> None:
    """Begin nothing new in the run until it is resumed."""
    from sia_events import oversight

    _say(run, oversight.pause(reason), as_json)


@cli.command()
def resume(run: RunName, reason: Reason = "asked for", as_json: Json = False) -> None:
    """Let a paused run go on."""
    from sia_events import oversight

    _say(run, oversight.resume(reason), as_json)


@cli.command()
def steer(run: RunName, text: Annotated[str, typer.Argument(metavar="TEXT")], as_json: Json = False) -> None:
    """Tell the run something that its next feedback reads."""
    from sia_events import oversight

    _say(run, oversight.steer(text), as_json)


@cli.command()
def cancel(run: RunName, reason: Reason = "asked for", as_json: Json = False) -> None:
    """End the run for good, without a sealed test. What it recorded stays, and can be branched."""
    from sia_events import oversight

    _say(run, oversight.cancel(reason), as_json)


@cli.command()
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

    _say(run, oversight.budget(usd=usd, minutes=minutes, tokens=tokens, calls=calls), as_json)


@cli.command()
def runs(as_json: Json = False) -> None:
    """All runs, oldest first."""
    from sia_events import reading, views

    rows = _await(reading.all_runs(_settings()))
    _print(json.dumps(rows) if as_json else views.runs_table(rows))


@cli.command()
def show(run: RunName, as_json: Json = False) -> None:
    """One run: every version with its scores and verdict, the sealed test, the cost."""
    from sia_events import cost, reading, views

    async def told() -> dict[str, Any]:
        return await cost.summary(_settings(), await reading.records(_settings(), run))

    summary = _await(told())
    _print(json.dumps(summary) if as_json else views.summary_text(summary))


@cli.command()
def cost(run: RunName, as_json: Json = False) -> None:
    """What a run's model calls cost, by role, model and generation, and what is left of its budget."""
    from sia_events import cost as costs
    from sia_events import cost_views

    told = _await(costs.cost(_settings(), run))
    _print(json.dumps(told) if as_json else cost_views.cost_text(told))


@cli.command()
def log(
    run: RunName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep printing as records come, to the run's end.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The run's records in order; with --json one CloudEvents object a line, the bytes that are hashed."""
    from sia_events import reading, views
    from sia_events.shared.record import to_wire

    async def printing() -> None:
        async for record in reading.each_record(_settings(), run, follow):
            _print(to_wire(record).decode() if as_json else views.record_line(record))

    _await(printing())


@cli.command()
def diff(run: RunName, before: str, after: str, as_json: Json = False) -> None:
    """What changed between two versions: the harness file by file, the adapter, the scores."""
    from sia_events import reading, views

    changes = _await(reading.diff(_settings(), run, before, after))
    _print(json.dumps(changes) if as_json else views.diff_text(changes))


@cli.command()
def replay(run: RunName, as_json: Json = False) -> None:
    """Decide everything again with today's code and compare. Calls no model and starts no sandbox."""
    from sia_events import app, reading, views
    from sia_events.shared.replay import replay as replayed

    found = replayed(_await(reading.records(_settings(), run)), tuple(app.SERVICES.values()))
    _print(json.dumps(views.replay_summary(found)) if as_json else views.replay_text(found))
    raise typer.Exit(FAILED if found.divergence else DONE)


@cli.command()
def branch(
    run: RunName,
    at: Annotated[int, typer.Option(min=0, metavar="GEN", help="Go on behind this generation's verdict.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="What is different in the branch, e.g. lever=weights."),
    ] = None,
    name: Annotated[str | None, typer.Option("--run", metavar="NAME", help="The branch's name.")] = None,
    no_go: Annotated[
        bool, typer.Option("--no-go", help="Only open the branch; sia run --resume NAME goes on with it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """A new run that shares RUN's history up to a generation and goes on with something changed. Nothing is copied."""
    from sia_events import driver

    raise typer.Exit(_await(driver.branch(_settings(), run, at, _pairs(set_), name, not no_go, as_json)))


@cli.command("export")
def export_(
    run: RunName,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where run_N is made; it must not be there.")],
    as_json: Json = False,
) -> None:
    """Write RUN in SIA's layout, DIR/run_N/gen_G/…: agents, results, trajectories, notes (docs/coming-from-sia.md)."""
    from sia_events import reading

    made = _await(reading.export(_settings(), run, folder))
    _print(json.dumps({"folder": str(made)}) if as_json else str(made))


@cli.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="A runs/run_N of SIA's.")],
    name: Annotated[
        str | None, typer.Option("--run", metavar="NAME", help="Its name here; the folder's if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a run of SIA's into the log, as a run that is over: its scores as reported, no verdicts."""
    from sia_events import driver

    told = _await(driver.import_run(_settings(), folder, name))
    said = f"{told['run']}: {told['versions']} versions, {told['records']} records; sia show {told['run']}"
    _print(json.dumps(told) if as_json else said)


@cli.command()
def compare(runs: Annotated[list[str], typer.Argument(metavar="RUN...")], as_json: Json = False) -> None:
    """Runs side by side: levers, gate scores by generation, sealed scores, cost; branches aligned at their fork."""
    from sia_events import reading, views

    compared = _await(reading.compare(_settings(), runs))
    _print(json.dumps(compared) if as_json else views.compare_text(compared))


@cli.command()
def serve(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Services by name; all when left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run services in the foreground for every run on the stream, until interrupted."""
    from sia_events import app, driver

    known = (*app.SERVICES, *app.LOOPS)
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise Wrong(f"no service {unknown[0]!r}; there are: {', '.join(known)}")
    raise typer.Exit(_await(driver.serve(_settings(), tuple(names or known), as_json)))


@cli.command()
def up(as_json: Json = False) -> None:
    """Start all services in the background; sia run then hands its runs to them."""
    from sia_events import driver

    told = driver.up(_settings())
    _print(json.dumps(told) if as_json else f"services are up: process {told['pid']}; sia down stops them")


@cli.command()
def down(as_json: Json = False) -> None:
    """Stop the services that sia up started. Runs stay where they are and go on at the next start."""
    from sia_events import driver

    told = driver.down(_settings())
    _print(
        json.dumps(told) if as_json else (f"stopped process {told['pid']}" if told["pid"] else "no services were up")
    )


@cli.command()
def rebuild(as_json: Json = False) -> None:
    """Fill the log anew from the streams, which have everything; for a log that was lost or damaged."""
    from sia_events import driver

    runs = _await(driver.rebuild(_settings()))
    _print(json.dumps({"runs": runs}) if as_json else f"the log is filled anew: {runs} runs")


@cli.command()
def schema(as_json: Json = True) -> None:
    """JSON Schema of every event, and the AsyncAPI description of the stream."""
    from sia_events.shared.schema import asyncapi

    _print(json.dumps(asyncapi(), indent=2))


@cli.command()
def doctor(as_json: Json = False) -> None:
    """What works here, what does not, and how to mend it."""
    from sia_events import doctor as checks
    from sia_events import views

    found = _await(checks.examine(_settings()))
    _print(json.dumps({"checks": [vars(check) for check in found]}) if as_json else views.doctor_text(found))
    raise typer.Exit(FAILED if any(check.status == "fail" for check in found) else DONE)


@tasks.command("list")
def tasks_list(as_json: Json = False) -> None:
    """The built-in tasks."""
    from sia_events import views
    from sia_events.shared.task import find_task, known_tasks, split_sizes

    rows = [
        {"task": t.name, "title": t.title, "metric": t.metric, "splits": split_sizes(t)}
        for t in map(find_task, known_tasks())
    ]
    _print(json.dumps(rows) if as_json else views.tasks_table(rows))


@tasks.command("check")
def tasks_check(task: str, as_json: Json = False) -> None:
    """Whether TASK, a name or a folder, is complete; says what is missing and where."""
    from sia_events.shared.task import find_task, split_sizes

    found = find_task(task)
    told = {
        "task": found.name,
        "title": found.title,
        "metric": found.metric,
        "splits": split_sizes(found),
        "path": str(found.path),
    }
    _print(
        json.dumps(told)
        if as_json
        else f"{found.name}: complete; "
        + (", ".join(f"{s} {n}" for s, n in told["splits"].items()) or "its score would not be held out")
    )


@bench.command("kernels")
def bench_kernels(
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

    _print(benches.kernels(source, repeats, seed, as_json))


@bench.command("loop")
def bench_loop(
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Whole runs on the real model, one a seed.")] = 3,
    quick: Annotated[bool, typer.Option(help="Leave the real-model runs out.")] = False,
    as_json: Json = False,
) -> None:
    """The loop's figures: gain by seed, start, overhead a generation, publish to queryable, disk, --help."""
    from sia_events import benches

    _print(_await(benches.loop(_settings(), seeds, quick, as_json)))


@bench.command("gateway")
def bench_gateway(as_json: Json = False) -> None:
    """The gateway's figures: a call beside a direct one, calls a second, first tokens, a budget race, a generation."""
    from sia_events import benches

    _print(_await(benches.gateway(_settings(), as_json)))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point. Exit status: 0 done, 1 failed or diverged, 2 wrong usage or not ready, 130 interrupted."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if sia_spelling.spoken(words):
            words = _in_our_words(words)
        # In this mode it prints usage errors itself and always ends in SystemExit, with the statuses above.
        cli(args=words)
    except Exception as error:
        known = _not_ready()
        if _debug() or not isinstance(error, known):
            raise
        print(f"sia: {error}", file=sys.stderr)
        sys.exit(USAGE)
    raise AssertionError("the command line ends by exiting")


def _in_our_words(words: Sequence[str]) -> list[str]:
    """A command line in SIA's spelling as one of ours; what is different is told on stderr."""
    from sia_events import profiles

    places = profiles.places()
    rows: dict[str, tuple[bool, dict[str, str]]] = {}

    def known(profile: profiles.Profile) -> profiles.Profile:
        if profile.provider:
            name, row = profiles.table_row(profile.provider)
            rows[name] = profile.own, row
        return profile

    lookups = sia_spelling.Lookups(
        task=lambda name: profiles.find_bundled(name, places),
        meta=lambda name: known(profiles.read_meta(name, places)),
        target=lambda name: known(profiles.read_target(name, places)),
    )
    ours = sia_spelling.translate(words, lookups)
    for line in (*ours.notes, f"in our words: sia {shlex.join(ours.argv)}"):
        print(f"sia: {line}", file=sys.stderr)
    for name, (own, row) in rows.items():
        # What comes with SIA's package only fills gaps: a row of ours is newer, and may be the user's.
        if own or name not in _settings().providers:
            _PROVIDERS[name] = row
            kept = profiles.as_toml(name, row)
            print(f"sia: provider {name} is known to this process alone; config.toml keeps it: {kept}", file=sys.stderr)
    return list(ours.argv)


def _not_ready() -> tuple[type[Exception], ...]:
    """Errors that a person can mend; each message says what, where and how."""
    from sia_events import errors

    return (Wrong, sia_spelling.Misspelt, *errors.MENDABLE)


def _settings() -> Any:
    from sia_events.shared.settings import load_settings

    settings = load_settings()
    if not _PROVIDERS:
        return settings
    from sia_events.shared.providers import Provider

    more = {name: Provider.model_validate(row) for name, row in _PROVIDERS.items()}
    return settings.model_copy(update={"providers": {**settings.providers, **more}})


def _debug() -> bool:
    from sia_events.shared.settings import SettingsError

    try:
        return _settings().debug
    except SettingsError:
        return False


def _await(work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    _talk_on_stderr()
    return asyncio.run(work)


def _tell_costs(task: str, name: str | None, settings: Any, dry_run: bool, as_json: bool) -> None:
    """What a run that is not there yet will cost: on stderr where somebody bills it; a dry run ends with it."""
    from sia_events import cost_views, estimate

    told = _await(estimate.before(_settings(), task, name, settings))
    if dry_run:
        if told is None:
            raise Wrong(f"run {name} is there already; sia cost {name} tells what it has cost")
        _print(json.dumps(estimate.as_object(told)) if as_json else cost_views.estimate_text(told))
        raise typer.Exit(DONE)
    if told and told.lines:
        print(f"sia: {cost_views.estimate_text(told)}", file=sys.stderr)


def _say(run: str, word: Any, as_json: bool) -> None:
    from sia_events import oversight

    said = _await(oversight.say(_settings(), run, word))
    go_on = said["status"] == "running"
    hint = f"; where no services are up, sia run --resume {said['run']} goes on" if go_on else ""
    _print(json.dumps(said) if as_json else f"{said['event']} is record {said['position']} of {said['run']}{hint}")


def _talk_on_stderr() -> None:
    """Log lines are talk: stdout is for data."""
    import logging

    import structlog

    level = logging.DEBUG if _debug() else logging.INFO
    structlog.configure(
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )


def _pairs(assignments: Sequence[str] | None) -> dict[str, Any]:
    """KEY=VALUE options as a mapping; values are JSON where they parse as JSON, else text."""
    found: dict[str, Any] = {}
    for assignment in assignments or ():
        key, equals, value = assignment.partition("=")
        if not equals or not re.fullmatch(r"[a-z_]+", key):
            raise Wrong(f"--set takes KEY=VALUE, not {assignment!r}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def _run_settings(wanted: dict[str, Any], assignments: Sequence[str] | None) -> Any:
    from sia_events.driver import merged
    from sia_events.shared.events import RunSettings

    return merged(RunSettings(), {**wanted, **_pairs(assignments)})


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader went away (`sia log RUN | head`): that is no failure of ours.
        sys.stdout = None  # type: ignore[assignment]
        raise typer.Exit(DONE) from None
