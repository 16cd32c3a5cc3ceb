"""`sia status`: how far the recorder is, how full the streams are, what was given up on, and who is up."""

import shutil
from collections import Counter
from dataclasses import asdict
from typing import Any

from sia_events import app, gateway_here, log_here
from sia_events.catching_up import settled
from sia_events.event_log import recorder
from sia_events.home import is_taken
from sia_events.infra.clickhouse import LogUnavailable
from sia_events.infra.store_lock import StoreHeld
from sia_events.log_here import open_log
from sia_events.shared.letters import letters
from sia_events.shared.run import fold
from sia_events.shared.settings import Settings

# Tables that a ClickHouse server writes about itself, and keeps for ever unless told otherwise.
UNBOUNDED = """\
SELECT name FROM system.tables
WHERE database = 'system' AND engine LIKE '%MergeTree' AND engine_full NOT LIKE '% TTL %' ORDER BY name"""
TABLES = """\
SELECT table, sum(rows) AS rows, sum(bytes_on_disk) AS bytes, count() AS parts FROM system.parts
WHERE active AND database = currentDatabase() GROUP BY table ORDER BY table"""
LOG_S = 5.0


async def status(settings: Settings) -> dict[str, Any]:
    """{home, process, up, services, lag, streams, log, tables, unbounded, runs, letters, free}.

    `process` runs the services of this home; `up` has those of the gateway and the recorder that run here. `services`
    has by service what waits for it, what it is at, and for how many runs somebody asks. `lag` is in messages. `runs`
    are counted by status, `letters` are the open ones. `log` says why the log does not answer, where it does not.
    `unbounded` are ClickHouse's own tables that only grow.
    """
    running = await settled(settings)
    up = [name for name in (gateway_here.NAME, log_here.NAME) if is_taken(name, settings)]
    async with app.stores_of_home(settings, "status", running is not None) as node:
        histories = [await node.bus.history(name) for name in await node.bus.runs()]
        sizes = await node.streams.sizes(recorder.NAME)
        found: dict[str, Any] = {
            "home": str(settings.home),
            "process": dict(running) if running else None,
            "up": up,
            "services": await _services(node),
            "lag": sum(size.lag or 0 for size in sizes),
            "streams": [asdict(size) for size in sizes],
            **await _log(settings),
            "runs": dict(Counter(fold(history).status for history in histories)),
            "letters": sum(
                each.state == "open" and each.record.run == history[-1].run
                for history in histories
                for each in letters(history)
            ),
            "free": shutil.disk_usage(settings.home).free,
        }
    return found


async def _log(settings: Settings) -> dict[str, Any]:
    """What the log tells of itself. The lag shows while it does not answer: that is when somebody asks for it."""
    try:
        async with open_log(settings, LOG_S) as log:
            tables, unbounded = await log.query(TABLES), await log.query(UNBOUNDED)
    except (LogUnavailable, StoreHeld) as error:
        return {"log": str(error), "tables": [], "unbounded": []}
    return {"log": None, "tables": [dict(row) for row in tables], "unbounded": [row["name"] for row in unbounded]}


async def _services(node: app.Node) -> dict[str, dict[str, int]]:
    found = {name: {"waiting": 0, "out": 0, "runs": 0} for name in app.SERVICES}
    for consumer in await node.streams.consumers():
        for name, counts in found.items():
            if consumer.name.startswith(f"{name}-"):
                counts["waiting"] += consumer.waiting
                counts["out"] += consumer.out
                counts["runs"] += consumer.up
    return found
