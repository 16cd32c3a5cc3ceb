"""What the streams take, and how fast the tables have it: beside nats-py and chDB as they come, in the same run."""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import count, cycle, islice
from pathlib import Path
from typing import TypeVar

import psutil

from sia_events import app, raw_engines
from sia_events.event_log import recorder
from sia_events.figures import Figure
from sia_events.home import hold, own_nats_url
from sia_events.infra.nats_wire import packed
from sia_events.instant_run import long_run
from sia_events.log_here import open_log
from sia_events.overheads import recorded
from sia_events.shared.events import RunSteered
from sia_events.shared.ports import Bus, Envelope, Log
from sia_events.shared.record import answers, opening
from sia_events.shared.settings import Settings

BATCH, WRITERS = 10, 8
LINES, ENVELOPES = 200, 64
OFFERED = 22_000
FLAT = 1.1
LOOK_S, SAMPLE_S, GIVE_UP_S = 0.05, 1.0, 120.0
T = TypeVar("T")
NEWS = RunSteered(text="a line of about the size that events have on average; " * 4)


@asynccontextmanager
async def bus_on(home: Path, services: tuple[str, ...] = ()) -> AsyncIterator[app.Node]:
    """A bus on the disk of `home`; where the recorder is among the services it has opened the log."""
    settings = Settings(home=home)
    async with hold(settings, "bench"), app.stores(settings) as bare:
        node = app.with_services(bare, services)
        async with node.answering(None):
            if services:
                await node.bus.append("news", opening("news", [NEWS]))
                await node.guard(recorded(node))
            yield node


async def durable_append(home: Path, batches: int) -> list[Figure]:
    """Events a second of one writer, and of WRITERS runs at once: BATCH events a time, on disk before they count.

    Raw are atomic batches of the same bodies by nats-py, to the same server; they take turns, batch by batch.
    """
    async with bus_on(home) as node, raw_engines.raw_stream(own_nats_url(node.settings)) as client:
        return [await _appended(node.bus, client, writers, batches) for writers in (1, WRITERS)]


async def _appended(bus: Bus, client: raw_engines.Client, writers: int, batches: int) -> Figure:
    names = [f"append-{writers}-{number}" for number in range(writers)]
    last = {name: (await bus.append(name, opening(name, [NEWS])))[-1] for name in names}
    bodies = [record.wire for record in islice(long_run(names[0], BATCH, NEWS), BATCH)]

    async def ours(name: str) -> None:
        last[name] = (await bus.append(name, answers(name, last[name], "bench", [NEWS] * BATCH)))[-1]

    async def raw(name: str) -> None:
        await raw_engines.publish_batch(client, f"raw.{name}", bodies)

    turns = max(2, batches // writers)
    took = await _by_turns(lambda: together(ours, names), lambda: together(raw, names), turns)
    value, beside = (BATCH * writers / seconds for seconds in took)
    told = {"raw nats-py": beside, "ratio": value / beside, "batches": turns * writers}
    name = f"durable append, batches of {BATCH}, {writers} at once"
    return Figure(name, value, "events/s", ">= 0.8 x raw", value >= 0.8 * beside, told)


async def accepted(home: Path, seconds: float) -> Figure:
    """Events a second in acknowledged envelopes, as fast as WRITERS send them, while the recorder copies what it can.

    Raw are their bodies by nats-py, as many, the recorder still at work beside.
    """
    bundles = [lines(number) for number in range(ENVELOPES)]
    async with bus_on(home, ("recorder",)) as node, raw_engines.raw_stream(own_nats_url(node.settings)) as client:
        began, cpu, sent = time.perf_counter(), time.process_time(), 0

        async def send(writer: int) -> None:
            nonlocal sent
            for bundle in cycle(bundles):
                if time.perf_counter() - began > seconds:
                    return
                await node.bus.trace(Envelope(f"accepted-{writer}", "step", "g0a", bundle))
                sent += LINES

        await node.guard(together(send, range(WRITERS)))
        value = sent / (time.perf_counter() - began)
        cpu_us = 1e6 * (time.process_time() - cpu) / sent
        behind = LINES * await recorder.lag(node.bus)
        bodies = [packed(bundle, 2**20)[0] for bundle in bundles]
        many = list(islice(cycle(bodies), sent // LINES))
        raw = sent / await raw_engines.publish_each(client, many, WRITERS)
    copied = (sent - behind) / seconds
    beside = {"raw nats-py": raw, "ratio": value / raw, "copied meanwhile, a second": copied, "CPU us an event": cpu_us}
    return Figure(f"trace events accepted, {seconds:g} s", value, "/s", ">= 40000", value >= 40_000, beside)


async def sustained(home: Path, seconds: float) -> list[Figure]:
    """Events a second from their writers into the tables, OFFERED a second for so long; and the memory it takes."""
    bundles = [lines(number) for number in range(ENVELOPES)]
    pause = WRITERS * LINES / OFFERED
    async with bus_on(home, ("recorder",)) as node, open_log(node.settings) as log:
        before, began, sent = _cpu(), time.perf_counter(), 0
        memory: list[float] = []

        async def send(writer: int) -> None:
            nonlocal sent
            for number, bundle in zip(count(), cycle(bundles), strict=False):
                due = began + (number + writer / WRITERS) * pause
                if due > began + seconds:
                    return
                await asyncio.sleep(due - time.perf_counter())
                await node.bus.trace(Envelope(f"sustained-{writer}", "step", "g0a", bundle))
                sent += LINES

        async def sample() -> None:
            while True:
                memory.append(await asyncio.to_thread(_memory_mb))
                await asyncio.sleep(min(SAMPLE_S, seconds / 20))

        sampling = asyncio.create_task(sample())
        await node.guard(together(send, range(WRITERS)))
        offered = sent / (time.perf_counter() - began)
        sampling.cancel()
        memory.append(await asyncio.to_thread(_memory_mb))
        rows = await node.guard(_in_the_tables(log, sent))
        value, cpu = sent / (time.perf_counter() - began), _cpu() - before
    raw = await raw_engines.apart(raw_engines.insert_traces, home / "raw", bundles, OFFERED // 4 // LINES)
    quarter = len(memory) // 4
    early, late = (statistics.fmean(some) for some in (memory[quarter : 2 * quarter + 1], memory[-quarter - 1 :]))
    beside = {"offered": offered, "raw chDB inserts": raw, "CPU s a second": cpu / seconds, "lost": sent - rows}
    growth = {"second quarter MB": early, "last quarter MB": late, "seconds": seconds}
    good = value >= 20_000 and rows == sent
    return [
        Figure("trace events into the tables, sustained", value, "/s", ">= 20000, none lost", good, beside),
        Figure("memory of all processes meanwhile", late / early, "x", f"<= {FLAT}", late <= FLAT * early, growth),
    ]


async def _in_the_tables(log: Log, sent: int) -> int:
    """How many rows there are once there are as many as were sent, or when that takes too long."""
    rows, deadline = 0, time.perf_counter() + GIVE_UP_S
    while rows < sent and time.perf_counter() < deadline:
        rows = (await log.query("SELECT count() AS n FROM trace FINAL"))[0]["n"]
        await asyncio.sleep(LOOK_S)
    return rows


def lines(number: int) -> tuple[bytes, ...]:
    """An envelope's: words as steps have them, and digits that no packing makes smaller."""
    draw = random.Random(number)
    return tuple(
        b'{"time":"2026-01-01T00:00:00.000000Z","step":%d,"digest":"%032x","seconds":%.6f,'
        b'"text":"the agent looks at item %d of its data, asks the model for a label, and writes down what it says"}'
        % (at, draw.getrandbits(128), draw.random(), draw.randrange(10**4))
        for at in range(LINES)
    )


async def _by_turns(
    ours: Callable[[], Awaitable[object]], raw: Callable[[], Awaitable[object]], turns: int
) -> tuple[float, float]:
    """Median seconds of each, so that both meet the same load."""
    took: tuple[list[float], list[float]] = [], []
    for _ in range(turns):
        for way, seconds in zip((ours, raw), took, strict=True):
            began = time.perf_counter()
            await way()
            seconds.append(time.perf_counter() - began)
    return statistics.median(took[0]), statistics.median(took[1])


async def together(work: Callable[[T], Awaitable[None]], over: Iterable[T]) -> None:
    await asyncio.gather(*(work(each) for each in over))


def _processes() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def _memory_mb() -> float:
    """Proportional set sizes: a page that processes share is counted once."""
    told = [process.memory_full_info() for process in _processes()]
    return sum(getattr(each, "pss", each.uss) for each in told) / 2**20  # only Linux tells shares


def _cpu() -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in _processes()))
