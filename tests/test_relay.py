"""A stream that the gateway leaves without its end is lost, and told of; whoever else ends one leaves nothing lost."""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_sandbox import BOTH, limits, pytestmark, python, read_to_the_end, serving

from sia_events.infra.sandbox import Bubblewrap
from sia_events.shared.ports import Sandbox

__all__ = ["pytestmark"]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PART, END = b"8\r\nline 1\n\n\r\n", b"0\r\n\r\n"
QUOTING = b"a body that says\r\nTransfer-Encoding: chunked\r\n\r\nto its reader"
WHOLE = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(QUOTING), QUOTING)]

# It asks on one connection, as often as it is told, and swallows however a reply ends.
ASKING = """
    import http.client, os
    connection = http.client.HTTPConnection(os.environ["GATEWAY"].removeprefix("http://"))
    for _ in range(int(os.environ["TIMES"])):
        try:
            connection.request("POST", "/v1/chat/completions", b"{}")
            print(len(connection.getresponse().read()))
        except (OSError, http.client.HTTPException) as error:
            print(type(error).__name__)
"""
LEAVING = """
    import os, socket
    host, port = os.environ["GATEWAY"].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST / HTTP/1.1\\r\\n\\r\\n")
        print(b"line" in connection.recv(1000))
"""


def telling(*replies: Sequence[bytes]) -> Callable[[socket.socket], object]:
    """To each request on the connection the next reply, piece by piece; behind the last reply the gateway is gone."""

    def answer(connection: socket.socket) -> None:
        for pieces in replies:
            asked = b""
            # A client may send a request's body behind its head, and a gateway answers when it has both.
            while not asked.endswith(b"{}" if b"Content-Length" in asked else b"\r\n\r\n"):
                if not (more := connection.recv(65536)):
                    return
                asked += more
            for piece in pieces:
                connection.sendall(piece)

    return answer


async def lost(box: Sandbox, place: Path, answer: Callable[[socket.socket], object], times: int = 1) -> int:
    """How many requests of the job count as lost."""
    (work := place / "work").mkdir(parents=True)
    with serving(path := place / "gateway.sock", answer):
        env = {"GATEWAY": "http://127.0.0.1:8080", "TIMES": str(times)}
        outcome = await box.run(python(work, ASKING, socket=path, env=env))
    assert outcome.status == "ok" and len(outcome.stdout.splitlines()) == times, outcome
    return outcome.lost_connections


@BOTH
@pytest.mark.parametrize(
    "pieces",
    [
        [HEAD],
        [HEAD + PART],
        [HEAD, PART, PART],
        [HEAD, PART, b"0\r\n"],
        [HEAD, b"10\r\n\r\n"],
    ],
    ids=["behind the head", "at once", "behind a part", "in the midst of the end", "where it looks like the end"],
)
async def test_a_stream_without_its_end_is_lost(box: Sandbox, tmp_path: Path, pieces: list[bytes]):
    assert await lost(box, tmp_path, telling(pieces)) == 1


@BOTH
async def test_a_stream_that_is_reset_is_lost(box: Sandbox, tmp_path: Path):
    # Closed with a request unread, a socket is reset.
    assert await lost(box, tmp_path, lambda connection: connection.sendall(HEAD + PART)) == 1


@BOTH
@pytest.mark.parametrize(
    "pieces",
    [[HEAD + PART + END], [HEAD, PART, PART, END], [bytes([byte]) for byte in PART + END], [HEAD + END]],
    ids=["at once", "part by part", "byte by byte", "empty"],
)
async def test_a_stream_that_came_to_its_end_is_not_lost(box: Sandbox, tmp_path: Path, pieces: list[bytes]):
    pieces = pieces if pieces[0].startswith(HEAD) else [HEAD, *pieces]
    assert await lost(box, tmp_path, telling(pieces)) == 0


@BOTH
async def test_each_stream_of_a_connection_is_looked_at_by_itself(box: Sandbox, tmp_path: Path):
    well, broken = [HEAD, PART + END], [HEAD, PART]
    assert await lost(box, tmp_path / "first", telling(well, WHOLE, broken), times=3) == 1
    assert await lost(box, tmp_path / "second", telling(well, well, WHOLE), times=3) == 0


@BOTH
async def test_what_a_reply_quotes_makes_it_no_stream(box: Sandbox, tmp_path: Path):
    """A model says what its agent has it say: a loss that could be told so would be tried again instead of scored."""
    assert await lost(box, tmp_path, telling(WHOLE)) == 0


@BOTH
async def test_a_stream_that_the_job_leaves_is_not_lost(box: Sandbox, tmp_path: Path):
    (work := tmp_path / "work").mkdir()

    def answer(connection: socket.socket) -> None:
        connection.sendall(HEAD + PART)
        read_to_the_end(connection)

    with serving(path := tmp_path / "gateway.sock", answer):
        job = python(work, LEAVING, socket=path, env={"GATEWAY": "http://127.0.0.1:8080"})
        outcome = await box.run(job)
    assert (outcome.status, outcome.stdout, outcome.lost_connections) == ("ok", b"True\n", 0), outcome


# It opens whatever any process beside it has open, and says so there.
FORGING = """
    import glob, os
    for descriptor in glob.glob("/proc/[0-9]*/fd/*"):
        if descriptor.split("/")[2] != str(os.getpid()) and int(descriptor.split("/")[4]) > 2:
            try:
                with open(descriptor, "wb", buffering=0) as file:
                    file.write(b".")
            except OSError:
                pass
    print(len(os.listdir("/proc/self/fd")) > 2)
"""


async def test_a_job_can_tell_of_no_loss_itself(tmp_path: Path):
    (work := tmp_path / "work").mkdir()
    outcome = await Bubblewrap().run(python(work, FORGING))
    assert (outcome.status, outcome.stdout, outcome.lost_connections) == ("ok", b"True\n", 0), outcome


# It asks on all its connections at once, as soon as each is there.
CROWDING = """
    import os, selectors, socket
    host, port = os.environ["GATEWAY"].removeprefix("http://").split(":")
    with selectors.DefaultSelector() as crowd:
        for _ in range(int(os.environ["TIMES"])):
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex((host, int(port)))
            crowd.register(connection, selectors.EVENT_WRITE)
        answered = 0
        while crowd.get_map():
            for key, events in crowd.select():
                if events & selectors.EVENT_WRITE:
                    key.fileobj.sendall(b"POST / HTTP/1.1\\r\\n\\r\\n")
                    crowd.modify(key.fileobj, selectors.EVENT_READ)
                else:
                    answered += key.fileobj.recv(1000).startswith(b"HTTP/1.1 200")
                    crowd.unregister(key.fileobj)
                    key.fileobj.close()
    print(answered)
"""


@contextmanager
def crowded(path: Path, backlog: int, first: int) -> Iterator[None]:
    """A gateway that lets `backlog` wait, and answers nobody before `first` are there; from then on one by one."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(backlog)

        def serve() -> None:
            held = [listener.accept()[0] for _ in range(first)]
            while held:
                with held.pop(0) as connection:
                    if connection.recv(65536):
                        connection.sendall(WHOLE[0])
                if not held:
                    try:
                        held = [listener.accept()[0]]
                    except OSError:
                        return

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@BOTH
@pytest.mark.parametrize(("backlog", "first"), [(3, 1), (128, 256)], ids=["the gateway's room", "our own room"])
async def test_connections_beyond_what_there_is_room_for_wait_and_none_is_lost(
    box: Sandbox, tmp_path: Path, backlog: int, first: int
):
    (work := tmp_path / "work").mkdir()
    with crowded(path := tmp_path / "gateway.sock", backlog, first):
        env = {"GATEWAY": "http://127.0.0.1:8080", "TIMES": "400"}
        job = python(work, CROWDING, limits(open_files=1024, wall_s=60, cpu_s=30), socket=path, env=env)
        outcome = await box.run(job)
    assert (outcome.status, outcome.stdout, outcome.lost_connections) == ("ok", b"400\n", 0), outcome
