"""The owner of the embedded store answers an unmodified ClickHouse client, and loses nothing it acknowledged."""

import http.client
import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import clickhouse_connect
import pytest
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError, StreamFailureError
from store_owner import Running, owner, start

from sia_events.infra.store_lock import claim

TABLE = """CREATE TABLE items (a UInt64, s String, l LowCardinality(String)) ENGINE = MergeTree ORDER BY a
SETTINGS non_replicated_deduplication_window = 100, fsync_after_insert = 1"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with owner(tmp_path_factory.mktemp("store") / "log") as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with connected(running) as client:
        client.command("DROP TABLE IF EXISTS items")
        client.command(TABLE)
        yield client


def connected(running: Running, **options: Any) -> Client:
    return clickhouse_connect.get_client(dsn=running.dsn, autogenerate_session_id=False, **options)


def rows(count: int, start: int = 0) -> list[tuple[int, str, str]]:
    """Rows whose bytes end in blanks and semicolons, and hold every kind of quote."""
    return [(i, f"{i} 'x' \\ \" \t\n;" * 4, f"kind {i % 3}") for i in range(start, start + count)]


def insert(client: Client, rows: list[tuple[int, str, str]], **settings: Any) -> int:
    return client.insert("items", rows, column_names=["a", "s", "l"], settings=settings).written_rows


def raw(
    running: Running, body: bytes, headers: dict[str, str] | None = None, method: str = "POST", **url: str
) -> tuple[int, bytes]:
    """One request by hand, with the owner's own token."""
    token = running.dsn.partition("sia:")[2].partition("@")[0]
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    connection.request(method, f"/?{urlencode(url)}", body, {"X-ClickHouse-Key": token} | (headers or {}))
    response = connection.getresponse()
    result = response.status, response.read()
    connection.close()
    return result


@pytest.mark.parametrize("compression", [False, "lz4", "zstd", "gzip"])
def test_every_row_of_a_large_insert_arrives(running: Running, client: Client, compression: bool | str):
    with connected(running, compress=compression) as compressing:
        assert insert(compressing, rows(20_000)) == 20_000
    counted = client.query("SELECT count(), uniqExact(a), sum(length(s)) FROM items").result_rows
    assert counted == [(20_000, 20_000, sum(len(s) for _, s, _ in rows(20_000)))]
    assert client.query("SELECT * FROM items ORDER BY a LIMIT 3").result_rows == rows(3)


def test_a_compressed_body_cut_between_frames_is_refused_whole(running: Running, client: Client):
    from lz4.frame import compress

    lines = b"".join(b'{"a":%d,"s":"x","l":"y"}\n' % i for i in range(100))
    body = compress(b"INSERT INTO items FORMAT JSONEachRow\n") + compress(lines)
    status, _ = raw(running, body, {"Content-Encoding": "lz4"})
    assert (status, client.command("SELECT count() FROM items")) == (200, 100)
    status, reply = raw(running, body[:-8], {"Content-Encoding": "lz4"})
    assert status == 400 and b"cut" in reply
    assert client.command("SELECT count() FROM items") == 100


def test_a_chunked_body_cut_before_its_end_is_refused_whole(running: Running, client: Client):
    token = running.dsn.partition("sia:")[2].partition("@")[0]
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    connection.putrequest("POST", "/")
    connection.putheader("X-ClickHouse-Key", token)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    statement = b"INSERT INTO items FORMAT JSONEachRow\n" + b'{"a":1,"s":"x","l":"y"}\n'
    connection.send(b"%x\r\n%s\r\n" % (len(statement), statement))
    assert connection.sock is not None
    connection.sock.shutdown(1)
    assert connection.getresponse().status == 400
    connection.close()
    assert client.command("SELECT count() FROM items") == 0


def test_the_same_token_inserts_once_and_does_not_outlive_its_request(client: Client):
    for _ in range(3):
        insert(client, rows(100), insert_deduplication_token="one")
    assert client.command("SELECT count() FROM items") == 100
    insert(client, rows(50, start=100))
    insert(client, rows(50, start=150))
    assert client.command("SELECT count() FROM items") == 200


@pytest.mark.parametrize("form", [False, True])
def test_parameters_are_bound_by_the_engine_whether_in_the_url_or_in_a_form(running: Running, form: bool):
    given = {"n": 3, "s": "it's \t\n\\ ;é {x}", "u": UUID(int=7), "l": ["a", "b'c"]}
    with connected(running, form_encode_query_params=form) as client:
        found = client.query("SELECT {n:UInt32}, {s:String}, {u:UUID}, {l:Array(String)}", parameters=given)
    assert found.result_rows == [tuple(given.values())]


@pytest.mark.parametrize(
    ("sql", "code"), [("SELEC 1 FROM x", 62), ("SELECT * FROM nope", 60), ("SELECT throwIf(1)", 395)]
)
def test_an_error_carries_the_engines_code(client: Client, sql: str, code: int):
    with pytest.raises(DatabaseError) as caught:
        client.query(sql)
    assert caught.value.code == code


def test_a_long_result_streams_block_by_block(client: Client):
    with client.query_row_block_stream("SELECT number FROM numbers(300000)") as blocks:
        sizes = [len(block) for block in blocks]
    assert sum(sizes) == 300_000 and len(sizes) > 1


def test_an_error_in_the_middle_of_a_stream_is_not_taken_for_its_end(client: Client):
    # The engine works a few blocks ahead. Of few large blocks it may fail before the first one has left, and then the
    # reply has a status of its own; hundreds of small ones have left before this fails, however the threads run.
    sql, blocks_of = "SELECT throwIf(number = 250000) FROM numbers(300000)", {"max_block_size": 1000}
    with (
        pytest.raises(StreamFailureError) as caught,
        client.query_row_block_stream(sql, settings=blocks_of) as blocks,
    ):
        list(blocks)
    assert caught.value.code == 395


def test_settings_hold_for_one_request_only(client: Client):
    sql = "SELECT value FROM system.settings WHERE name = 'max_block_size'"
    before = client.command(sql)
    assert client.query(sql, settings={"max_block_size": 77}).result_rows == [("77",)]
    assert client.command(sql) == before
    with pytest.raises(DatabaseError, match="READONLY"):
        client.command("DROP TABLE items", settings={"readonly": "2"})


def test_a_get_only_reads(running: Running, client: Client):
    assert raw(running, b"", method="GET", query="SELECT 1") == (200, b"1\n")
    status, body = raw(running, b"", method="GET", query="DROP TABLE items")
    assert status == 403 and b"READONLY" in body


def test_a_format_at_the_end_of_the_text_decides_the_reply(running: Running):
    status, body = raw(running, b"SELECT 1 AS a, 'x' AS b FORMAT JSON")
    assert status == 200 and json.loads(body)["data"] == [{"a": 1, "b": "x"}]
    assert raw(running, b"", query="SELECT 1 AS a", default_format="JSONEachRow") == (200, b'{"a":1}\n')


def test_inserts_in_text_form_keep_what_a_trimmer_would_eat(running: Running, client: Client):
    assert raw(running, b"INSERT INTO items VALUES (1, ' ;', 'x'), (2, '\\'', 'y')")[0] == 200
    assert raw(running, b'{"a":3,"s":";","l":"z"}', query="INSERT INTO items FORMAT JSONEachRow")[0] == 200
    assert client.query("SELECT a, s FROM items ORDER BY a").result_rows == [(1, " ;"), (2, "'"), (3, ";")]


def test_nobody_gets_in_without_the_token(running: Running):
    with pytest.raises(DatabaseError) as caught:
        clickhouse_connect.get_client(host="127.0.0.1", port=running.port, username="sia", password="guess")
    assert caught.value.code == 516
    assert raw(running, b"SELECT 1", {"X-ClickHouse-Key": ""})[0] == 401


def test_many_threads_read_and_write_at_once(running: Running, client: Client):
    def work(worker: int) -> None:
        for batch in range(5):
            insert(client, rows(20, start=1000 * worker + 20 * batch))
            client.query("SELECT count() FROM items")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert client.query("SELECT count(), uniqExact(a) FROM items").result_rows == [(800, 800)]


@pytest.mark.slow  # it waits as long as it would for a reader
def test_a_second_owner_is_told_who_holds_the_store(tmp_path: Path):
    with owner(tmp_path / "log") as first:
        second = start(tmp_path / "log")
        _, stderr = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"process {first.process.pid}".encode() in stderr


def test_an_owner_waits_for_a_reader_that_has_the_store_open(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with claim(tmp_path / "log"):
        process = start(tmp_path / "log", "--port", str(port))
        while process.poll() is None:  # it listens before it asks for the store
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
    assert process.stdout and process.stdin
    assert json.loads(process.stdout.readline())["ready"]
    process.stdin.close()
    assert process.wait(30) == 0


def test_an_owner_that_was_killed_is_followed_at_the_same_address_with_the_same_token(tmp_path: Path):
    with owner(tmp_path / "log", "--token", "odd: @/%?") as first, connected(first) as client:
        assert client.command("SELECT 1") == 1
    with owner(tmp_path / "log") as second:
        assert second.dsn == first.dsn


def test_the_lock_file_that_names_the_token_is_private(tmp_path: Path):
    with owner(tmp_path / "log"):
        assert (tmp_path / "log.owner").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("how", ["sigterm", "stdin closes"])
def test_it_ends_cleanly_when_told_and_when_its_parent_is_gone(tmp_path: Path, how: str):
    with owner(tmp_path / "log") as running:
        if how == "sigterm":
            running.process.send_signal(signal.SIGTERM)
        else:
            assert running.process.stdin is not None
            running.process.stdin.close()
        assert running.process.wait(timeout=30) == 0
        assert not (tmp_path / "log.owner").exists()


def test_a_small_table_is_one_part_on_disk_when_it_has_ended(tmp_path: Path):
    def parts() -> int:
        return len(list((tmp_path / "log/store").glob("*/*/all_*")))

    with owner(tmp_path / "log") as running:
        with connected(running) as client:
            client.command(f"{TABLE}, old_parts_lifetime = 0, cleanup_delay_period = 200")
            for batch in range(5):
                insert(client, rows(20, start=20 * batch))
        assert parts() >= 5
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=30) == 0
    assert parts() == 1
    with owner(tmp_path / "log") as second, connected(second) as client:
        assert client.query("SELECT a FROM items ORDER BY a").result_rows == [(a,) for a in range(100)]


def test_every_acknowledged_row_survives_kill_9(tmp_path: Path):
    acknowledged: list[int] = []
    enough = threading.Event()

    def write(running: Running) -> None:
        with suppress(ClickHouseError), connected(running) as client:
            for batch in range(10_000):
                insert(client, rows(20, start=20 * batch))
                acknowledged.append(batch)
                if batch >= 10:
                    enough.set()

    with owner(tmp_path / "log") as first:
        with connected(first) as client:
            client.command(TABLE)
        writer = threading.Thread(target=write, args=(first,))
        writer.start()
        assert enough.wait(60)
        first.process.kill()
        writer.join(60)
    with owner(tmp_path / "log") as second, connected(second) as client:
        found = {a for (a,) in client.query("SELECT a FROM items").result_rows}
    assert found >= {20 * batch + i for batch in acknowledged for i in range(20)}
    assert len(found) % 20 == 0
