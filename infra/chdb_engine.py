"""chDB inside the owner process: statements, parameters and settings of one request, each on a handle of its own."""

import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from sia_events.infra.room import lacking

# Server settings of the engine: it owns a small store on somebody's laptop, not a machine.
ENGINE_OPTIONS = {
    "mark_cache_size": 16 << 20,
    "primary_index_cache_size": 16 << 20,
    "index_mark_cache_size": 4 << 20,
    "compiled_expression_cache_size": 1 << 20,
    "query_condition_cache_size": 1 << 20,
    "mmap_cache_size": 64,
    "max_thread_pool_size": 256,
    "max_io_thread_pool_size": 16,
    "max_active_parts_loading_thread_pool_size": 4,
    "max_outdated_parts_loading_thread_pool_size": 4,
    "max_parts_cleaning_thread_pool_size": 4,
}
# For the owner alone: the engine holds the whole process to it, which may be a big one where the engine is a guest.
OWNER_OPTIONS = {**ENGINE_OPTIONS, "max_server_memory_usage": 1 << 30}
SESSION_SETTINGS = {"max_threads": "2", "async_insert": "0", "log_queries": "0", "compile_expressions": "0"}
# Parameters of the HTTP protocol itself; everything else in the URL is a setting.
PROTOCOL_PARAMETERS = frozenset({
    "query", "database", "default_format", "user", "password", "quota_key", "role", "query_id", "session_id",
    "session_timeout", "session_check", "compress", "decompress", "enable_http_compression", "buffer_size",
    "wait_end_of_query", "send_progress_in_http_headers", "http_headers_progress_interval_ms",
    "client_protocol_version",
})  # fmt: skip
# Formats whose blocks may be sent one after another: no header or footer around the whole.
STREAMABLE = frozenset({"Native", "RowBinary", "JSONEachRow", "TabSeparated", "TSV", "CSV"})
STATEMENT_LIMIT = 1 << 20
# The table that whoever brings the schema up to date makes first and drops last. One that is there when the store is
# opened was left by somebody who died over it: nobody else can have the store open.
UPGRADING = "upgrading"
NO_SPACE = 243  # ClickHouse's NOT_ENOUGH_SPACE
# Statements at once; more wait their turn. Memory goes with the number of them, not with the size of the store.
CONCURRENT = 4
# A table of fewer bytes is merged into one part when the store is closed: a second of work at most.
SMALL = 8 << 20

_INSERT = re.compile(
    rb"\s*(?P<into>INSERT\s+INTO\s+(?:TABLE\s+)?[^\s(]+\s*(?:\([^)]*\))?)"
    rb"\s*(?P<settings>SETTINGS\s[^;]*?)?\s*(?:FORMAT\s+(?P<format>\w+)[^\S\n]*\n?|VALUES\b)",
    re.IGNORECASE,
)
_RESULT = re.compile(rb"\s*(?:SELECT|WITH|SHOW|DESC|DESCRIBE|EXISTS|EXPLAIN|CHECK|\()", re.IGNORECASE)
_SELECT = re.compile(rb"\s*(?:SELECT|WITH)\b", re.IGNORECASE)
_FORMAT = re.compile(rb"\bFORMAT\s+(\w+)\s*;?\s*$", re.IGNORECASE)
_CODE = re.compile(r"Code: (\d+)\. DB::Exception: (.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Failure(Exception):
    """The engine refused or failed; `code` is ClickHouse's error code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Read chDB's RuntimeError, which carries code and text in one string."""
        match = _CODE.search(str(error))
        return cls(int(match[1]), match[2].strip()) if match else cls(1002, str(error) or type(error).__name__)


@dataclass(frozen=True)
class Request:
    """What one HTTP request asks for."""

    text: bytes
    format: str
    database: str
    parameters: Mapping[str, str]
    settings: Mapping[str, str]
    streams: bool

    @classmethod
    def of(cls, url: Mapping[str, str], body: bytes, read_only: bool) -> "Request":
        query = url.get("query", "").encode()
        text = query + b"\n" + body if query and body else query or body
        trailing = _FORMAT.search(text[-256:])
        form = trailing[1].decode() if trailing else url.get("default_format", "TabSeparated")
        settings = {k: v for k, v in url.items() if k not in PROTOCOL_PARAMETERS and not k.startswith("param_")}
        if read_only:
            settings.setdefault("readonly", "2")
        return cls(
            text=text,
            format=form,
            database=url.get("database", ""),
            parameters={k.removeprefix("param_"): v for k, v in url.items() if k.startswith("param_")},
            settings=settings,
            streams=url.get("wait_end_of_query") != "1" and form in STREAMABLE and bool(_SELECT.match(text)),
        )


@dataclass(frozen=True)
class Reply:
    """A whole result and the headers that describe it."""

    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class Engine:
    """The one open data folder. Sessions are cheap (0.3 ms) and share nothing but the data."""

    def __init__(self, path: Path, spool: Path) -> None:
        self._path = path
        self._spool = spool
        self._first: Any = None
        self._slots = threading.BoundedSemaphore(CONCURRENT)

    def open(self) -> None:
        """Open or create the folder. Raises Failure when the engine cannot."""
        if not self._path.exists() and (full := lacking(self._path)):
            raise Failure(NO_SPACE, full)
        self._spool.mkdir(parents=True, exist_ok=True)
        try:
            self._first = self._connect(f"{self._path}?{urlencode(OWNER_OPTIONS)}")
            Session(self._first, self._spool).run(Request.of({}, f"DROP TABLE IF EXISTS {UPGRADING}".encode(), False))
        except Failure as failure:
            # The engine gives its reason on stderr only; what comes back is an empty sentence.
            raise Failure(
                failure.code,
                f"the store {self._path} cannot be opened: {failure} The engine's own words stand above. "
                "Nothing was changed; see that the disk is not full and that the folder is yours to write. Where it is "
                "damaged (a disk that fills up while tables are made can do that): all that it has is on the streams. "
                "Move that folder away, then sia rebuild.",
            ) from failure

    def close(self) -> None:
        """Tidy the folder and let go of it. Raises Failure where it cannot be tidied; it is let go of all the same."""
        try:
            self._tidy()
        except RuntimeError as error:
            raise Failure.of(error) from error
        finally:
            self._first.close()

    def _tidy(self) -> None:
        """Leave a small table one part, and any table only parts in use: each takes a dozen disk blocks at least."""
        sql = (
            f"SELECT table, countIf(active) > 1 AND sumIf(bytes_on_disk, active) < {SMALL} FROM system.parts "
            "WHERE database = currentDatabase() GROUP BY table"
        )
        for row in self._first.query(sql, "TabSeparated").bytes().decode().splitlines():
            table, small = row.split("\t")
            if small == "1":
                self._first.query(f"OPTIMIZE TABLE `{table}` FINAL")
            # There is no such partition, so nothing is dropped; what merges have replaced is cleared away with it.
            # By itself the engine clears only now and then, and not when it ends.
            self._first.query(f"ALTER TABLE `{table}` DROP PARTITION ID 'none'")

    @contextmanager
    def session(self) -> Iterator["Session"]:
        """A handle for one request: what it sets is gone with it, so no request sees another's settings."""
        with self._slots:
            handle = self._connect(str(self._path))
            try:
                yield Session(handle, self._spool)
            finally:
                handle.close()

    @staticmethod
    def _connect(where: str) -> Any:
        from chdb.state import connect  # importing chdb starts an engine: not before it is wanted

        try:
            return connect(where)
        except RuntimeError as error:
            raise Failure.of(error) from error


class Session:
    """One handle on the engine, for one request."""

    def __init__(self, handle: Any, spool: Path) -> None:
        self._handle = handle
        self._spool = spool

    def run(self, request: Request) -> Reply:
        """Answer with the whole result. Raises Failure."""
        self._prepare(request)
        if insert := _INSERT.match(request.text):
            return self._insert(insert, request.text[insert.end() :])
        self._check_size(request)
        result = self._query(request.text, request.format, request.parameters)
        headers = {"X-ClickHouse-Summary": _summary(result, "read")}
        if _RESULT.match(request.text):
            headers["X-ClickHouse-Format"] = request.format
        return Reply(result.bytes(), headers)

    def stream(self, request: Request) -> Iterator[bytes]:
        """Yield the result block by block. Raises Failure, also half-way."""
        self._prepare(request)
        self._check_size(request)
        try:
            blocks = self._handle.send_query(request.text, request.format, params=dict(request.parameters))
            with blocks:
                yield from (block.bytes() for block in blocks)
        except RuntimeError as error:
            raise Failure.of(error) from error

    def _prepare(self, request: Request) -> None:
        if request.database:
            self._query("USE `{}`".format(request.database.replace("\\", "\\\\").replace("`", "\\`")))
        settings = {**SESSION_SETTINGS, **request.settings}
        for name in settings:
            if not _NAME.fullmatch(name):
                raise Failure(115, f"Unknown setting {name!r}")
        # `readonly` forbids further changes, so it comes last.
        ordered = sorted(settings, key=lambda name: name == "readonly")
        self._query("SET " + ", ".join(f"{name} = {_quoted(settings[name])}" for name in ordered))

    def _insert(self, insert: re.Match[bytes], data: bytes) -> Reply:
        # Never inline: the engine reads only the first MiB of data that stands in a statement, and trims what
        # looks like blanks or a semicolon at its end, which binary rows may well end with. A file is taken whole.
        form = (insert["format"] or b"Values").decode()
        settings = (insert["settings"] or b"").decode()
        with tempfile.NamedTemporaryFile(dir=self._spool, suffix=".rows") as file:
            file.write(data)
            file.flush()
            source = _quoted(file.name)
            result = self._query(f"{insert['into'].decode()} FROM INFILE {source} {settings} FORMAT {form}")
        return Reply(b"", {"X-ClickHouse-Summary": _summary(result, "written")})

    def _query(self, text: str | bytes, form: str = "TabSeparated", parameters: Mapping[str, str] | None = None) -> Any:
        try:
            return self._handle.query(text, form, params=dict(parameters or {}))
        except RuntimeError as error:
            raise Failure.of(error) from error

    @staticmethod
    def _check_size(request: Request) -> None:
        if len(request.text) > STATEMENT_LIMIT:
            raise Failure(62, f"a statement of {len(request.text)} bytes is over the limit of {STATEMENT_LIMIT}")


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _summary(result: Any, verb: str) -> str:
    rows, size, seconds = result.rows_read(), result.bytes_read(), result.elapsed()
    return f'{{"{verb}_rows":"{rows}","{verb}_bytes":"{size}","elapsed_ns":"{int(seconds * 1e9)}"}}'
