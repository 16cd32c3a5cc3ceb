"""Buses for tests: in memory, and on a real server; and the few things a test does behind a bus's back."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import nats

from sia_events.infra.memory import MemoryBlobs, MemoryBus, SystemTime
from sia_events.infra.nats import NatsBus, connect
from sia_events.infra.nats_partitions import EVENTS, Partitions
from sia_events.infra.nats_server import running
from sia_events.shared.events import Event, RunBranched, RunResumed, RunSettings, RunStarted
from sia_events.shared.ports import Bus
from sia_events.shared.record import SCHEMA, Draft, Record, answers, link, opening, place, to_wire


@dataclass
class Bench:
    """A bus, a second one on the same streams (another process, as it were), and a way to put anything on them."""

    bus: Bus
    other: Bus
    blobs: MemoryBlobs
    inject: Callable[[str, str, bytes], Awaitable[None]]


@asynccontextmanager
async def in_memory() -> AsyncIterator[Bench]:
    blobs = MemoryBlobs()
    bus = MemoryBus(blobs)

    async def inject(run: str, kind: str, wire: bytes) -> None:
        bus.inject(run, kind, wire)

    yield Bench(bus, bus, blobs, inject)


@asynccontextmanager
async def on_a_server(store: Path, partitions: int = 1) -> AsyncIterator[Bench]:
    blobs = MemoryBlobs()
    async with running(store) as url, on(url, blobs, partitions) as bus, on(url, blobs, partitions) as other:

        async def inject(run: str, kind: str, wire: bytes) -> None:
            client = await nats.connect(url)
            await client.jetstream().publish(Partitions(partitions).subject(EVENTS, run, kind), wire)
            await client.close()

        yield Bench(bus, other, blobs, inject)


@asynccontextmanager
async def on(url: str, blobs: MemoryBlobs | None = None, partitions: int = 1) -> AsyncIterator[NatsBus]:
    """A bus that is quick to try again and quick to take a heartbeat for missing."""
    quick = {"ack_wait": 1.0, "retry_delay": 0.02, "patience": 20.0}
    async with connect(url, blobs or MemoryBlobs(), SystemTime(), **quick, partitions=partitions) as bus:
        yield bus


def kill_server(store: Path) -> None:
    os.kill(json.loads((store / "server.json").read_text())["pid"], signal.SIGKILL)


STARTED = RunStarted(settings=RunSettings(), code="test")


def note(text: str) -> Event:
    return RunResumed(reason=text)


async def opened(bus: Bus, run: str, *more: Event) -> Sequence[Record]:
    return await bus.append(run, opening(run, [STARTED, *more]))


def notes(run: str, cause: Record, *texts: str, producer: str = "tester") -> list[Draft]:
    return answers(run, cause, producer, [note(text) for text in texts])


@asynccontextmanager
async def serving(
    bus: Bus,
    service: str,
    types: Sequence[str],
    answer: Callable[[Record], Awaitable[None]],
    run: str | None = None,
    at_once: int = 1,
) -> AsyncIterator[None]:
    task = asyncio.create_task(bus.serve(service, types, answer, run, at_once))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for a state of the world that nothing announces."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - what is waited for happens in other processes
            await asyncio.sleep(0.01)


def branch(parent: str, at: int) -> RunBranched:
    return RunBranched(parent=parent, at=at, generation=0, overrides={}, settings=RunSettings(), code="test")


def forged_branch(run: str, parent: str) -> bytes:
    """A record that says of itself that it opens `run`, behind the first record of `parent`."""
    first = place(opening(run, [branch(parent, 1)])[0], run, 2, "0" * 64, SystemTime().now())
    return to_wire(first)


UNHEARD_OF = {"unheard": "of"}
FOREIGN = {
    "a later schema": {"schema": SCHEMA + 1, "data": UNHEARD_OF},
    "an unknown type": {"type": "NotYetInvented", "data": UNHEARD_OF},
    "a field more": {"data": {"reason": "b", **UNHEARD_OF}},
}
"""What other code than ours may write."""


def of_a_later_release(
    draft: Draft, position: int, chain: str, time: datetime, run: str = "r", kind: str = "a later schema"
) -> bytes:
    """A record as other code may write it, linked into the chain."""
    body = json.loads(to_wire(place(draft, run, position, chain, time)))
    body.update(FOREIGN[kind])
    body["chain"] = link(chain, json.dumps(body).encode())
    return json.dumps(body).encode()
