"""The verbs that give a run: started or gone on with, imported. Each is checked first, then followed."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sia_events import app
from sia_events.catching_up import settled
from sia_events.errors import Unusable
from sia_events.evaluator.trial import require_loadable
from sia_events.following import follow, is_untold
from sia_events.importing import facts, read_run
from sia_events.log_here import require_ours
from sia_events.roles import is_local, require_askable
from sia_events.run_settings import differences
from sia_events.shared.code import code
from sia_events.shared.events import RunSettings, RunStarted, RunSteered
from sia_events.shared.failpoints import reach
from sia_events.shared.record import IMPORTED, opening
from sia_events.shared.registration import REQUIREMENTS, register, requirements
from sia_events.shared.run import fold
from sia_events.shared.settings import Settings
from sia_events.shared.task import Task, find_task
from sia_events.starting import first_agent, lay_down, require_backend, require_learnable, suited

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


async def run(
    settings: Settings,
    task: str | None,
    name: str | None,
    wanted: RunSettings,
    resume: bool,
    as_json: bool,
    reference: tuple[Path | None, str | None] = (None, None),
    steer: str | None = None,
) -> int:
    """Start a run, or go on with an unfinished one, and follow it to its end; returns the exit status.

    `reference` is the first agent's file or folder, and the program in it; the task's own where it is None. `steer` is
    what every feedback has to read.
    """
    if name is not None and not NAME.fullmatch(name):
        raise Unusable(f"a run's name is letters, digits, - and _, 64 at most, not {name!r}")
    chosen = find_task(task) if task else None
    first: Mapping[str, bytes] = {}
    if chosen:
        first = first_agent(chosen, *reference)
        wanted, notes = suited(chosen, wanted)
        print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr, flush=True)
        require_learnable(settings, wanted)
        if not settings.nats_url:
            require_askable(settings, wanted)
            require_backend(wanted)
        await app.ready(settings, wanted.sandbox, is_local(settings, wanted))
        await lay_down(settings.home, first.get(REQUIREMENTS))
        packages = await lay_down(settings.home, None if chosen.splits else requirements(chosen))
        await require_loadable(chosen, app.sandbox_named(wanted.sandbox, settings), packages)
    async with open_stores(settings, f"run {name or ''}".strip()) as node:
        known = await node.bus.runs()
        name = name or free_name(known)
        if name not in known:
            if chosen is None:
                raise Unusable(f"no run {name!r} to resume; sia runs lists them")
            if wanted.sandbox == "process" and not node.names:
                raise Unusable(
                    "services that are up run agents in bubblewrap only; for --sandbox process: sia down first"
                )
            await _open(node, name, chosen, wanted, first, steer)
        else:
            await node.streams.check_whole(name)
            state = fold(await node.bus.history(name))
            # A run that was killed between its end and telling of it is over, and still has something to say.
            if state.finished and not resume and not is_untold(settings, name):
                raise Unusable(f"run {name} exists and is finished; take another name, or sia show {name}")
            if chosen and state.task and chosen.name != state.task.task:
                raise Unusable(f"run {name} exists, for task {state.task.task}; take another name")
            if chosen and (other := differences(state.settings, wanted)):
                again = f"sia run --resume {name} goes on as it was asked for"
                raise Unusable(f"run {name} exists with another {', '.join(other)}; {again}, or take another name")
        return await follow(node, settings, name, as_json)


async def import_run(settings: Settings, folder: Path, name: str | None) -> dict[str, Any]:
    """Read a run folder of SIA's into the log, as a run that is over; returns {run, records, versions}."""
    read = await asyncio.to_thread(read_run, folder)
    name = name or read.name
    if not NAME.fullmatch(name):
        raise Unusable(f"a run's name is letters, digits, - and _, 64 at most, not {name!r}; give one with --run")
    async with open_stores(settings, f"import {name}") as node:
        if name in await node.bus.runs():
            raise Unusable(f"run {name} exists; nothing was written. Give another name with --run")
        told = await facts(read, node.blobs, node.private)
        records = await node.bus.append(name, opening(name, told, IMPORTED))
    return {"run": name, "records": len(records), "versions": len(read.generations)}


async def _open(
    node: app.Node, name: str, task: Task, wanted: RunSettings, first: Mapping[str, bytes], steer: str | None
) -> None:
    registered = await register(task, node.blobs, node.private, wanted.rollout_items, first)
    said = [RunSteered(text=steer)] if steer else []
    reach("sia run before opening")
    await node.bus.append(name, opening(name, [registered, *said, RunStarted(settings=wanted, code=code())]))
    reach("sia run after opening")


@asynccontextmanager
async def open_stores(settings: Settings, purpose: str) -> AsyncIterator[app.Node]:
    """Bus and blobs to drive a run on: those of services that are up, or our own, with every service to start."""
    running = await settled(settings)
    serving = running is not None and running.get("purpose") == "serve"
    async with app.stores_of_home(settings, purpose, serving) as node:
        await require_ours(settings, node.streams)
        ours = node.settings.nats_url is None
        yield app.with_services(node, (*app.SERVICES, *app.LOOPS)) if ours else node


def free_name(known: Sequence[str]) -> str:
    number = 1
    while f"r{number}" in known:
        number += 1
    return f"r{number}"
