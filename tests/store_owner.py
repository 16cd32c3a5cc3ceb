"""An owner process of an embedded store, for as long as a test needs it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import clickhouse_connect


@dataclass(frozen=True)
class Running:
    process: "subprocess.Popen[bytes]"
    dsn: str
    port: int


def start(path: Path, *options: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "sia_events.infra.chdb_server", "--path", str(path), "--die-with-parent", *options]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextmanager
def owner(path: Path, *options: str) -> Iterator[Running]:
    """Start an owner of `path` and wait for its ready line; it is killed at the end if it still runs."""
    process = start(path, *options)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1].decode()
        ready = json.loads(line)
        yield Running(process, ready["dsn"], ready["port"])
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()


def statement(dsn: str, sql: str) -> None:
    with clickhouse_connect.get_client(dsn=dsn) as client:
        client.command(sql)


def tables(dsn: str) -> list[str]:
    """The tables and views that are there, whatever schema they are of."""
    with clickhouse_connect.get_client(dsn=dsn) as client:
        return [row[0] for row in client.query("SHOW TABLES").result_rows]
