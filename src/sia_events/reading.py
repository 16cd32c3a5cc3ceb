"""The reading verbs: runs and records as the log has them, compared and told apart."""

import asyncio
import difflib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from sia_events import app, exporting
from sia_events.catching_up import current_log, settled
from sia_events.errors import Unusable
from sia_events.feedback_svc.gate import compare_on
from sia_events.infra.clickhouse import LogUnavailable, QueryRefused
from sia_events.infra.store_lock import StoreHeld
from sia_events.log_here import open_log
from sia_events.shared.events import RunBranched, Split
from sia_events.shared.ports import Log
from sia_events.shared.record import NewerRecord, Record, UnreadableRecord, parse_record
from sia_events.shared.run import fold
from sia_events.shared.settings import Settings
from sia_events.shared.summary import row, whole
from sia_events.shared.tree import load_tree

FOLLOW_S = 0.5
SCORED: tuple[Split, ...] = ("dev", "gate", "test")
PATIENCE_S = 5.0
T = TypeVar("T")
Opened = Callable[[Settings], AbstractAsyncContextManager[Log]]


class Gap(Unusable):
    """Records of a run are lost, and later ones stand; `whole` are those before."""

    def __init__(self, run: str, whole: Sequence[Record], behind: int) -> None:
        last = len(whole)
        go_on = f" What stands before can be gone on from: sia branch {run} --at-position {last}." if whole else ""
        super().__init__(
            f"run {run} cannot be read: behind record {last} the log has record {behind}, and none between. "
            f"Nothing was changed. What the streams still have is put back by: sia verify {run} --repair."
            f"{go_on} Where sia status shows a lag, it may only be on its way: look again then"
        )
        self.whole = whole


async def look(settings: Settings, ask: Callable[[Log], Awaitable[T]], opened: Opened = current_log) -> T:
    """What `ask` finds in the log. It is asked again where the embedded log's owner has just come or gone meanwhile.

    Raises what `ask` raises, and LogUnavailable or StoreHeld when the log is not to be had for some seconds.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            async with opened(settings) as log:
                return await ask(log)
        except (LogUnavailable, StoreHeld):
            if settings.log_dsn or time.monotonic() > deadline:
                raise
        await asyncio.sleep(app.POLL_S)


async def all_runs(settings: Settings) -> list[dict[str, Any]]:
    """A row a run, oldest first; one that cannot be read has the status "unreadable" and a `reason`."""
    running = await settled(settings)
    found = await look(settings, lambda log: every_lineage(log, row))
    rows = [unreadable(name, each) if isinstance(each, str) else each for name, each in found.items()]
    return [cut_short(each) for each in rows] if nobody_runs(settings, running) else rows


def nobody_runs(settings: Settings, running: Mapping[str, object] | None) -> bool:
    """Whether no process runs this home's services, and no server of others may have some that do."""
    return not running and not settings.nats_url


def cut_short(run: dict[str, Any]) -> dict[str, Any]:
    """What is told of a run, where nobody runs the services: it is not under way, and waits to be resumed."""
    return {**run, "status": interrupted(run["status"])}


def interrupted(status: str) -> str:
    """A run's status where nobody runs the services."""
    return "interrupted" if status == "running" else status


async def as_it_stands(settings: Settings, run: dict[str, Any]) -> dict[str, Any]:
    """What is told of a run, `cut_short` where nobody runs the services."""
    return cut_short(run) if nobody_runs(settings, await settled(settings)) else run


async def records(settings: Settings, run: str, opened: Opened = current_log) -> Sequence[Record]:
    """The run's whole lineage as the log holds it; `run` may be an unambiguous beginning of its name."""

    async def records_of(log: Log) -> Sequence[Record]:
        return await lineage(log, await resolve(log, run))

    return await look(settings, records_of, opened)


async def each_record(settings: Settings, run: str, follow: bool) -> AsyncIterator[Record]:
    """The run's records, to a gap if there is one; with `follow` also those to come, to the run's end. Raises Gap."""
    try:
        history = await records(settings, run)
    except Gap as gap:
        for record in gap.whole:
            yield record
        raise
    name, seen = history[-1].run, 0
    while True:
        for record in history[seen:]:
            yield record
        seen = max(seen, len(history))
        if not follow or fold(history).status in ("finished", "cancelled"):
            return
        await asyncio.sleep(FOLLOW_S)
        # Opened for each look, and not brought up to date again: whoever resumes the run wants the store and the home.
        with suppress(LogUnavailable, QueryRefused, StoreHeld):  # its owner may take longer to start again
            history = await records(settings, name, open_log)


async def diff(settings: Settings, run: str, before: str, after: str) -> dict[str, Any]:
    """What `changes` says of two versions, and {files: {path: unified diff}} of their harnesses."""
    history = await records(settings, run)
    state = fold(history)
    for name in (before, after):
        if name not in state.versions:
            raise Unusable(f"run {state.name} has no version {name!r}; there are: {', '.join(state.versions)}")
    blobs = app.open_public_blobs(settings)
    old, new = [await load_tree(blobs, state.versions[name].harness) for name in (before, after)]
    files = file_diffs(old, new, before, after)
    return {**changes(history, before, after), "files": files}


def file_diffs(old: Mapping[str, bytes], new: Mapping[str, bytes], before: str, after: str) -> dict[str, str]:
    """A unified diff of every file that differs between two trees, by path; in words where no line tells it."""
    files: dict[str, str] = {}
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            was, now = (tree.get(path, b"").decode(errors="replace").splitlines() for tree in (old, new))
            lines = difflib.unified_diff(was, now, f"{before}/{path}", f"{after}/{path}", lineterm="")
            files[path] = "\n".join(lines) or _without_lines(path in old, path in new)
    return files


def _without_lines(was: bool, now: bool) -> str:
    """How a file differs whose lines are the same."""
    if was and now:
        return "the same lines, in other bytes: line ends, or what is no text"
    return "an empty file is new" if now else "an empty file is gone"


def changes(history: Sequence[Record], before: str, after: str) -> dict[str, Any]:
    """How two versions of a run came about, and what `after` gained over `before` on the same items.

    {run, before, after, adapters: [before, after], versions: {version: {generation, parent, lever, edits, …}},
    scores: {version: {split: …}}, gains: {split: paired comparison, above zero for the better}}.
    """
    state = fold(history)
    entries = {version["version"]: version for version in whole(history)["generations"]}
    pair = {name: entries[name] for name in (before, after)}
    compared = {split: compare_on(state, split, before, after) for split in SCORED}
    return {
        "run": state.name,
        "before": before,
        "after": after,
        "adapters": [entry["adapter"] for entry in (entries[before], entries[after])],
        "versions": pair,
        "scores": {name: entry["scores"] for name, entry in pair.items()},
        "gains": {split: found.model_dump() for split, found in compared.items() if found},
    }


async def export(settings: Settings, run: str, into: Path) -> Path:
    """Write the run in SIA's layout under `into`, and return its folder."""
    return await exporting.export(await records(settings, run), app.open_public_blobs(settings), into)


async def resolve(log: Log, given: str) -> str:
    """The run of that name, or the one whose name begins so. Raises Unusable when there is none, or more than one."""
    names = await log.runs()
    if given in names:
        return given
    near = [name for name in names if name.startswith(given)]
    if len(near) == 1:
        return near[0]
    if near:
        raise Unusable(f"{given!r} may be {', '.join(near[:5])}: write more of it")
    raise Unusable(f"no run {given!r}; there are: {', '.join(names) or 'none yet (sia run words starts one)'}")


async def every_lineage(log: Log, told: Callable[[list[Record]], T]) -> dict[str, T | str]:
    """What is told of every run's lineage, oldest first, one held at a time; of one that cannot be read, why not."""
    found: dict[str, T | str] = {}
    for name in await log.runs():
        try:
            found[name] = told(await lineage(log, name))
        except (Unusable, NewerRecord) as error:
            found[name] = str(error)
    return found


def unreadable(run: str, why: str) -> dict[str, Any]:
    """The row of a run that cannot be read."""
    return {**dict.fromkeys(row(())), "run": run, "status": "unreadable", "reason": why}


async def lineage(log: Log, run: str) -> list[Record]:
    """A run's records behind those of its parents up to the fork. Raises NewerRecord, Unusable, and Gap."""
    return await asyncio.to_thread(read, run, await wires(log, run))


async def wires(log: Log, run: str) -> list[bytes]:
    """The same as bytes, for `read`."""
    parts: dict[str, list[bytes]] = {}
    end = sys.maxsize
    # What somebody forged may come back to itself, and is a history without a beginning.
    while run not in parts:
        own = await log.wires(run)
        parts[run] = [wire for position, wire in own if position <= end]
        fork = _fork(own[0][1]) if own else None
        if fork is None:
            break
        run, end = fork.parent, min(end, fork.at)
    return list(chain.from_iterable(reversed(parts.values())))


def read(run: str, wires: Sequence[bytes]) -> list[Record]:
    """The records of a lineage, where they are whole. Raises NewerRecord, Unusable, and Gap."""
    history: list[Record] = []
    for wire in wires:
        try:
            record = parse_record(wire)
        except NewerRecord:
            raise
        except UnreadableRecord as error:
            raise Unusable(
                f"run {run} cannot be read: {error}. Nothing was changed; the release that wrote it can"
            ) from error
        if record.position != len(history) + 1:
            raise Gap(run, history, record.position)
        history.append(record)
    return history


def _fork(wire: bytes) -> RunBranched | None:
    """Where the run whose first record this is leaves its parent, if it has one that can be read."""
    with suppress(UnreadableRecord):
        event = parse_record(wire).event
        return event if isinstance(event, RunBranched) else None
    return None
