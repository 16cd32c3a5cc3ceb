"""The log filled anew from the streams, unless it has what they have not."""

from contextlib import suppress

from sia_events import app, log_here
from sia_events.catching_up import only_in_tables, settled
from sia_events.errors import Unusable
from sia_events.event_log import recorder
from sia_events.home import hold
from sia_events.infra.clickhouse import ClickHouseLog, QueryRefused
from sia_events.log_here import open_log
from sia_events.same_streams import require_same
from sia_events.shared.settings import Settings
from sia_events.verifying import look_at_all


async def rebuild(settings: Settings, lose_old: bool = False) -> int:
    """Empty the log's tables and copy both streams into them again; returns how many runs the log holds then.

    Raises Unusable, and empties nothing, where tables have, or may have, what the streams have not: traces that these
    let go by their age, or what was lost there; and OtherStreams. `lose_old` allows it.
    """
    await settled(settings)
    async with hold(settings, "rebuild"), app.stores(settings) as node, open_log(settings) as log:
        if not lose_old:
            with suppress(QueryRefused):  # of tables that cannot be read the next question tells
                await require_same(settings, node.streams, log)
        if not lose_old and (why := await _lost_with_them(settings, node, log)):
            raise Unusable(
                f"{why}, and would be lost; nothing was removed. `sia verify --all --repair` puts back what streams "
                "lost, and mends tables without emptying them; `sia archive` makes a copy of a run; to lose what the "
                "tables alone have: sia rebuild --lose-old-traces"
            )
        log_here.forget_copied(settings)
        await recorder.rebuild(node.bus, log)
        await log_here.mark_copied(settings, node.bus)
        return len(await log.runs())


async def _lost_with_them(settings: Settings, node: app.Node, log: ClickHouseLog) -> str:
    """What would go with the tables' rows; nothing, where that is none."""
    if why := await only_in_tables(settings, node, log):
        return why
    try:
        if not await log.runs():
            return ""
        alone = sorted((await look_at_all(settings, node, log)).in_tables_alone)
    except QueryRefused:
        lost = [stream for stream in node.streams.histories() if (await node.streams.lost(stream))[1]]
        return f"the tables cannot be read, and may have what {' and '.join(lost)} lost" if lost else ""
    return f"the tables have, or may have, what the streams lost of {', '.join(alone[:5])}" if alone else ""
