"""`sia status`: how far the recorder is, how full the streams are, what was given up on, and who is up."""

import asyncio
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sia_events import app, gateway_here, log_here
from sia_events.catching_up import settled
from sia_events.event_log import recorder
from sia_events.home import is_taken
from sia_events.infra.clickhouse import LogFull, LogUnavailable, QueryRefused
from sia_events.infra.store_lock import StoreHeld
from sia_events.infra.tail import RunIncomplete, RunTooNew
from sia_events.log_here import open_log
from sia_events.reading import interrupted, nobody_runs
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
# Runs of which nothing more can come to be told: they are over, and nothing of them was ever given up on.
OVER = """\
SELECT run, if(countIf(type = 'RunFinished') > 0, 'finished', 'cancelled') AS status FROM events
WHERE type IN ('RunFinished', 'RunCancelled') AND run NOT IN (SELECT run FROM events WHERE type = 'ServiceFailed')
GROUP BY run"""
LOG_S = 5.0
READ_S = 10.0


async def status(settings: Settings) -> dict[str, Any]:
    """{home, process, up, services, lag, streams, log, tables, unbounded, runs, letters, free}.

    `process` runs the services of this home; `up` has those of the gateway and the recorder that run here. `services`
    has by service what waits for it, what it is at, and for how many runs somebody asks. `lag` is in messages. `runs`
    are counted by status, `letters` are the open ones; both None where that takes too long. `log` says why the log
    does not answer, where it does not. `unbounded` are ClickHouse's own tables that only grow.
    """
    running = await settled(settings)
    async with app.stores_of_home(settings, "status", running is not None) as node:
        return await status_on(node, running)


async def status_on(
    node: app.Node, running: Mapping[str, object] | None, read_s: float = READ_S, here: bool = True
) -> dict[str, Any]:
    """The status of a home whose stores are at hand, and whose services somebody is `running`.

    Runs are read for `read_s` seconds at most; not `here`, the embedded log is asked only where it has an owner.
    """
    settings = node.settings
    sizes = await node.streams.sizes(recorder.NAME)
    services = await _services(node)
    log, over = await _log(settings, here)
    runs, open_letters = await _runs(node, over, read_s)
    if runs and nobody_runs(settings, running):
        runs = {interrupted(status): count for status, count in runs.items()}
    return {
        "home": str(settings.home),
        "process": dict(running) if running else None,
        "up": [name for name in (gateway_here.NAME, log_here.NAME) if is_taken(name, settings)],
        "services": services,
        "lag": sum(size.lag or 0 for size in sizes),
        "streams": [asdict(size) for size in sizes],
        **log,
        "runs": runs,
        "letters": open_letters,
        "free": shutil.disk_usage(settings.home).free,
    }


async def _log(settings: Settings, here: bool) -> tuple[dict[str, Any], Mapping[str, str]]:
    """What the log tells of itself, and by run how those ended that are over.

    The lag shows while it does not answer, or lies in torn parts: that is when somebody asks for it.
    """
    try:
        async with open_log(settings, LOG_S, here) as log:
            tables, unbounded, over = [await log.query(sql) for sql in (TABLES, UNBOUNDED, OVER)]
    except (LogUnavailable, LogFull, QueryRefused, StoreHeld) as error:
        return {"log": str(error), "tables": [], "unbounded": []}, {}
    told = {"log": None, "tables": [dict(row) for row in tables], "unbounded": [row["name"] for row in unbounded]}
    return told, {row["run"]: row["status"] for row in over}


async def _runs(node: app.Node, over: Mapping[str, str], read_s: float) -> tuple[dict[str, int] | None, int | None]:
    """Runs by status, and open letters. Those that are `over` are counted, the others read from the stream."""
    counts, open_letters = Counter[str](), 0
    try:
        async with asyncio.timeout(read_s):
            for name in await node.bus.runs():
                if name in over:
                    counts[over[name]] += 1
                    continue
                try:
                    history = await node.bus.history(name)
                except (RunIncomplete, RunTooNew):
                    counts["unreadable"] += 1
                    continue
                counts[fold(history).status] += 1
                open_letters += sum(each.state == "open" and each.record.run == name for each in letters(history))
    except TimeoutError:
        return None, None
    return dict(counts), open_letters


async def _services(node: app.Node) -> dict[str, dict[str, int]]:
    found = {name: {"waiting": 0, "out": 0, "runs": 0} for name in app.SERVICES}
    for consumer in await node.streams.consumers():
        for name, counts in found.items():
            if consumer.name.startswith(f"{name}-"):
                counts["waiting"] += consumer.waiting
                counts["out"] += consumer.out
                counts["runs"] += consumer.up
    return found
