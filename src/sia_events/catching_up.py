"""The log brought up to date for those who read, where the last recorder had not copied all."""

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from sia_events import app, log_here
from sia_events.errors import MENDABLE, NodeHeld
from sia_events.event_log import recorder
from sia_events.home import hold, running_node
from sia_events.infra.clickhouse import ClickHouseLog, QueryRefused
from sia_events.log_here import open_log
from sia_events.same_streams import OtherStreams, require_same
from sia_events.shared.ports import Log
from sia_events.shared.settings import Settings

PURPOSE = "catch-up"
CATCH_UP_S = 60.0


@asynccontextmanager
async def current_log(settings: Settings) -> AsyncIterator[Log]:
    """The log, for reading, with everything in it that the embedded streams have; what is missing is told on stderr."""
    await _catch_up(settings)
    async with open_log(settings) as log:
        yield log


async def settled(settings: Settings) -> Mapping[str, object] | None:
    """`home.running_node`, once no reader is in the way by bringing the log up to date."""
    while (running := running_node(settings)) and running.get("purpose") == PURPOSE:  # noqa: ASYNC110 - a lock tells nobody
        await asyncio.sleep(app.POLL_S)
    return running


async def _catch_up(settings: Settings) -> None:
    """Copy what the log lacks, unless somebody runs the services: their recorder does."""
    while log_here.is_behind(settings) and not await settled(settings):
        try:
            async with hold(settings, PURPOSE):
                await _copy(settings)
            return
        except NodeHeld:
            continue  # somebody was quicker: another reader, or services
        except OtherStreams as error:
            print(f"sia: {error}", file=sys.stderr)
            return
        except (*MENDABLE, TimeoutError, OSError) as error:
            why = str(error) or f"not done within {CATCH_UP_S:.0f} s, the next look goes on with it"
            print(f"sia: more may stand in {settings.home / 'nats'} than the log shows: {why}", file=sys.stderr)
            return


async def _copy(settings: Settings) -> None:
    async with asyncio.timeout(CATCH_UP_S), app.stores(settings) as node, open_log(settings) as log:
        await require_same(settings, node.streams, log)
        await log_here.look_for_a_new_log(node.bus, log)
        if behind := await recorder.lag(node.bus):
            print(f"sia: bringing the log up to date: {behind} messages behind the streams", file=sys.stderr)
        await recorder.catch_up(node.bus, log)
        await log_here.mark_copied(settings, node.bus)


async def only_in_tables(settings: Settings, node: app.Node, log: ClickHouseLog) -> str:
    """What the tables are to keep for longer than the streams, and have or may have; nothing, where that is none."""
    if settings.days_in_tables == settings.trace_days:
        return ""
    try:
        oldest = await log.oldest_lines()
    except QueryRefused:
        return "the tables cannot be read; traces that the streams have let go by their age may stand there"
    firsts = {run: await node.streams.first(node.streams.holding("SIA_TRACE", run)) for run in oldest}
    old = sorted(run for run, sequence in oldest.items() if sequence < firsts[run])
    runs = f"run {old[0]}" if len(old) == 1 else f"{len(old)} runs"
    return f"traces of {runs} stand in the tables alone, as the streams have let them go by their age" if old else ""
