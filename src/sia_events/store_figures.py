"""What the log does at size: every event reconciled, a start after a kill, and one run read out of very many."""

import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import islice
from pathlib import Path

from sia_events import raw_engines, verifying
from sia_events.event_log import recorder
from sia_events.figures import Figure
from sia_events.home import own_nats_url
from sia_events.infra import clickhouse
from sia_events.infra.blobs import open_blobs
from sia_events.infra.clock import SystemClock
from sia_events.infra.nats import connect
from sia_events.instant_run import long_run
from sia_events.log_here import open_log
from sia_events.overheads import recorded
from sia_events.shared.environment import plain
from sia_events.shared.ports import Bus
from sia_events.shared.record import answers, opening
from sia_events.shared.settings import Settings
from sia_events.stream_figures import LOOK_S, NEWS, bus_on, together

RUN, BATCH, APPENDERS = 1_000, 1_000, 4
LOOKS, STARTS = 41, 3
GIVE_UP_S = 120.0
INSERTS = 10
FIRST = "r0000000"
QUERY = "SELECT position, record FROM events WHERE run = {run:String} ORDER BY position"
COLUMNS = "id, type, producer, cause, correlation, time, schema, version, attempt"


async def reconciled(home: Path, events: int) -> Figure:
    """So many events in runs of RUN: appended, recorded, and then verified, stream against tables and every chain.

    Raw are as many batches of the same bodies by nats-py, and reading every row in its order by chDB.
    """
    waiting = iter(range(0, events, RUN))
    async with bus_on(home, ("recorder",)) as node:

        async def one_after_another() -> None:
            for start in waiting:
                await _fill(node.bus, f"run-{start}", min(RUN, events - start))

        began = time.perf_counter()
        await node.guard(together(lambda _: one_after_another(), range(APPENDERS)))
        appended = time.perf_counter()
        await node.guard(recorded(node))
        copied = time.perf_counter()
        raw = await _appended_raw(own_nats_url(node.settings), events)
    began_again = time.perf_counter()
    told = await verifying.verify(Settings(home=home), None, repair=False, source=None)
    looked = time.perf_counter()
    found = told["records"] - 1  # the news that opened the log
    beside = {
        "differences": len(told["findings"]),
        "appended s": appended - began,
        "in the tables s later": copied - appended,
        "verified s": looked - began_again,
        "raw nats-py appends s": raw,
        "raw chDB reads s": await raw_engines.apart(raw_engines.read_rows, home / "log"),
    }
    good = found == events and not told["findings"]
    return Figure("events reconciled, stream and tables", found, "", f"{events}, no difference", good, beside)


async def restart(home: Path, starts: int = STARTS, names: Sequence[str] = ()) -> Figure:
    """From starting `sia serve`, all services or these, on a home where they were killed, to an event in the tables.

    The slowest start counts. Raw is a bare nats-server on the same files and then chDB, until both answer.
    """
    settings, took, total = Settings(home=home), [], 0
    for _ in range(1 + starts):  # what goes before the first of them was stopped, and not killed
        began = time.perf_counter()
        async with _served(settings, names):
            total = await _queryable(settings)
            took.append(time.perf_counter() - began)
    del took[0]
    raw = await raw_engines.apart(raw_engines.started, home / "nats", home / "log")
    beside = {"median": statistics.median(took), "raw engines": raw, "events": total, "starts": starts}
    return Figure("kill -9 to an event in the tables again", max(took), "s", "< 5", max(took) < 5, beside)


async def run_by_position(home: Path, rows: int) -> list[Figure]:
    """Reading one run of RUN events out of so many rows on merged parts, beside chDB's bare answer to the query."""
    return await raw_engines.apart(_read_runs, home / "rows", rows)


def _read_runs(store: Path, rows: int) -> list[Figure]:
    return asyncio.run(_looked_at(store, max(1, rows // RUN)))


async def _looked_at(store: Path, runs: int) -> list[Figure]:
    log = await asyncio.to_thread(clickhouse.connect, f"chdb://{store}")
    raw = raw_engines.RawStore(store)
    try:
        await log.append(list(long_run(FIRST, RUN, NEWS)), FIRST)
        step = max(1, runs // INSERTS)
        name = "concat('r', leftPad(toString(number), 7, '0'))"
        for start in range(1, runs, step):
            raw.run(
                f"INSERT INTO events (record, run, position, {COLUMNS}) "
                f"SELECT replaceAll(record, '{FIRST}', {name}), {name}, position, {COLUMNS} FROM events "
                f"CROSS JOIN numbers({start}, {min(step, runs - start)}) AS others WHERE run = '{FIRST}'"
            )
        raw.run("OPTIMIZE TABLE events FINAL")
        ways = {"raw": lambda run: asyncio.to_thread(raw.run, QUERY, "Native", run=run), "bytes": log.wires}
        took: dict[str, list[float]] = {way: [] for way in (*ways, "records")}
        draw = random.Random(0)
        for _ in range(LOOKS):
            run = f"r{draw.randrange(runs):07}"
            for way, read in {**ways, "records": log.records}.items():
                began = time.perf_counter()
                found = await read(run)
                took[way].append(time.perf_counter() - began)
                if way != "raw" and len(found) != RUN:
                    raise RuntimeError(f"no figure: {len(found)} events of run {run} were read")
        told = (await log.query("SELECT count() AS rows, uniqExact(_part) AS parts FROM events"))[0]
    finally:
        raw.close()
        await log.close()
    bare, unread, records = (1000 * statistics.median(took[way]) for way in ("raw", "bytes", "records"))
    name, reached = f"a run of {RUN} events by position", unread <= 1.5 * bare
    return [
        Figure(name, unread, "ms", "<= 1.5 x raw", reached, {"raw chDB": bare, "ratio": unread / bare, **told}),
        Figure(f"{name}, as records", records, "ms", "", None, {"raw chDB": bare, "ratio": records / bare}),
    ]


async def _appended_raw(url: str, events: int) -> float:
    """Seconds for so many events, by APPENDERS at once as ours are, on the same server's disk."""
    bodies = [record.wire for record in islice(long_run("raw", BATCH, NEWS), BATCH)]
    waiting = iter(range(0, events, BATCH))
    async with raw_engines.raw_stream(url) as client:

        async def one_after_another(writer: int) -> None:
            for start in waiting:
                await raw_engines.publish_batch(client, f"raw.{writer}", bodies[: events - start])

        began = time.perf_counter()
        await together(one_after_another, range(APPENDERS))
        return time.perf_counter() - began


async def _fill(bus: Bus, run: str, events: int) -> None:
    last = (await bus.append(run, opening(run, [NEWS])))[-1]
    while last.position < events:
        news = [NEWS] * min(BATCH, events - last.position)
        last = (await bus.append(run, answers(run, last, "bench", news)))[-1]


@asynccontextmanager
async def _served(settings: Settings, names: Sequence[str]) -> AsyncIterator[None]:
    """The services with their stores in processes of their own, which are killed at the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sia_events", "serve", *names, "--json"),
        stdout=asyncio.subprocess.PIPE,
        env={**plain(), "SIA_HOME": str(settings.home)},
    )
    try:
        assert process.stdout
        if not await process.stdout.readline():
            raise RuntimeError(f"no figure: sia serve did not start on {settings.home}")
        yield
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _queryable(settings: Settings) -> int:
    """Append an event, wait until the tables have it, and return how many they have."""
    url, blobs = own_nats_url(settings), open_blobs(str(settings.home / "blobs"))
    async with connect(url, blobs, SystemClock()) as bus, asyncio.timeout(GIVE_UP_S):
        last = (await bus.history("news"))[-1]
        (news,) = await bus.append("news", answers("news", last, "bench", [NEWS]))
        # Not by asking the log: while it has no owner yet, whoever asks opens the store and is in the owner's way.
        while await recorder.lag(bus):  # noqa: ASYNC110 - a stream tells nobody how far its reader is
            await asyncio.sleep(LOOK_S)
    async with open_log(settings) as log:
        told = (await log.query("SELECT count() AS rows, countIf(run = 'news') AS news FROM events"))[0]
    if told["news"] != news.position:
        raise RuntimeError(f"no figure: {told['news']} of {news.position} events are in the tables")
    return told["rows"]
