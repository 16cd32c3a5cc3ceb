"""The verbs of `sia`: parses and prints, decides nothing."""

import json
import re
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import typer

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
        str, typer.Option(metavar="M", help="The agent's model, provider/name.")
    ] = "local/smollm2-135m-instruct",
    sandbox: Annotated[
        Literal["bubblewrap", "process"], typer.Option(help="process is UNSAFE: the agent's code runs as you.")
    ] = "bubblewrap",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of the run (docs/configuration.md)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Improve an agent for TASK. The same command, or --resume NAME, goes on after a stop or a crash."""
    from sia_events import driver

    wanted = {"generations": generations, "candidates": candidates, "lever": lever, "seed": seed}
    settings = _run_settings({**wanted, "target_model": target_model, "sandbox": sandbox}, set_)
    if (task is None) == (resume is None):
        raise Wrong("name a task to start a run, or --resume NAME to go on with one (sia tasks list, sia runs)")
    raise typer.Exit(_await(driver.run(_settings(), task, resume or name, settings, resume is not None, as_json)))


@cli.command()
def runs(as_json: Json = False) -> None:
    """All runs, oldest first."""
    from sia_events import driver, views

    rows = _await(driver.all_runs(_settings()))
    _print(json.dumps(rows) if as_json else views.runs_table(rows))


@cli.command()
def show(run: RunName, as_json: Json = False) -> None:
    """One run: every version with its scores and verdict, the sealed test, the cost."""
    from sia_events import driver, views
    from sia_events.shared.summary import whole

    summary = whole(_await(driver.records(_settings(), run)))
    _print(json.dumps(summary) if as_json else views.summary_text(summary))


@cli.command()
def log(
    run: RunName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep printing as records come, to the run's end.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The run's records in order; with --json one CloudEvents object a line, the bytes that are hashed."""
    from sia_events import driver, views
    from sia_events.shared.record import to_wire

    async def printing() -> None:
        async for record in driver.each_record(_settings(), run, follow):
            _print(to_wire(record).decode() if as_json else views.record_line(record))

    _await(printing())


@cli.command()
def diff(run: RunName, before: str, after: str, as_json: Json = False) -> None:
    """What changed between two versions: the harness file by file, the adapter, the scores."""
    from sia_events import driver, views

    changes = _await(driver.diff(_settings(), run, before, after))
    _print(json.dumps(changes) if as_json else views.diff_text(changes))


@cli.command()
def replay(run: RunName, as_json: Json = False) -> None:
    """Decide everything again with today's code and compare. Calls no model and starts no sandbox."""
    from sia_events import app, driver, views
    from sia_events.shared.replay import replay as replayed

    found = replayed(_await(driver.records(_settings(), run)), tuple(app.SERVICES.values()))
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


@cli.command()
def compare(runs: Annotated[list[str], typer.Argument(metavar="RUN...")], as_json: Json = False) -> None:
    """Runs side by side: levers, gate scores by generation, sealed scores, cost; branches aligned at their fork."""
    from sia_events import driver, views

    compared = _await(driver.compare(_settings(), runs))
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
        else f"{found.name}: complete; {', '.join(f'{s} {n}' for s, n in told['splits'].items())}"
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


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point. Exit status: 0 done, 1 failed or diverged, 2 wrong usage or not ready, 130 interrupted."""
    try:
        # In this mode it prints usage errors itself and always ends in SystemExit, with the statuses above.
        cli(args=None if argv is None else list(argv))
    except Exception as error:
        known = _not_ready()
        if _debug() or not isinstance(error, known):
            raise
        print(f"sia: {error}", file=sys.stderr)
        sys.exit(USAGE)
    raise AssertionError("the command line ends by exiting")


def _not_ready() -> tuple[type[Exception], ...]:
    """Errors that a person can mend; each message says what, where and how."""
    from sia_events import errors

    return (Wrong, *errors.MENDABLE)


def _settings() -> Any:
    from sia_events.shared.settings import load_settings

    return load_settings()


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
