"""Runs decided again from the log, one or all of them, and the state that a run had at some position."""

import asyncio
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass

from sia_events import app
from sia_events.errors import Unusable
from sia_events.reading import look, read, records, wires
from sia_events.shared.ports import Log
from sia_events.shared.record import NewerRecord, Record
from sia_events.shared.replay import Replayed, replay
from sia_events.shared.run import Run, fold
from sia_events.shared.settings import Settings

ALONE_S = 2.0  # processes take as long to begin


@dataclass(frozen=True)
class Stretch:
    """Which positions to decide again; None is the end of the run."""

    first: int = 1
    last: int | None = None


async def one(settings: Settings, run: str, stretch: Stretch, keep_going: bool) -> Replayed:
    """Replay a run. Raises Unusable for positions that it does not have."""
    history = await records(settings, run)
    last = len(history) if stretch.last is None else stretch.last
    if not 1 <= stretch.first <= last <= len(history):
        raise Unusable(f"run {history[-1].run} has positions 1 to {len(history)}, and no {stretch.first} to {last}")
    return _decided(history, stretch, keep_going)


async def every(settings: Settings, keep_going: bool) -> Mapping[str, Replayed | str]:
    """Replay all runs, oldest first; of a run that this release cannot read, why not."""
    return await look(settings, lambda log: decide_every(log, keep_going))


async def decide_every(log: Log, keep_going: bool, alone_s: float = ALONE_S) -> Mapping[str, Replayed | str]:
    """The same of a log. What one process has not done within `alone_s`, as many as there are cores go on with."""
    until, most = time.monotonic() + alone_s, cores()
    loop, room = asyncio.get_running_loop(), asyncio.Semaphore(2 * most)  # histories that are held at once
    here: dict[str, Replayed | str] = {}
    apart: dict[str, Future[Replayed | str]] = {}
    names = await log.runs()

    def done(_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed where we were interrupted
            loop.call_soon_threadsafe(room.release)

    with ProcessPoolExecutor(most, multiprocessing.get_context("spawn"), _begin) as pool:
        try:
            for name in names:
                if most == 1 or time.monotonic() < until:
                    here[name] = _told(name, await wires(log, name), keep_going)
                    continue
                await room.acquire()
                apart[name] = pool.submit(_told, name, await wires(log, name), keep_going)
                apart[name].add_done_callback(done)
            return here | {name: await asyncio.wrap_future(told) for name, told in apart.items()}
        except BrokenProcessPool as error:
            raise Unusable("a process that replayed runs was killed, for want of memory maybe: try again") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()  # what they are at is nobody's
            raise


def _begin() -> None:
    """In such a process: an interrupt is its parent's affair, and it ends with that, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _told(run: str, history: Sequence[bytes], keep_going: bool) -> Replayed | str:
    try:
        return _decided(read(run, history), Stretch(), keep_going)
    except (Unusable, NewerRecord) as error:
        return str(error)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


async def state(settings: Settings, run: str, at: int | None) -> Run:
    """The fold of a run's records up to position `at`; of all of them where it is None. Raises Unusable."""
    found = await records(settings, run)
    if at is not None and not 1 <= at <= len(found):
        raise Unusable(f"run {found[-1].run} has positions 1 to {len(found)}, and no {at}")
    return fold(found[:at])


def _decided(history: Sequence[Record], stretch: Stretch, keep_going: bool) -> Replayed:
    return replay(history, tuple(app.SERVICES.values()), stretch.first, stretch.last, keep_going)
