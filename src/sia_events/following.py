"""A run followed to its end, or to where a person has to act, and what is said of it then."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sia_events import app, cost
from sia_events.errors import Unusable
from sia_events.event_log import recorder
from sia_events.infra.clickhouse import LogFull, LogUnavailable, QueryRefused
from sia_events.infra.store_lock import StoreHeld
from sia_events.roles import is_local
from sia_events.shared.events import RunFinished, ServiceFailed, WeightUpdateRequested
from sia_events.shared.failpoints import reach
from sia_events.shared.ports import Bus
from sia_events.shared.record import Record
from sia_events.shared.run import Run, fold
from sia_events.shared.service import gave_up
from sia_events.shared.settings import Settings
from sia_events.shared.summary import whole
from sia_events.views.progress import LEARNED, Screen, Step, progress
from sia_events.views.summaries import ending_text, stopped_text

CATCH_UP_S = 30.0
SILENCE_S = 5.0


async def follow(node: app.Node, settings: Settings, name: str, as_json: bool) -> int:
    """Follow the run to its end, and say what it came to; returns the exit status."""
    started = time.monotonic()
    untold = _untold(settings, name)
    if not fold(await node.bus.history(name)).finished:
        untold.parent.mkdir(exist_ok=True)
        untold.touch()
    node = await _ready(node, settings, name)
    # Whoever supervises us asks with SIGTERM for what a person asks for with Ctrl-C.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, interrupt)
    try:
        end = await _followed(node, name, as_json)
        history = await node.bus.history(name)
    except asyncio.CancelledError:
        print(f"\nstopped; nothing is lost. Go on with: sia run --resume {name}", file=sys.stderr)
        raise
    summary = {**await _summary(settings, history), "took": round(time.monotonic() - started, 1)}
    if isinstance(end, ServiceFailed):
        tries = "1 try" if end.tries == 1 else f"{end.tries} tries"
        print(f"sia: {end.service} gave up after {tries}: {end.error}", file=sys.stderr)
        print(f"everything so far is kept; mend the cause and: sia run --resume {name}", file=sys.stderr)
    if isinstance(end, Run):
        print(stopped_text(end), file=sys.stderr)
    print(json.dumps(summary) if as_json else ending_text(summary, settings.home), flush=True)
    reach("sia run after its last word")
    untold.unlink(missing_ok=True)
    if isinstance(end, Run):
        return 1 if end.cancelled is not None else 3
    return 0 if isinstance(end, RunFinished) and end.outcome != "failed" else 1


async def _summary(settings: Settings, history: Sequence[Record]) -> dict[str, Any]:
    """`cost.summary`, or what the records alone say where the log does not answer, or has not come so far."""
    try:
        return await cost.summary(settings, history)
    except (Unusable, LogUnavailable, LogFull, QueryRefused, StoreHeld) as error:
        print(f"sia: what it cost is told by the records alone, as the log does not say: {error}", file=sys.stderr)
        return whole(history)


def interrupt() -> None:
    """Do as Ctrl-C does, also where whoever started us in the background had it ignored: asyncio minds none then."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def is_untold(settings: Settings, name: str) -> bool:
    """Whether the run was followed, and its end was not told: whoever followed it was killed."""
    return _untold(settings, name).exists()


def _untold(settings: Settings, name: str) -> Path:
    """A file that is there from when a run is followed until its end has been told."""
    return settings.home / "untold" / name


async def _ready(node: app.Node, settings: Settings, name: str) -> app.Node:
    """The node as the run asks for it, once it can drive the run; or once the services that are up have been told."""
    history = await node.bus.history(name)
    asked = fold(history).settings
    local = is_local(settings, asked)
    if node.names:
        await app.ready(settings, asked.sandbox, local)
    else:
        # A service that gave up on a record of the run is asked to try again: somebody has mended what was wrong.
        for service in gave_up(history):
            await node.bus.again(name, service)
        print(f"run {name} is handed to the services that are up; this only follows it", file=sys.stderr)
    if asked.sandbox == "process":
        print("UNSAFE: --sandbox process: the agent's code runs as you, outside any box", file=sys.stderr)
    return app.as_asked(node, asked.sandbox, local)


async def _followed(node: app.Node, name: str, quiet: bool) -> RunFinished | ServiceFailed | Run:
    """What the run came to, once the log has all of it; whoever interrupts waits for the log too."""
    with progress(name, quiet) as screen:
        async with node.answering(name):
            try:
                end = await node.guard(_until_over(node, name, screen))
            except asyncio.CancelledError:
                if node.names:
                    await node.stop(but="recorder")
                    await node.guard(recorded(node))
                raise
            reach("sia run before the log has everything")
            await node.guard(recorded(node))
            if node.names:
                # At a hold replies may be under way: they come, and are copied, before the end.
                await node.stop(but="recorder")
                await node.guard(recorded(node))
    return end


async def _until_over(node: app.Node, name: str, screen: Screen) -> RunFinished | ServiceFailed | Run:
    """Follow the run until it is over, until a service gives up on it, or until it waits for a person."""
    state = Run()
    known = await node.bus.history(name)
    silence = asyncio.get_running_loop().call_later(SILENCE_S, _tell_of_silence, known[-1])
    learning: asyncio.Task[None] | None = None
    try:
        async for record in app.follow(node.bus, name):
            state = fold([record], state)
            screen.tell(record, state)
            if isinstance(record.event, WeightUpdateRequested):
                if learning is not None:
                    learning.cancel()
                key = f"g{record.event.generation}"
                learning = asyncio.create_task(_tell_steps(node.bus, record.run, key, screen.step))
            elif learning is not None and isinstance(record.event, LEARNED):
                learning.cancel()
            news = record.position > len(known)
            if news or node.names:
                silence.cancel()
            if isinstance(record.event, RunFinished) and record.run == name:
                return record.event
            if isinstance(record.event, ServiceFailed) and record.event.failed and news:
                return record.event
            if state.status in ("paused", "waiting", "cancelled") and record is (await node.bus.history(name))[-1]:
                return state
    finally:
        silence.cancel()
        if learning is not None:
            learning.cancel()
    raise AssertionError("a run is followed to its end")


async def _tell_steps(bus: Bus, run: str, key: str, tell: Callable[[Step], None]) -> None:
    """Tell each newest step of a learner that the trace has, until cancelled.

    Where that fails it is said once, and the run goes on: nothing but what is shown depends on it.
    """
    try:
        async for envelopes in bus.traced(run, "training", key):
            step = msgspec.json.decode(envelopes[-1].lines[-1])
            if not step.get("done"):
                tell(step)
    except Exception as error:
        print(
            f"sia: no more steps of {key} are shown: {type(error).__name__}: {error}. It learns on, its trace is kept",
            file=sys.stderr,
            flush=True,
        )


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


async def recorded(node: app.Node) -> None:
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
