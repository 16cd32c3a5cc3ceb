"""What can be read in a home when all is over: of the stream, of the tables, and of the journal."""

from collections.abc import Sequence
from pathlib import Path

from checker import Held, Line
from witness import lines_of, reply_of

from sia_events import app
from sia_events.log_here import open_log
from sia_events.shared.calls import decode_call
from sia_events.shared.settings import Settings

LINES = """\
SELECT run, kind, key, lower(hex(SHA256(body))) AS digest FROM (
    SELECT run, 'model_call' AS kind, key, sequence, line, body FROM model_calls
    UNION ALL SELECT run, kind, key, sequence, line, body FROM trace
) ORDER BY sequence, line
"""


async def held(home: Path, paid: Sequence[str]) -> Held:
    """The tables' rows as they lie there: what readers would collapse is seen too."""
    settings = Settings(home=home)
    async with app.stores_of_home(settings, "verify", False) as node, open_log(settings) as log:
        runs = await node.streams.runs()
        envelopes = [each for run in runs async for each in node.streams.envelopes(run)]
        envelopes = [envelope for _, envelope in sorted(envelopes, key=lambda each: each[0])]
        tables: dict[str, list[bytes]] = {run: [] for run in await log.runs()}
        for row in await log.query("SELECT run, record FROM events ORDER BY run, position"):
            tables[row["run"]].append(row["record"].encode())
        calls = [(e.run, decode_call(line)) for e in envelopes if e.kind == "model_call" for line in e.lines]
        return Held(
            stream={run: [each.body async for each in node.streams.messages("SIA", run)] for run in runs},
            tables=tables,
            lines=[line for envelope in envelopes for line in lines_of(envelope)],
            tabled_lines=[Line(r["run"], r["kind"], r["key"], r["digest"]) for r in await log.query(LINES)],
            journal=[reply_of(run, call) for run, call in calls if call.reply is not None],
            paid=paid,
        )
