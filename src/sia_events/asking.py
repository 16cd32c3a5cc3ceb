"""Questions in SQL to the log: what somebody's own SELECT finds, and what there is to ask."""

import json
from typing import Any

from sia_events.reading import look
from sia_events.shared.ports import Log
from sia_events.shared.settings import Settings

VIEWS = ("runs", "versions", "scores", "model_calls", "costs", "lineage", "ancestors", "dead_letters", "logs")
COLUMNS = """
SELECT table, groupArray(name) AS columns
FROM (SELECT table, name FROM system.columns
      WHERE database = currentDatabase() AND table IN {views:Array(String)} ORDER BY table, position)
GROUP BY table
"""


async def rows(settings: Settings, sql: str) -> list[dict[str, Any]]:
    """What a SELECT finds, a mapping a row, in JSON's terms. Raises QueryRefused for what writes or is no SQL."""

    async def ask(log: Log) -> bytes:
        return await log.select(sql, "JSONEachRow")

    # A string of the engine's may be any bytes.
    return [json.loads(line.decode(errors="replace")) for line in (await look(settings, ask)).splitlines()]


async def parquet(settings: Settings, sql: str) -> bytes:
    """The same as a Parquet file."""

    async def ask(log: Log) -> bytes:
        return await log.select(sql, "Parquet")

    return await look(settings, ask)


async def views(settings: Settings) -> list[dict[str, Any]]:
    """What there is to ask: {table, columns} of every documented view, in the order of the documentation."""

    async def ask(log: Log) -> list[dict[str, Any]]:
        return [dict(row) for row in await log.query(COLUMNS, {"views": list(VIEWS)})]

    return sorted(await look(settings, ask), key=lambda row: VIEWS.index(row["table"]))
