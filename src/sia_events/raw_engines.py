"""The engines as they come, nothing of ours between, which the log stands beside: nats-py, chDB, `eventsourcing`."""

import asyncio
import json
import multiprocessing
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar
from uuid import uuid4

import nats
import nats.errors
from nats.aio.client import Client
from nats.js import api

from sia_events.infra import clickhouse
from sia_events.infra.nats_server import binary, free_port

STREAM = "RAW"
ANSWER_S, START_S, LOOK_S = 10.0, 120.0, 0.01

P = ParamSpec("P")
T = TypeVar("T")


async def apart(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do blocking work in a process of its own, so that what an engine leaves behind in memory ends with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return await asyncio.wrap_future(pool.submit(work, *args, **kwargs))


@asynccontextmanager
async def raw_stream(url: str) -> AsyncIterator[Client]:
    """A client of the server at `url`, which syncs as it is told to, and a stream on its disk over `raw.>`."""
    client = await nats.connect(url)
    try:
        config = api.StreamConfig(name=STREAM, subjects=["raw.>"], storage=api.StorageType.FILE, allow_atomic=True)
        await client.jetstream().add_stream(config)
        yield client
        await client.jetstream().delete_stream(STREAM)
    finally:
        await client.close()


async def publish_batch(client: Client, subject: str, bodies: Sequence[bytes]) -> None:
    """All or none (NATS ADR-50); returns when they are on disk."""
    head = {"Nats-Batch-Id": uuid4().hex}
    for number, body in enumerate(bodies[:-1], 1):
        await client.publish(subject, body, headers={**head, "Nats-Batch-Sequence": str(number)})
    commit = {**head, "Nats-Batch-Sequence": str(len(bodies)), "Nats-Batch-Commit": "1"}
    reply = await client.request(subject, bodies[-1], ANSWER_S, headers=commit)
    if error := json.loads(reply.data).get("error"):
        raise RuntimeError(f"no figure: the server refused a raw batch: {error}")


async def publish_each(client: Client, bodies: Sequence[bytes], at_once: int) -> float:
    """Seconds until every body is on disk, so many on their way at once."""
    waiting = iter(bodies)

    async def one_after_another() -> None:
        for body in waiting:
            await client.request("raw.trace", body, ANSWER_S)

    began = time.perf_counter()
    await asyncio.gather(*(one_after_another() for _ in range(at_once)))
    return time.perf_counter() - began


class RawStore:
    """chDB on a folder, in this process, which can have one folder open and no other. Blocking."""

    def __init__(self, path: Path) -> None:
        from chdb.state import connect  # starts an engine

        self._handle = connect(str(path))

    def run(self, sql: str, form: str = "RowBinary", **parameters: str) -> bytes:
        return self._handle.query(sql, form, params=parameters).bytes()

    def close(self) -> None:
        self._handle.close()


def read_rows(store: Path) -> float:
    """Seconds in which chDB reads every row of our events, in its order. Blocking."""
    raw = RawStore(store)
    began = time.perf_counter()
    raw.run("SELECT run, position, record FROM events ORDER BY run, position", "Null")
    took = time.perf_counter() - began
    raw.close()
    return took


def started(streams: Path, store: Path) -> float:
    """Seconds until a bare nats-server on the files of a server that was killed has the streams, and chDB the rows.

    Nothing of ours watches or configures it, and it is killed as well. Blocking.
    """
    began = time.perf_counter()
    asyncio.run(_has_streams(streams))
    raw = RawStore(store)
    raw.run("SELECT count() FROM events")
    took = time.perf_counter() - began
    raw.close()
    return took


async def _has_streams(streams: Path) -> None:
    port = free_port()
    bare = (await binary(), "-js", "-sd", str(streams), "-a", "127.0.0.1", "-p", str(port))
    server = await asyncio.create_subprocess_exec(*bare, stdout=-3, stderr=-3)
    try:
        async with asyncio.timeout(START_S):
            while True:
                with suppress(OSError, nats.errors.Error):
                    url = f"nats://127.0.0.1:{port}"
                    client = await nats.connect(url, allow_reconnect=False, error_cb=_not_yet)
                    await client.jetstream().stream_info("SIA")
                    await client.close()
                    return
                await asyncio.sleep(LOOK_S)
    finally:
        server.kill()
        await server.wait()


async def _not_yet(_: Exception) -> None:
    """It is asked again until it answers."""


def insert_traces(store: Path, bundles: Sequence[Sequence[bytes]], at_once: int) -> float:
    """Rows a second that chDB takes from files into our table, `at_once` bundles a time. Blocking."""
    asyncio.run(clickhouse.connect(f"chdb://{store}").close())  # leaves our tables there
    files, rows = [], 0
    for start in range(0, len(bundles), at_once):
        files.append(store / f"{start}.rows")
        with files[-1].open("wb") as file:
            for at, bundle in enumerate(bundles[start : start + at_once], start):
                rows += len(bundle)
                file.writelines(b"raw\tstep\tg0a\t%d\t%d\t%b\n" % (at, n, body) for n, body in enumerate(bundle))
    raw = RawStore(store)
    began = time.perf_counter()
    for file in files:
        raw.run(f"INSERT INTO trace (run, kind, key, sequence, line, body) FROM INFILE '{file}' FORMAT TSVRaw")
    took = time.perf_counter() - began
    raw.close()
    return rows / took


def rebuild_aggregates(aggregates: int, events: int, text: str) -> float:
    """CPU seconds in which `eventsourcing` reconstructs so many aggregates of `events` stored events each, in memory.

    Raises ImportError where the package is not installed.
    """
    from eventsourcing.application import Application  # type: ignore[import-not-found]
    from eventsourcing.domain import Aggregate, event  # type: ignore[import-not-found]

    class Noted(Aggregate):
        @event("Opened")
        def __init__(self) -> None:
            self.position, self.last = 0, ""

        @event("Told")
        def tell(self, text: str, position: int) -> None:
            self.position, self.last = position, text

    application = Application()
    ids = []
    for _ in range(aggregates):
        aggregate = Noted()
        for position in range(1, events):
            aggregate.tell(text, position)
        application.save(aggregate)
        ids.append(aggregate.id)
    began = time.process_time()
    for each in ids:
        if application.repository.get(each).version != events:
            raise RuntimeError("no figure: eventsourcing rebuilt an aggregate without all of its events")
    return time.process_time() - began
