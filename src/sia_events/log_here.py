"""The log as a home keeps it: who may open it, its recorder, and how far the copy of the streams has come."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from sia_events.event_log.recorder import lag, record
from sia_events.home import make_home, only_one
from sia_events.infra import clickhouse, nats_disk
from sia_events.infra.child import Child
from sia_events.infra.store_lock import owner
from sia_events.infra.tail import RunTooNew
from sia_events.same_streams import has_witness, require_same
from sia_events.shared.ports import Bus, BusUnreachable, Streams
from sia_events.shared.settings import Settings

NAME = "recorder"
# In the home: how long the embedded streams' files were when the log had everything in them.
COPIED = "copied.json"
MARK_S = 5.0
OWNER_S = 0.5
ROOM_S, TOLD_S = 1.0, 60.0  # how often a full disk is tried again, and told of


@asynccontextmanager
async def open_log(
    settings: Settings, answer_s: float = clickhouse.ANSWER_S, here: bool = True
) -> AsyncIterator[clickhouse.ClickHouseLog]:
    """The log, for reading: the embedded store's owner is asked when there is one, else the store is opened here.

    Not `here`, the log counts as away where nobody owns it: the engine would stay in this process.
    """
    make_home(settings)
    store = settings.home / "log"
    dsn = settings.log_dsn or f"chdb://{store}"
    if not (here or settings.log_dsn):
        held = owner(store)
        if held is None or held.dsn is None:
            raise clickhouse.LogUnavailable(f"nobody answers for the event log in {store}: no recorder runs here")
        dsn = held.dsn
    log = await asyncio.to_thread(clickhouse.connect, dsn, answer_s)
    try:
        yield log
    finally:
        await log.close()


async def keep_log(settings: Settings, bus: Bus, streams: Streams) -> None:
    """Record until cancelled. Raises NodeHeld, and OtherStreams.

    The embedded store gets an owner process, so that other processes can ask it meanwhile.
    """
    with only_one(NAME, settings):
        await _record(settings, bus, streams)


async def _record(settings: Settings, bus: Bus, streams: Streams) -> None:
    keeper: Child | None = None
    told = -TOLD_S
    dsn, store = settings.log_dsn or "", settings.home / "log"
    if not dsn:
        command = ("-m", "sia_events.infra.chdb_server", "--path", str(store), "--die-with-parent")
        keeper = Child("the log's owner", (sys.executable, *command))
        dsn = (await keeper.start())["dsn"]
    try:
        while True:
            # Never opened here: while the owner is being started again we would be in its way.
            if keeper and (held := owner(store)) and held.dsn:
                dsn = held.dsn
            try:
                log = await asyncio.to_thread(clickhouse.connect, dsn)
                try:
                    await log.keep_traces(settings.days_in_tables)
                    await require_same(settings, streams, log)
                    await look_for_a_new_log(bus, log)
                    leaving = asyncio.create_task(_leave_witness(settings, streams, log))
                    try:
                        await record(bus, log)
                    finally:
                        leaving.cancel()
                        await asyncio.gather(leaving, return_exceptions=True)
                finally:
                    await log.close()
            except clickhouse.LogUnavailable:
                # The stream keeps everything; the owner is being started again.
                await asyncio.sleep(OWNER_S)
            except (clickhouse.LogFull, clickhouse.QueryRefused, RunTooNew) as error:
                # So it does here: what holds the log up costs lag and no run.
                if time.monotonic() - told >= TOLD_S:
                    told = time.monotonic()
                    print(f"sia: {_waits(error)}", file=sys.stderr)
                await asyncio.sleep(TOLD_S if isinstance(error, RunTooNew) else ROOM_S)
    finally:
        with suppress(TimeoutError, BusUnreachable, OSError):
            async with asyncio.timeout(MARK_S):
                await mark_copied(settings, bus)
        if keeper:
            await keeper.close()


async def require_ours(settings: Settings, streams: Streams) -> None:
    """To be had before a run is written to: its records are to come into the home's log. Raises OtherStreams."""
    if not settings.log_dsn and not (settings.home / "log").is_dir():
        return
    if not await has_witness(settings, streams):
        async with open_log(settings) as log:
            await require_same(settings, streams, log)


async def _leave_witness(settings: Settings, streams: Streams, log: clickhouse.ClickHouseLog) -> None:
    """Once the log has something, so that nobody has to open it to tell what it was filled from."""
    while await log.first_of_some_run() is None:  # noqa: ASYNC110 - tables tell nobody
        await asyncio.sleep(OWNER_S)
    await require_same(settings, streams, log)


async def look_for_a_new_log(bus: Bus, log: clickhouse.ClickHouseLog) -> None:
    """A log without a row is a new one, whatever was copied before: the old one was lost, or left out of a backup."""
    if await log.is_empty():
        await bus.rewind(NAME)


def _waits(error: Exception) -> str:
    """Why the log waits, and until when."""
    said = str(error).removesuffix(".")
    if isinstance(error, RunTooNew):
        return f"{said}. The stream keeps it, the log waits there, other runs go on"
    if isinstance(error, clickhouse.LogFull):
        return f"{said}. The stream keeps it, and the log goes on when there is room"
    return f"the log does not take what comes: {said}. The stream keeps it, the log goes on when it does, runs go on"


def is_behind(settings: Settings) -> bool:
    """Whether the embedded streams may have what the log has not; no server is started to tell."""
    store, mark = settings.home / "nats", settings.home / COPIED
    gone = settings.log_dsn is None and not (settings.home / "log").is_dir() and bool(nats_disk.sizes(store))
    return settings.nats_url is None and (gone or nats_disk.has_news(store, mark))


async def mark_copied(settings: Settings, bus: Bus) -> None:
    """Note how far the embedded streams had come, if the log has all of it; what comes later shows as news."""
    if settings.nats_url is None:
        # Looked at first: what comes between the two looks must not pass for copied.
        copied = nats_disk.sizes(settings.home / "nats")
        if copied and await lag(bus) <= 0:
            nats_disk.keep(copied, settings.home / COPIED)


def forget_copied(settings: Settings) -> None:
    """What the log has is about to be less."""
    (settings.home / COPIED).unlink(missing_ok=True)
