"""The log in ClickHouse: one class and one SQL for chDB in this process, its owner process, and a server."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import clickhouse_connect
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import DatabaseError, OperationalError, ProgrammingError

from sia_events.infra.chdb_engine import ENGINE_OPTIONS, NO_SPACE, UPGRADING
from sia_events.infra.room import lacking, too_little
from sia_events.infra.store_lock import StoreHeld, claim
from sia_events.shared.ports import Envelope, Rows
from sia_events.shared.record import Record, parse_record, to_wire

# What its driver meets it raises too: an owner that ends while it answers is asked again, and that is nobody's news.
logging.getLogger("clickhouse_connect").addHandler(logging.NullHandler())

TRACES = ("model_calls", "trace")
TABLES = ("events", *TRACES)
# Servers differ in their defaults, and the defaults have changed between releases: nothing is left to them.
# Without async_insert=0 an insert may be acknowledged from memory.
SETTINGS = {"async_insert": "0", "wait_for_async_insert": "1", "insert_deduplicate": "1", "max_threads": "2"}
TABLE_SETTINGS = ("fsync_after_insert = 1", "fsync_part_directory = 1", "non_replicated_deduplication_window = 10000")
# What tells a row that belongs in its place from another.
MARKS = {"events": "lower(hex(SHA256(record)))"} | dict.fromkeys(
    TRACES, "lower(hex(SHA256(concat(toString(sequence), ' ', toString(line), ' ', body))))"
)
# LIMIT 1 BY: a batch stored twice is collapsed only when parts are merged.
EACH_ONCE = "SELECT position, record FROM events WHERE run = {run:String} ORDER BY position LIMIT 1 BY position"
MENDED_AT_ONCE = 500  # that are named in one statement
READERS_S = 5.0
ANSWER_S = 300.0  # what somebody asks in SQL may take its time
TABLE_EXISTS = 57
UPGRADE_S, LOOK_S = 30.0, 0.05

T = TypeVar("T")


class StoreTooNew(Exception):
    """The store was written by a later release."""


class StoreUnsafe(Exception):
    """The server or the tables lack a setting without which an acknowledged row could be lost."""


class LogUnavailable(Exception):
    """The log does not answer; the stream keeps everything until it does."""


class LogFull(Exception):
    """The disk under the log is full; the batch was not stored and comes again."""


class QueryRefused(Exception):
    """The engine refused a statement; the message is its own."""


def connect(dsn: str, answer_s: float = ANSWER_S) -> "ClickHouseLog":
    """Open the log and bring its schema up to date. Blocking: it opens files or sockets.

    A server, or an owner, that leaves a question without an answer for `answer_s` counts as away.

    `chdb:///path` is the embedded store: opened in this process, or, when an owner process holds it, asked through
    that. `clickhouse://user:password@host:port/database` is a server, or an owner named directly.
    Raises StoreHeld, StoreTooNew, StoreUnsafe, LogUnavailable, LogFull.
    """
    url = urlsplit(dsn)
    if url.scheme != "chdb":
        local = url.hostname in ("127.0.0.1", "localhost", "::1")
        # Compression costs more than it saves on loopback. Without a session any thread may use the client.
        remote = {
            "dsn": dsn,
            "compress": not local,
            "autogenerate_session_id": False,
            "send_receive_timeout": answer_s,
        }
        return _open(lambda **more: clickhouse_connect.get_client(**remote, **more), ExitStack())
    path = Path(unquote(url.path))
    options = {"interface": "chdb", "path": str(path), "chdb_options": ENGINE_OPTIONS}
    deadline = time.monotonic() + READERS_S
    while True:
        held = ExitStack()
        try:
            held.enter_context(claim(path))
            if not path.exists() and (full := lacking(path)):
                raise LogFull(full)
            return _open(lambda **more: clickhouse_connect.get_client(**options, **more), held, alone=True)
        except StoreHeld as error:
            if error.owner and error.owner.dsn:
                return connect(error.owner.dsn, answer_s)
            # Somebody who reads, as we do, and is done soon; or an owner that has not said yet how to ask it.
            if time.monotonic() > deadline:
                raise
        except (LogUnavailable, QueryRefused) as error:
            # The engine of a process that has just let go of the store may not have let go of its files yet.
            if time.monotonic() > deadline:
                raise LogUnavailable(
                    f"the event log in {path} cannot be opened; it may be damaged. All that it has is on the streams: "
                    f"move that folder away, then sia rebuild. The engine said: {error.__cause__ or error}"
                ) from error
        time.sleep(0.05)


class ClickHouseLog:
    """The `Log` port. Calls run in threads; closing waits for none of them."""

    def __init__(self, writer: Client, reader: Client, held: ExitStack) -> None:
        self._writer = writer
        self._reader = reader
        self._held = held

    async def append(self, records: Sequence[Record], token: str) -> None:
        await self._insert("events", {"record": "String"}, [(to_wire(record),) for record in records], token)

    async def append_traces(self, envelopes: Sequence[tuple[int, Envelope]], token: str) -> None:
        calls, rest = _trace_rows(envelopes)
        place = {"sequence": "UInt64", "line": "UInt32", "body": "String"}
        name = "LowCardinality(String)"
        await self._insert("model_calls", {"run": name, "key": "String", **place}, calls, token)
        await self._insert("trace", {"run": name, "kind": name, "key": "String", **place}, rest, token)

    async def records(self, run: str) -> Sequence[Record]:
        return await self._call(lambda: [parse_record(row[1]) for row in self._bytes(EACH_ONCE, {"run": run})])

    async def wires(self, run: str) -> Sequence[tuple[int, bytes]]:
        return await self._call(lambda: [(int(row[0]), row[1]) for row in self._bytes(EACH_ONCE, {"run": run})])

    async def runs(self) -> Sequence[str]:
        sql = "SELECT run FROM events GROUP BY run ORDER BY min(time), run"
        return [row["run"] for row in await self.query(sql)]

    async def first_of_some_run(self) -> tuple[str, bytes] | None:
        """(run, bytes of its first record) of whatever run the engine comes upon first; None where there is none."""
        sql = (
            "SELECT toString(run) AS run, record FROM events WHERE run IN (SELECT run FROM events LIMIT 1) "
            "ORDER BY position LIMIT 1"
        )
        rows = await self._call(lambda: self._bytes(sql, {}))
        return (rows[0][0].decode(), rows[0][1]) if rows else None

    async def is_empty(self) -> bool:
        """Whether no table has a row; the engine knows that without reading any."""
        counts = " + ".join(f"(SELECT count() FROM {table})" for table in TABLES)
        return (await self.query(f"SELECT {counts} AS n"))[0]["n"] == 0

    async def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> Sequence[Mapping[str, Any]]:
        return await self._call(lambda: self._rows(sql, dict(parameters or {})))

    async def rows(self, run: str) -> Sequence[tuple[int, bytes]]:
        """(position, bytes) of every row of the run's records, doubled ones too. Raises QueryRefused for torn parts."""
        sql = "SELECT position, record FROM events WHERE run = {run:String} ORDER BY position"
        return await self._call(lambda: [(int(row[0]), row[1]) for row in self._bytes(sql, {"run": run})])

    async def lines(self, run: str) -> Sequence[tuple[int, int, str]]:
        """(sequence, line, SHA-256 in hex) of every row of the run's traces. Raises QueryRefused for torn parts."""
        columns = "sequence, line, lower(hex(SHA256(body))) AS digest"
        sql = " UNION ALL ".join(f"SELECT {columns} FROM {table} WHERE run = {{run:String}}" for table in TRACES)
        rows = await self.query(f"{sql} ORDER BY sequence, line", {"run": run})
        return [(row["sequence"], row["line"], row["digest"]) for row in rows]

    async def oldest_lines(self) -> Mapping[str, int]:
        """By run the lowest sequence of its traces. Raises QueryRefused for torn parts."""
        each = " UNION ALL ".join(f"SELECT run, sequence FROM {table}" for table in TRACES)
        rows = await self.query(f"SELECT run, min(sequence) AS oldest FROM ({each}) GROUP BY run")
        return {row["run"]: row["oldest"] for row in rows}

    async def newest_line(self) -> int:
        """The highest sequence that any trace has here, 0 without one. Raises QueryRefused for torn parts."""
        each = " UNION ALL ".join(f"SELECT max(sequence) AS newest FROM {table}" for table in TRACES)
        return (await self.query(f"SELECT max(newest) AS newest FROM ({each})"))[0]["newest"]

    async def envelopes(self, run: str, sequences: Sequence[int]) -> Sequence[tuple[int, Envelope]]:
        """What the tables have of those envelopes of the run, lines in order."""
        # In hex: a line may be any bytes, and what is no UTF-8 the client would tell otherwise.
        columns = "sequence, line, key, hex(body) AS bytes"
        where = "WHERE run = {run:String} AND sequence IN {some:Array(UInt64)}"
        calls = f"SELECT {columns}, 'model_call' AS kind FROM model_calls FINAL {where}"
        rest = f"SELECT {columns}, kind FROM trace FINAL {where}"
        sql = f"SELECT * FROM ({calls} UNION ALL {rest}) ORDER BY sequence, line"
        found: dict[int, Envelope] = {}
        for row in await self.query(sql, {"run": run, "some": list(sequences)}):
            at = row["sequence"]
            before = found[at].lines if at in found else ()
            found[at] = Envelope(run, row["kind"], row["key"], (*before, bytes.fromhex(row["bytes"])))
        return list(found.items())

    async def torn(self) -> Sequence[tuple[str, str, str]]:
        """(table, part, why) for every part on the disk whose files are not those that were written."""
        found: list[tuple[str, str, str]] = []
        for table in TABLES:
            answer = await self._call(
                lambda table=table: self._reader.raw_query(f"CHECK TABLE {table}", fmt="JSONEachRow")
            )
            for line in answer.splitlines():
                part = json.loads(line)
                if not part["is_passed"]:
                    found.append((table, part["part_path"], part["message"].partition(" (version")[0]))
        return found

    async def mend(self, run: str, records: Sequence[Record], envelopes: Sequence[tuple[int, Envelope]]) -> None:
        """Have these rows, of one run, as they are given, whatever stands in their place.

        They are written before that is taken out: what is given may have been read here, and stand nowhere else.
        """
        for start in range(0, len(records), MENDED_AT_ONCE):
            part = records[start : start + MENDED_AT_ONCE]
            await self.append(part, f"mended {uuid4()}")
            good = [sha256(to_wire(record)).hexdigest() for record in part]
            await self._remove("events", "position", run, [record.position for record in part], good)
        for part in _parts(envelopes):
            await self.append_traces(part, f"mended {uuid4()}")
            sequences = [sequence for sequence, _ in part]
            for table, rows in zip(TRACES, _trace_rows(part), strict=True):
                await self._remove(table, "sequence", run, sequences, [_line_mark(row) for row in rows])

    async def remove_lines(self, run: str, sequences: Sequence[int]) -> None:
        """Take the rows of these envelopes out."""
        for table in TRACES:
            await self._remove(table, "sequence", run, sequences)

    async def _remove(self, table: str, column: str, run: str, values: Sequence[int], good: Sequence[str] = ()) -> None:
        """Take out the rows of these values, but for those whose mark is among the `good`."""
        if not values:
            return
        sql = (
            f"ALTER TABLE {table} DELETE WHERE run = {{run:String}} AND {column} IN {{some:Array(UInt64)}} "
            f"AND {MARKS[table]} NOT IN {{good:Array(String)}} SETTINGS mutations_sync = 2"
        )
        parameters = {"run": run, "some": list(values), "good": list(good)}
        await self._call(lambda: self._writer.command(sql, parameters=parameters))

    async def select(self, sql: str, form: Rows) -> bytes:
        return await self._call(lambda: self._selected(sql, form))

    async def keep_traces(self, days: int | None) -> None:
        """Let traces go so many days after they came in, None: never. The engine takes them out when it merges."""
        end = f"TTL stored + toIntervalDay({days})" if days else ""
        sql = "SELECT engine_full FROM system.tables WHERE database = currentDatabase() AND name = {table:String}"
        for table in TRACES:
            (row,) = await self.query(sql, {"table": table})
            found = re.search(r"TTL .+?(?= SETTINGS|$)", row["engine_full"])
            if end != (found[0] if found else ""):
                change = f"ALTER TABLE {table} {f'MODIFY {end}' if end else 'REMOVE TTL'}"
                await self._call(lambda change=change: self._writer.command(change))

    async def clear(self) -> None:
        # TRUNCATE forgets the tokens too, so the same batches can be inserted again.
        for table in TABLES:
            await self._call(lambda table=table: self._writer.command(f"TRUNCATE TABLE {table}"))

    async def close(self) -> None:
        await asyncio.to_thread(self._held.close)

    async def _insert(self, table: str, columns: Mapping[str, str], rows: list[tuple[Any, ...]], token: str) -> None:
        if not rows:
            return
        await self._call(
            lambda: self._writer.insert(
                table,
                rows,
                column_names=list(columns),
                column_type_names=list(columns.values()),
                settings={"insert_deduplication_token": token},
            )
        )

    def _rows(self, sql: str, parameters: dict[str, Any]) -> Sequence[Mapping[str, Any]]:
        return list(self._reader.query(sql, parameters=parameters).named_results())

    def _selected(self, sql: str, form: Rows) -> bytes:
        sql = sql.strip().rstrip("; \n")
        if ";" in sql:
            # The embedded engine would run what comes behind it, whatever stands before it.
            raise QueryRefused(r"only one SELECT is taken here; a semicolon within a string is written \x3b")
        # `readonly` alone still lets a statement write files. The engine's own grammar tells: nothing but a SELECT, and
        # none that names a file or a format, is both a statement and what may stand in another one's FROM.
        kind = str(self._reader.query(f"EXPLAIN AST {sql}").result_rows[0][0])
        if not kind.startswith("Select"):
            raise QueryRefused(f"only a SELECT is taken here, and this is: {kind.partition(' (')[0].strip()}")
        try:
            self._reader.query(f"EXPLAIN AST SELECT * FROM (\n{sql}\n)")
        except DatabaseError as error:
            raise QueryRefused("only a SELECT is taken here, without INTO OUTFILE and FORMAT") from error
        return bytes(self._reader.raw_query(sql, fmt=form))

    def _bytes(self, sql: str, parameters: dict[str, Any]) -> Sequence[Sequence[bytes]]:
        return self._reader.query(sql, parameters=parameters, query_formats={"String": "bytes"}).result_rows

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.to_thread(_translated, work)


def _trace_rows(
    envelopes: Sequence[tuple[int, Envelope]],
) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The rows of the two tables of TRACES; each ends in sequence, line and body."""
    calls: list[tuple[Any, ...]] = []
    rest: list[tuple[Any, ...]] = []
    for sequence, envelope in envelopes:
        for line, body in enumerate(envelope.lines):
            if envelope.kind == "model_call":
                calls.append((envelope.run, envelope.key, sequence, line, body))
            else:
                rest.append((envelope.run, envelope.kind, envelope.key, sequence, line, body))
    return calls, rest


def _line_mark(row: tuple[Any, ...]) -> str:
    """As MARKS has it."""
    *_, sequence, line, body = row
    return sha256(b"%d %d %b" % (sequence, line, body)).hexdigest()


def _parts(envelopes: Sequence[tuple[int, Envelope]]) -> Iterator[list[tuple[int, Envelope]]]:
    """The envelopes in parts of MENDED_AT_ONCE lines or little more."""
    part, lines = list[tuple[int, Envelope]](), 0
    for each in envelopes:
        part.append(each)
        lines += len(each[1].lines)
        if lines >= MENDED_AT_ONCE:
            yield part
            part, lines = [], 0
    if part:
        yield part


def migrations() -> list[tuple[int, list[str]]]:
    """The schema's migrations in order: number and statements."""
    text = files("sia_events.event_log").joinpath("schema.sql").read_text()
    parts = re.split(r"^-- migration (\d+)$", text, flags=re.MULTILINE)[1:]
    return [
        (int(number), [sql.strip() for sql in re.split(r";[^\S\n]*$", body, flags=re.MULTILINE) if sql.strip()])
        for number, body in zip(parts[::2], parts[1::2], strict=True)
    ]


def _open(client: Callable[..., Client], held: ExitStack, alone: bool = False) -> ClickHouseLog:
    """Two clients on one store: one writes, the other is held to reading by the engine itself.

    `alone` says that nobody else has the store open.
    """
    with held:
        writer = _translated(lambda: client(settings=SETTINGS, tz_mode="aware"))
        held.callback(writer.close)
        if alone:
            _translated(lambda: writer.command(f"DROP TABLE IF EXISTS {UPGRADING}"))
        _translated(lambda: _migrate(writer))
        _translated(lambda: _check(writer))
        reader = _translated(lambda: client(settings={**SETTINGS, "readonly": "2"}, tz_mode="aware"))
        held.callback(reader.close)
        return ClickHouseLog(writer, reader, held.pop_all())


def _migrate(client: Client) -> None:
    """Return when the store has seen every migration. Raises StoreTooNew before anything is touched.

    Of those who come at once one applies them, and the others wait: nobody looks at a view that is just being replaced.
    """
    if not client.query("EXISTS TABLE schema_version").result_rows[0][0]:
        _require_room(client)
        client.command(
            "CREATE TABLE IF NOT EXISTS schema_version (version UInt32, applied DateTime DEFAULT now()) "
            "ENGINE = ReplacingMergeTree ORDER BY version SETTINGS fsync_after_insert = 1, fsync_part_directory = 1"
        )
    ours = migrations()
    patience = time.monotonic() + UPGRADE_S
    while (found := _version(client)) < ours[-1][0]:
        _require_room(client)
        if not _upgrading(client):
            if time.monotonic() > patience:
                # Whoever began it has died over it.
                client.command(f"DROP TABLE IF EXISTS {UPGRADING}")
            time.sleep(LOOK_S)
            continue
        try:
            found = _version(client)  # somebody may have been quicker
            for version, statements in ours:
                if version > found:
                    for statement in statements:
                        _require_room(client)
                        client.command(statement)
                    client.insert("schema_version", [(version,)], ["version"], column_type_names=["UInt32"])
        finally:
            client.command(f"DROP TABLE IF EXISTS {UPGRADING}")
    if found > ours[-1][0]:
        raise StoreTooNew(
            f"the event log is of schema {found}; this release knows schemas up to {ours[-1][0]}. "
            "Nothing was changed. Use the release that wrote it, or set SIA_HOME to another folder."
        )


def _require_room(client: Client) -> None:
    """Raises LogFull where a table may be left half made."""
    for (free,) in client.query("SELECT free_space FROM system.disks WHERE name = 'default'").result_rows:
        if full := too_little("the event log", free):
            raise LogFull(full)


def _version(client: Client) -> int:
    return int(client.query("SELECT max(version) FROM schema_version").result_rows[0][0])


def _upgrading(client: Client) -> bool:
    """Whether it falls to us: a table of one name is made by one client only."""
    try:
        client.command(f"CREATE TABLE {UPGRADING} (nothing UInt8) ENGINE = Null")
    except DatabaseError as error:
        if error.code == TABLE_EXISTS:
            return False
        raise
    return True


def _check(client: Client) -> None:
    """Read back what durability rests on. Raises StoreUnsafe."""
    names = ", ".join(f"'{name}'" for name in SETTINGS)
    rows = client.query(f"SELECT name, value FROM system.settings WHERE name IN ({names})").result_rows
    for name, value in rows:
        if value != SETTINGS[name]:
            raise StoreUnsafe(f"the log's server insists on {name} = {value}; it has to be {SETTINGS[name]}")
    tables = client.query(
        "SELECT name, engine_full FROM system.tables "
        "WHERE database = currentDatabase() AND name IN {names:Array(String)}",
        parameters={"names": list(TABLES)},
    ).result_rows
    for name, engine in tables:
        for setting in TABLE_SETTINGS:
            if setting not in engine:
                raise StoreUnsafe(f"the log's table {name} was made without `{setting}`; rebuild it from the stream")


def _translated(work: Callable[[], T]) -> T:
    """Run `work` with the vendor's exceptions turned into ours."""
    try:
        return work()
    except (OperationalError, ProgrammingError, RuntimeError) as error:
        raise LogUnavailable(f"the event log cannot be opened or does not answer: {error}") from error
    except DatabaseError as error:
        if error.code == NO_SPACE or "No space left on device" in str(error):
            raise LogFull(f"the disk under the event log is full, nothing of this batch was stored: {error}") from error
        raise QueryRefused(str(error)) from error
