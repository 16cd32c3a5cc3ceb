"""What every verb shares: options, settings, exit statuses, data on stdout and talk on stderr."""

import json
import re
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    # At run time only once a verb needs it: it takes longer to import than everything else of `sia --help`.
    from sia_events.shared.settings import Settings

DONE, FAILED, USAGE = 0, 1, 2
DEEPEST = 10  # lists and objects in one another in a value of --set; settings have two
T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of text.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run's name, or an unambiguous beginning of it.")]

# Rows of the provider table that profiles in SIA's spelling brought to this process.
_PROVIDERS: dict[str, Mapping[str, str]] = {}


class Wrong(Exception):
    """What was asked for cannot be done as asked; the message says why and what to do."""


def settings() -> "Settings":
    """The settings of this process. Raises SettingsError."""
    from sia_events.shared.settings import load_settings

    loaded = load_settings()
    if not _PROVIDERS:
        return loaded
    from sia_events.shared.providers import Provider

    more = {name: Provider.model_validate(row) for name, row in _PROVIDERS.items()}
    return loaded.model_copy(update={"providers": {**loaded.providers, **more}})


def know(provider: str, row: Mapping[str, str]) -> None:
    """Have this process know one more provider, by its row of the table."""
    _PROVIDERS[provider] = row


def debugging() -> bool:
    from sia_events.shared.settings import SettingsError

    try:
        return settings().debug
    except SettingsError:
        return False


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """What the work comes to; its log lines go to stderr."""
    import asyncio

    _talk_on_stderr()
    return asyncio.run(work)


def say(text: str) -> None:
    """Print data."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader went away (`sia log RUN | head`): that is no failure of ours.
        sys.stdout = None  # type: ignore[assignment]
        raise typer.Exit(DONE) from None


def tell(found: T, as_json: bool, text: Callable[[T], str]) -> None:
    """Print what was found, as JSON or as text for people."""
    say(json.dumps(found) if as_json else text(found))


def write(file: Path, body: bytes) -> str:
    """Write a file that was asked for, and return where it is. Raises Wrong."""
    try:
        file.write_bytes(body)
    except OSError as error:
        raise Wrong(f"{file} cannot be written: {error.strerror}") from error
    return str(file.absolute())


def pairs(assignments: Sequence[str] | None) -> dict[str, Any]:
    """KEY=VALUE options as a mapping; values are JSON where they parse as JSON, else text. Raises Wrong.

    Each key comes once: where two are said, nothing tells which of them is meant. A key with a dot, "learning.lr",
    names a field of a setting.
    """
    found: dict[str, Any] = {}
    said: dict[str, str] = {}
    for assignment in assignments or ():
        key, equals, value = assignment.partition("=")
        if not equals or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key):
            raise Wrong(f"--set takes KEY=VALUE, not {assignment!r}")
        if key in said:
            raise Wrong(f"--set {said[key]} and --set {assignment}: say {key} once")
        said[key] = assignment
        found[key] = _meant(key, value)
    return found


def _meant(key: str, value: str) -> Any:
    """A value of --set. Raises Wrong for one that nests deeper than any setting."""
    try:
        meant = json.loads(value)
        if not _nests(meant, DEEPEST):
            return meant
    except ValueError:  # no JSON, or a number of more digits than Python reads
        return value
    except RecursionError:  # deeper than Python's parser goes, so than we do
        pass
    raise Wrong(f"--set {key}: its value has more than {DEEPEST} lists or objects in one another; no setting has")


def _nests(value: Any, levels: int) -> bool:
    """Whether the value has more than so many lists or objects in one another."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(_nests(each, levels - 1) for each in inner))


def _talk_on_stderr() -> None:
    import logging

    import structlog

    level = logging.DEBUG if debugging() else logging.INFO
    structlog.configure(
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )
