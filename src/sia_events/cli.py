"""The command `sia`: its verbs, and how what cannot be done is told."""

import errno
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import typer

from sia_events import sia_spelling, terminal
from sia_events.verbs import (
    adapters,
    asking,
    bench,
    branching,
    comparing,
    experiment,
    integrity,
    inventory,
    letters,
    oversight,
    reading,
    replaying,
    running,
    serving,
)

VERBS: Mapping[str, Callable[..., None]] = {
    "run": running.run,
    "approve": oversight.approve,
    "refuse": oversight.refuse,
    "pause": oversight.pause,
    "resume": oversight.resume,
    "steer": oversight.steer,
    "cancel": oversight.cancel,
    "budget": oversight.budget,
    "runs": reading.runs,
    "show": reading.show,
    "cost": reading.cost,
    "adapters": adapters.adapters,
    "log": reading.log,
    "diff": reading.diff,
    "state": replaying.state,
    "replay": replaying.replay,
    "branch": branching.branch,
    "sql": asking.sql,
    "export": reading.export,
    "import": running.import_,
    "tree": comparing.tree,
    "compare": comparing.compare,
    "serve": serving.serve,
    "up": serving.up,
    "down": serving.down,
    "rebuild": serving.rebuild,
    "verify": integrity.verify,
    "archive": integrity.archive,
    "restore": integrity.restore,
    "gc": integrity.gc,
    "status": integrity.status,
    "schema": inventory.schema,
    "doctor": inventory.doctor,
}
TASKS = {"list": inventory.tasks_list, "check": inventory.tasks_check}
LETTERS = {
    "list": letters.letters_list,
    "show": letters.letters_show,
    "retry": letters.letters_retry,
    "drop": letters.letters_drop,
}
BENCHES = {
    "kernels": bench.kernels,
    "loop": bench.loop,
    "gateway": bench.gateway,
    "learn": bench.learn,
    "log": bench.log,
}

EXPERIMENTS = {"levers": experiment.levers}


def _typed(verbs: Mapping[str, Callable[..., None]], **options: Any) -> typer.Typer:
    typed = typer.Typer(no_args_is_help=True, **options)
    for name, verb in verbs.items():
        typed.command(name)(verb)
    return typed


cli = _typed(
    VERBS,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: the boxed one takes longer to import than everything else of `sia --help`.
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
    help="An AI agent that gets better at a task by itself. "
    "Every step is an event: nothing is lost, every run replays.",
)
cli.add_typer(_typed(TASKS, help="The tasks there are, and whether a folder is one."), name="tasks")
cli.add_typer(_typed(LETTERS, help="Dead letters: what a service gave up on."), name="dlq")
cli.add_typer(_typed(BENCHES, help="Figures, each beside what it is compared with, in one run."), name="bench")
cli.add_typer(
    _typed(EXPERIMENTS, help="Many runs under one question, and a report of what they show."), name="experiment"
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point. Exit status: 0 done, 1 failed or diverged, 2 wrong usage or not ready, 3 held, 130 interrupted."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if sia_spelling.spoken(words):
            words = _in_our_words(words)
        # In this mode it prints usage errors itself and always ends in SystemExit, with the statuses above.
        cli(args=words)
    except Exception as error:
        said = _mendable(error)
        if terminal.debugging() or not said:
            raise
        print(f"sia: {said}", file=sys.stderr)
        sys.exit(terminal.USAGE)
    raise AssertionError("the command line ends by exiting")


def _mendable(error: Exception) -> str:
    """What, where and how, of an error that a person can mend; nothing of any other."""
    from sia_events import errors
    from sia_events.infra.room import is_full

    if isinstance(error, OSError) and is_full(error):
        where = f" for {error.filename}" if error.filename else ""
        return f"the disk has no room left{where}. What was acknowledged is kept: free some space, then say it again"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and error.filename:
        where = f"{error.filename}: {error.strerror}. What was acknowledged is kept"
        return f"{where}: let this user write there, or copy the home and point SIA_HOME at the copy"
    known = (terminal.Wrong, sia_spelling.Misspelt, *errors.MENDABLE)
    return (str(error) or type(error).__name__) if isinstance(error, known) else ""


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
        if own or name not in terminal.settings().providers:
            terminal.know(name, row)
            kept = profiles.as_toml(name, row)
            print(f"sia: provider {name} is known to this process alone; config.toml keeps it: {kept}", file=sys.stderr)
    return list(ours.argv)
