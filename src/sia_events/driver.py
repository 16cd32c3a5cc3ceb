"""The verbs that act: start, resume, branch and follow runs; serve; fill the log anew."""

import asyncio
import difflib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version as installed
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError

from sia_events import app, cost, views
from sia_events.catching_up import settled
from sia_events.errors import NodeHeld, Unusable
from sia_events.evaluator.trial import require_loadable
from sia_events.event_log import recorder
from sia_events.importing import facts, read_run
from sia_events.local_model.weights import CARRIER, prepare
from sia_events.reading import records
from sia_events.roles import is_local, require_askable
from sia_events.shared.events import (
    RunBranched,
    RunFinished,
    RunSettings,
    RunStarted,
    RunSteered,
    ServiceFailed,
)
from sia_events.shared.failpoints import reach
from sia_events.shared.record import IMPORTED, Record, opening
from sia_events.shared.registration import REQUIREMENTS, register, requirements
from sia_events.shared.run import Run, fold
from sia_events.shared.service import gave_up
from sia_events.shared.settings import Settings
from sia_events.shared.task import Task, find_task
from sia_events.starting import first_agent, lay_down, suited

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
CATCH_UP_S = 30.0
SILENCE_S = 5.0


def merged(settings: RunSettings, changes: Mapping[str, Any]) -> RunSettings:
    """`settings` with some changed. Raises Unusable naming the setting that is unknown or out of range."""
    if unknown := sorted(changes.keys() - RunSettings.model_fields.keys()):
        near = difflib.get_close_matches(unknown[0], RunSettings.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(RunSettings.model_fields)}"
        raise Unusable(f"no setting {unknown[0]!r}{hint}")
    try:
        return RunSettings.model_validate({**settings.model_dump(), **changes}, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise Unusable(f"setting {'.'.join(map(str, first['loc']))}: {first['msg']}, not {first['input']!r}") from error


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
        if not settings.nats_url:
            require_askable(settings, wanted)
        await app.ready(settings, wanted.sandbox, is_local(settings, wanted))
        await lay_down(settings.home, first.get(REQUIREMENTS))
        packages = await lay_down(settings.home, None if chosen.splits else requirements(chosen))
        await require_loadable(chosen, app.sandbox_named(wanted.sandbox, settings), packages)
    async with _stores(settings, f"run {name or ''}".strip()) as node:
        known = await node.bus.runs()
        name = name or _free_name(known)
        if name not in known:
            if chosen is None:
                raise Unusable(f"no run {name!r} to resume; sia runs lists them")
            if wanted.sandbox == "process" and not node.names:
                raise Unusable(
                    "services that are up run agents in bubblewrap only; for --sandbox process: sia down first"
                )
            await _open(node, name, chosen, wanted, first, steer)
        else:
            state = fold(await node.bus.history(name))
            # A run that was killed between its end and telling of it is over, and still has something to say.
            if state.finished and not resume and not _untold(settings, name).exists():
                raise Unusable(f"run {name} exists and is finished; take another name, or sia show {name}")
            if chosen and state.task and chosen.name != state.task.task:
                raise Unusable(f"run {name} exists, for task {state.task.task}; take another name")
            if chosen and (other := _differences(state.settings, wanted)):
                again = f"sia run --resume {name} goes on as it was asked for"
                raise Unusable(f"run {name} exists with another {', '.join(other)}; {again}, or take another name")
        return await _drive(node, settings, name, as_json)


async def branch(
    settings: Settings, parent: str, at: int, overrides: Mapping[str, Any], name: str | None, go: bool, as_json: bool
) -> int:
    """Open a branch of `parent` behind the verdict of generation `at`, and go on with it."""
    history = await records(settings, parent)
    parent = history[-1].run
    if history[0].producer == IMPORTED:
        raise Unusable(f"run {parent} was imported: SIA keeps no data to go on with; start one with its agent: sia run")
    position, state = fork_point(history, at)
    changed = merged(state.settings, overrides)
    if at >= changed.generations:
        changed = merged(changed, {"generations": at + 1})
    await app.ready(settings, changed.sandbox, is_local(settings, changed))
    async with _stores(settings, f"branch {name or ''}".strip()) as node:
        known = await node.bus.runs()
        name = name or _free_name(known)
        if name in known or not NAME.fullmatch(name):
            raise Unusable(f"run {name} exists or is no name for a run; take another with --run")
        opened = RunBranched(
            parent=parent, at=position, generation=at, overrides=dict(overrides), settings=changed, code=_code()
        )
        await node.bus.append(name, opening(name, [opened]))
        if not go:
            print(
                json.dumps({"run": name, "parent": parent, "at": position})
                if as_json
                else f"{name}: sia run --resume {name} goes on"
            )
            return 0
        return await _drive(node, settings, name, as_json)


async def import_run(settings: Settings, folder: Path, name: str | None) -> dict[str, Any]:
    """Read a run folder of SIA's into the log, as a run that is over; returns {run, records, versions}."""
    read = await asyncio.to_thread(read_run, folder)
    name = name or read.name
    if not NAME.fullmatch(name):
        raise Unusable(f"a run's name is letters, digits, - and _, 64 at most, not {name!r}; give one with --run")
    async with _stores(settings, f"import {name}") as node:
        if name in await node.bus.runs():
            raise Unusable(f"run {name} exists; nothing was written. Give another name with --run")
        told = await facts(read, node.blobs, node.private)
        records = await node.bus.append(name, opening(name, told, IMPORTED))
    return {"run": name, "records": len(records), "versions": len(read.generations)}


def fork_point(history: Sequence[Record], generation: int) -> tuple[int, Run]:
    """The position of the verdict that closed `generation`, and the state there. Raises Unusable."""
    run, found, closed = Run(), None, -1
    for record in history:
        run = fold([record], run)
        versions = run.of_generation(run.generation)
        barren = any(failed.generation == run.generation for failed in run.barren)
        if (
            run.incumbent
            and run.generation > closed
            and (barren or versions)
            and all(v.name in run.verdicts for v in versions)
        ):
            closed = run.generation
            if closed == generation:
                found = record.position, run
    if found is None:
        have = f"0 to {closed}" if closed >= 0 else "none yet"
        raise Unusable(f"run {run.name} has no closed generation {generation}; there are: {have}")
    return found


def _differences(one: RunSettings, other: RunSettings) -> list[str]:
    """Names of the settings in which two runs differ."""
    return [name for name in RunSettings.model_fields if getattr(one, name) != getattr(other, name)]


async def _open(
    node: app.Node, name: str, task: Task, wanted: RunSettings, first: Mapping[str, bytes], steer: str | None
) -> None:
    registered = await register(task, node.blobs, node.private, wanted.rollout_items, first)
    said = [RunSteered(text=steer)] if steer else []
    await node.bus.append(name, opening(name, [registered, *said, RunStarted(settings=wanted, code=_code())]))


@asynccontextmanager
async def _stores(settings: Settings, purpose: str) -> AsyncIterator[app.Node]:
    """Bus and blobs to drive a run on: those of services that are up, or our own, with every service to start."""
    running = await settled(settings)
    if settings.nats_url or (running and running.get("purpose") == "serve"):
        url = settings.nats_url or app.own_nats_url(settings)
        async with app.stores(settings.model_copy(update={"nats_url": url})) as node:
            yield node
    else:
        async with app.hold(settings, purpose), app.stores(settings) as node:
            yield app.with_services(node, (*app.SERVICES, *app.LOOPS))


def _untold(settings: Settings, name: str) -> Path:
    """A file that is there from when a run is followed until its end has been told."""
    return settings.home / "untold" / name


async def _drive(node: app.Node, settings: Settings, name: str, as_json: bool) -> int:
    """Follow the run to its end, and say what it came to."""
    started = time.monotonic()
    untold = _untold(settings, name)
    untold.parent.mkdir(exist_ok=True)
    untold.touch()
    asked = fold(await node.bus.history(name)).settings
    node = app.as_asked(node, asked.sandbox, is_local(settings, asked))
    if node.names:
        await app.ready(settings, asked.sandbox, is_local(settings, asked))
    else:
        # A service that gave up on a record of the run is asked to try again: somebody has mended what was wrong.
        for service in gave_up(await node.bus.history(name)):
            await node.bus.again(name, service)
        print(f"run {name} is handed to the services that are up; this only follows it", file=sys.stderr)
    if asked.sandbox == "process":
        print("UNSAFE: --sandbox process: the agent's code runs as you, outside any box", file=sys.stderr)
    # Whoever supervises us asks with SIGTERM for what a person asks for with Ctrl-C.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
    try:
        with views.progress(name, quiet=as_json) as tell:
            async with node.answering(name):
                try:
                    end = await node.guard(_until_over(node, name, tell))
                except asyncio.CancelledError:
                    if node.names:
                        node.stop_all_but("recorder")
                        await _recorded(node)
                    raise
                reach("sia run before the log has everything")
                await _recorded(node)
        history = await node.bus.history(name)
    except asyncio.CancelledError:
        print(f"\nstopped; nothing is lost. Go on with: sia run --resume {name}", file=sys.stderr)
        raise
    summary = {**await cost.summary(settings, history), "took": round(time.monotonic() - started, 1)}
    if isinstance(end, ServiceFailed):
        print(f"sia: {end.service} gave up after {end.tries} tries: {end.error}", file=sys.stderr)
        print(f"everything so far is kept; mend the cause and: sia run --resume {name}", file=sys.stderr)
    if isinstance(end, Run):
        print(stopped_text(end), file=sys.stderr)
    print(json.dumps(summary) if as_json else views.ending_text(summary, settings.home), flush=True)
    reach("sia run after its last word")
    untold.unlink(missing_ok=True)
    if isinstance(end, Run):
        return 1 if end.cancelled is not None else 3
    return 0 if isinstance(end, RunFinished) and end.outcome != "failed" else 1


def stopped_text(run: Run) -> str:
    """Why a run that is not over does nothing, and what makes it go on."""
    then = f", then sia run --resume {run.name}"
    if run.cancelled is not None:
        return f"sia: run {run.name} was cancelled: {run.cancelled}. What it recorded stays; sia branch goes on from it"
    if run.exhausted:
        used = f"its budget of {run.exhausted.allowed:g} {run.exhausted.limit} is used up"
        return f"sia: run {run.name} is paused: {used}: sia budget {run.name} --{run.exhausted.limit} MORE{then}"
    if run.paused is not None:
        return f"sia: run {run.name} is paused: {run.paused}: sia resume {run.name}{then}"
    assert run.waiting, "only a run that is held or waits for a person stops before its end"
    answer = f"sia approve {run.name}, or sia refuse {run.name} --reason TEXT"
    return f"sia: run {run.name} waits for approval of {run.waiting.subject} ({run.waiting.reason}): {answer}{then}"


async def _until_over(node: app.Node, name: str, tell: views.Tell) -> RunFinished | ServiceFailed | Run:
    """Follow the run until it is over, until a service gives up on it, or until it waits for a person."""
    state = Run()
    stuck: ServiceFailed | None = None
    known = await node.bus.history(name)
    silence = asyncio.get_running_loop().call_later(SILENCE_S, _tell_of_silence, known[-1])
    try:
        async for record in app.follow(node.bus, name):
            state = fold([record], state)
            tell(record, state)
            news = record.position > len(known)
            if news or node.names:
                silence.cancel()
            if isinstance(record.event, RunFinished) and record.run == name:
                return record.event
            if isinstance(record.event, ServiceFailed) and record.event.failed and news:
                stuck = record.event
            if stuck:
                return stuck
            if state.status in ("paused", "waiting", "cancelled") and record is (await node.bus.history(name))[-1]:
                return state
    finally:
        silence.cancel()
    raise AssertionError("a run is followed to its end")


def _tell_of_silence(last: Record) -> None:
    """Nobody knows from here whether services are up somewhere; what can be seen is that none has answered."""
    owed = [s.name for s in app.SERVICES.values() if type(last.event) in {*s.decides, *s.performs}]
    print(
        f"sia: no service has answered record {last.position} ({last.type}) in {SILENCE_S:.0f} s; "
        f"{' or '.join(owed) or 'some service'} has to. Where none is up, start all of them with `sia serve`, "
        "under the same SIA_HOME and SIA_NATS_URL; this goes on waiting",
        file=sys.stderr,
        flush=True,
    )


async def _recorded(node: app.Node) -> None:
    """Wait until the log has what is on the stream, so that the next verb finds it."""
    deadline = time.monotonic() + CATCH_UP_S
    while await recorder.lag(node.bus):
        if time.monotonic() > deadline:
            print(
                "sia: the log is behind the stream, which has everything; sia serve recorder brings it up",
                file=sys.stderr,
            )
            return
        await asyncio.sleep(app.POLL_S)


async def serve(settings: Settings, names: Sequence[str], as_json: bool) -> int:
    """Run services for every run on the stream until interrupted; always with the real sandbox."""
    running = await settled(settings)
    if running and running.get("purpose") != "serve":
        # It answers its own run with services of its own: a second set would make every attempt twice.
        raise NodeHeld(f"{app.describe(running, settings.home)}; wait for its end, or set SIA_HOME to another folder")
    if "target_runner" in names:
        await app.ready(settings, "bubblewrap", local_model=False)
    local = "model_gateway" in names and None not in (find_spec("torch"), find_spec(CARRIER))
    if local:
        await asyncio.to_thread(prepare, settings.home)
    alone = settings.nats_url or (app.own_nats_url(settings) if running else None)
    if alone:
        async with app.stores(settings.model_copy(update={"nats_url": alone})) as node:
            return await _serving(app.as_asked(app.with_services(node, names), "bubblewrap", local), names, as_json)
    async with app.hold(settings, "serve"), app.stores(settings) as node:
        return await _serving(app.as_asked(app.with_services(node, names), "bubblewrap", local), names, as_json)


async def _serving(node: app.Node, names: Sequence[str], as_json: bool) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with node.answering(None):
        told = {"serving": list(names), "pid": os.getpid()}
        print(json.dumps(told) if as_json else f"serving {', '.join(names)}; interrupt to stop", flush=True)
        await node.guard(stop.wait())
    return 0


async def rebuild(settings: Settings) -> int:
    """Empty the log's tables and copy both streams into them again; returns how many runs the log holds then."""
    await settled(settings)
    async with app.hold(settings, "rebuild"), app.stores(settings) as node, app.open_log(settings) as log:
        app.forget_copied(settings)
        await recorder.rebuild(node.bus, log)
        await app.mark_copied(node)
        return len(await log.runs())


def up(settings: Settings) -> dict[str, Any]:
    """Start `sia serve` in the background and wait until it serves."""
    if running := app.running_node(settings):
        raise Unusable(f"{app.describe(running, settings.home)} already; sia down stops what sia up started")
    settings.home.mkdir(parents=True, exist_ok=True)
    with (settings.home / "serve.log").open("ab") as talk:
        child = subprocess.Popen(
            [sys.executable, "-m", "sia_events", "serve", "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=talk,
            start_new_session=True,
            env={**os.environ, "SIA_HOME": str(settings.home)},
        )
    assert child.stdout
    line = child.stdout.readline()
    if not line:
        raise Unusable(f"the services did not start; see {settings.home / 'serve.log'}")
    return json.loads(line)


def down(settings: Settings) -> dict[str, Any]:
    """End what `sia up` started and wait until it is gone."""
    running = app.running_node(settings)
    if not running:
        return {"pid": None}
    if running.get("purpose") != "serve":
        raise Unusable(
            f"{app.describe(running, settings.home)}, which sia up did not start; interrupt it where it runs"
        )
    pid = int(str(running["pid"]))
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.terminate()
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(app.POLL_S)
    return {"pid": pid}


def _free_name(known: Sequence[str]) -> str:
    number = 1
    while f"r{number}" in known:
        number += 1
    return f"r{number}"


def _code() -> str:
    return f"sia-events {installed('sia-events')}"
