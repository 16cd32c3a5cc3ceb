"""The owner of an embedded store: one process that holds chDB and answers ClickHouse's HTTP protocol on loopback.

chDB lets one process open a data folder, and has no server of its own. So this program opens the folder and speaks
enough of https://clickhouse.com/docs/interfaces/http for an unmodified clickhouse-connect: statements in the URL or
the body, server-side parameters, settings, plain, lz4, zstd, gzip and deflate request bodies, streamed results, error
codes. Replies are not compressed: on loopback that only costs time. Not covered: sessions, external tables, users.

    python -m sia_events.infra.chdb_server --path P [--port N] [--token T] [--die-with-parent]

One JSON line on stdout says that it listens; it ends on SIGTERM, on SIGINT, or when its stdin closes.
"""

import argparse
import hmac
import json
import os
import secrets
import shutil
import signal
import sys
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from sia_events.infra.chdb_engine import Engine, Failure, Reply, Request
from sia_events.infra.http_body import BodyRefused, form_fields, read_body
from sia_events.infra.store_lock import StoreHeld, claim, owner

USER = "sia"
DRAIN_SECONDS = 10.0
STALLED_SECONDS = 60.0
READERS_SECONDS = 15.0  # a store without an owner is opened by whoever reads it, for as long as one question takes
HTTP_STATUS = {36: 400, 46: 404, 60: 404, 62: 400, 81: 404, 115: 404, 164: 403, 241: 507, 243: 507}


class Server(ThreadingMixIn, TCPServer):
    """A thread a connection, and one engine for all. Knows how many requests are being answered."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int, token: str, engine: Engine) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.token = token
        self.engine = engine
        self._busy = 0
        self._idle = threading.Condition()

    def begin(self) -> None:
        with self._idle:
            self._busy += 1

    def end(self) -> None:
        with self._idle:
            self._busy -= 1
            self._idle.notify_all()

    def drain(self) -> bool:
        """Wait for the requests in progress; False when some were still running at the deadline."""
        with self._idle:
            return self._idle.wait_for(lambda: self._busy == 0, DRAIN_SECONDS)


class Handler(BaseHTTPRequestHandler):
    """One connection: a thread that answers its requests in turn."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version = "sia-chdb"
    # Headers and body leave in one segment and at once: otherwise delayed ACKs cost 40 ms a reply.
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: statements are not for the terminal, and failures go to the client with their code."""

    def _answer(self) -> None:
        self.server.begin()
        try:
            self._route()
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True
        finally:
            self.server.end()

    def _route(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/ping":
            self._send(Reply(b"Ok.\n"))
            return
        # Refused before the body is read: who has no token gets no memory. The unread body ends the connection.
        if not self._authorised():
            self.close_connection = True
            self._fail(401, Failure(516, "Authentication failed: the user or the token of this store is wrong."))
            return
        try:
            body = read_body(self.rfile, self.headers)
            parameters = dict(parse_qsl(url.query, keep_blank_values=True))
            if self.headers.get_content_type() == "multipart/form-data":
                parameters |= form_fields(self.headers["Content-Type"], body)
                body = b""
        except BodyRefused as error:
            self.close_connection = True
            self._fail(400, Failure(error.code, str(error)))
            return
        request = Request.of(parameters, body, read_only=self.command == "GET")
        try:
            with self.server.engine.session() as session:
                if request.streams:
                    self._stream(session.stream(request), request)
                else:
                    self._send(session.run(request))
        except Failure as failure:
            self._fail(HTTP_STATUS.get(failure.code, 500), failure)

    def _authorised(self) -> bool:
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        if scheme == "Basic":
            try:
                value = b64decode(value, validate=True).decode().partition(":")[2]
            except ValueError:
                return False
        else:
            value = self.headers.get("X-ClickHouse-Key", "")
        return hmac.compare_digest(value.encode(), self.server.token.encode())

    def _send(self, reply: Reply) -> None:
        self._head(200, reply.headers)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)
        self.wfile.flush()

    def _fail(self, status: int, failure: Failure) -> None:
        text = f"Code: {failure.code}. DB::Exception: {failure}\n".encode()
        self._head(status, {"X-ClickHouse-Exception-Code": str(failure.code)})
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
        self.wfile.flush()

    def _stream(self, blocks: Iterator[bytes], request: Request) -> None:
        # The first block is fetched before the status is sent, so most failures still get one of their own.
        first = next(blocks, b"")
        tag = secrets.token_hex(8)
        # A reader that stops reading gives its slot in the engine back, with a TimeoutError.
        self.connection.settimeout(STALLED_SECONDS)
        self._head(200, {"X-ClickHouse-Format": request.format, "X-ClickHouse-Exception-Tag": tag})
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while first:
                self._chunk(first)
                first = next(blocks, b"")
        except Failure as failure:
            # The status is gone already: ClickHouse's own in-band form, which the client knows by the tag.
            message = f"Code: {failure.code}. DB::Exception: {failure}\n"
            size = len(message.encode())
            self._chunk(f"__exception__\r\n{tag}\r\n{message}{size} {tag}\r\n__exception__\r\n".encode())
            self.close_connection = True
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()
        self.connection.settimeout(None)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("X-ClickHouse-Timezone", "UTC")
        for name, value in headers.items():
            self.send_header(name, value)


def serve(path: Path, port: int, token: str | None, die_with_parent: bool) -> int:
    """Hold the store and answer until told to stop. Returns the exit status.

    Without a port or a token it takes those of an owner that was killed, so that its clients just go on, or new ones.
    """
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    # Ctrl-C reaches every process of a terminal; a child leaves it to its parent to say when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN if die_with_parent else lambda *_: stop.set())
    if die_with_parent:
        threading.Thread(target=lambda: (sys.stdin.buffer.read(), stop.set()), daemon=True).start()
    # The engine takes its zone from the process, and clients decode by it.
    os.environ["TZ"] = "UTC"
    spool = path.with_name(f"{path.name}.spool")
    before = owner(path)
    last = urlsplit(before.dsn or "" if before else "")
    token = token or unquote(last.password or "") or secrets.token_urlsafe(24)
    # The port is taken before the lock: the address is part of what the lock file says.
    with _listen(port, last.port or 0, token, Engine(path, spool)) as server:
        taken = server.server_address[1]
        dsn = f"clickhouse://{USER}:{quote(token, safe='')}@127.0.0.1:{taken}/default"
        with claim(path, dsn, READERS_SECONDS):
            shutil.rmtree(spool, ignore_errors=True)
            server.engine.open()
            listener = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            listener.start()
            ready = {"ready": True, "pid": os.getpid(), "port": taken, "dsn": dsn}
            print(json.dumps(ready), flush=True)
            stop.wait()
            server.shutdown()
            drained = server.drain()
            server.engine.close()
    return 0 if drained else 1


def _listen(port: int, last_port: int, token: str, engine: Engine) -> Server:
    if port or not last_port:
        return Server(port, token, engine)
    try:
        return Server(last_port, token, engine)
    except OSError:  # somebody else's by now
        return Server(0, token, engine)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sia_events.infra.chdb_server", description=serve.__doc__)
    parser.add_argument("--path", type=Path, required=True, help="the store's folder")
    parser.add_argument("--port", type=int, default=0, help="default: the last owner's, or a free one")
    parser.add_argument("--token", help="default: SIA_LOG_TOKEN, which `ps` does not show, or one made up here")
    parser.add_argument("--die-with-parent", action="store_true", help="end when stdin closes")
    options = parser.parse_args(argv)
    try:
        token = options.token or os.environ.get("SIA_LOG_TOKEN")
        return serve(options.path.resolve(), options.port, token, options.die_with_parent)
    except (StoreHeld, Failure) as error:
        print(f"chdb_server: {error}", file=sys.stderr)
    except OSError as error:
        print(f"chdb_server: {error} (store {options.path}, port {options.port})", file=sys.stderr)
    return 2


if __name__ == "__main__":
    # Client threads may still sit in the engine's library, which does not survive the interpreter's teardown: it would
    # catch its own crash and sleep on it for minutes. So nothing leads there, nor a parent that died before we were up.
    status = 2
    with suppress(BrokenPipeError):
        status = main()
    os._exit(status)
