"""The connections to providers, and the door's to its callers: used again, honest about how they broke, one write."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx2
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from uvicorn.server import ServerState

from sia_events.corked import CorkedProtocol
from sia_events.infra.providers.account import Account, Slots
from sia_events.infra.providers.connections import connections
from sia_events.shared.providers import Provider

FINE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


@asynccontextmanager
async def provider(talk: Talk) -> AsyncIterator[str]:
    """The URL of a server that `talk`s on each connection, told its number from 1, and closes it then."""
    opened = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        await talk(reader, writer, opened)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def head(reader: asyncio.StreamReader) -> bytes:
    """One request up to its body; b"" when there comes none any more."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


@asynccontextmanager
async def client(url: str, patience: float = 10.0) -> AsyncIterator[httpx2.AsyncClient]:
    made = connections(Account("p", Provider(kind="openai", base_url=url, timeout_s=patience), "", Slots(1)))
    async with made:
        yield made


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


async def test_a_connection_is_used_for_call_after_call():
    numbers: list[int] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while await head(reader):
            numbers.append(number)
            writer.write(FINE)

    async with provider(talk) as url, client(url) as http:
        for _ in range(3):
            assert (await http.post(url, content=b"")).json() == {}
    assert numbers == [1, 1, 1]


async def test_a_reply_that_was_not_read_to_its_end_costs_its_connection_and_not_the_next_call():
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await head(reader)
        if number > 1:
            writer.write(FINE)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\na part")
        await reader.read()

    async with provider(talk) as url, client(url) as http:
        async with http.stream("POST", url, content=b"") as broken_off:
            assert await anext(broken_off.aiter_bytes()) == b"a part"
        assert (await http.post(url, content=b"")).json() == {}


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\na part"])
async def test_a_connection_that_breaks_is_no_timeout(said: bytes):
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await head(reader)
        writer.write(said)

    async with provider(talk) as url, client(url) as http:
        with pytest.raises(httpx2.NetworkError):
            await http.post(url, content=b"")


async def test_silence_is_a_timeout():
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await reader.read()

    async with provider(talk) as url, client(url, patience=0.2) as http:
        with pytest.raises(httpx2.TimeoutException):
            await http.post(url, content=b"")


async def test_a_name_and_password_in_the_address_go_into_the_header_and_nowhere_else():
    heads: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        heads.append(await head(reader))
        writer.write(FINE)

    async with provider(talk) as url, client(named := url.replace("//", "//me:secret@")) as http:
        assert (await http.post(f"{named}/chat", content=b"", headers={"Authorization": "Bearer none"})).json() == {}
    assert heads[0].startswith(b"POST /chat ") and b"secret" not in heads[0]
    assert b"authorization: basic bwu6c2vjcmv0" in heads[0].lower()


async def test_a_compressed_reply_is_read_as_what_it_says():
    packed = bytes.fromhex("1f8b0800000000000003abae050043bfa6a302000000")  # {} by gzip

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await head(reader)
        told = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
        writer.write(told + packed)

    async with provider(talk) as url, client(url) as http:
        assert (await http.post(url, content=b"")).json() == {}


async def test_a_proxy_of_the_environment_is_asked_and_not_for_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch):
    heads: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        heads.append(await head(reader))
        writer.write(FINE)

    async with provider(talk) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        async with client("http://models.test/v1") as http:
            assert (await http.post("http://models.test/v1/chat", content=b"")).json() == {}
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        async with client(proxy) as http:
            assert (await http.post(f"{proxy}/chat", content=b"")).json() == {}
    assert [told.split()[1] for told in heads] == [b"http://models.test/v1/chat", b"/chat"]


class Written(asyncio.Transport):
    """A transport to nowhere, which keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.writes.append(b"closed")

    def is_closing(self) -> bool:
        return b"closed" in self.writes


@pytest.mark.parametrize("keep, closed", [("keep-alive", []), ("close", [b"closed"])])
async def test_a_reply_leaves_the_door_in_one_write(keep: str, closed: list[bytes]):
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    config = uvicorn.Config(Starlette(routes=[Route("/", answer)]), lifespan="off", log_level="error")
    config.load()
    state, transport = ServerState(), Written()
    protocol = CorkedProtocol(config=config, server_state=state, app_state={})
    protocol.connection_made(transport)
    protocol.data_received(f"GET / HTTP/1.1\r\nHost: here\r\nConnection: {keep}\r\n\r\n".encode())
    await asyncio.gather(*state.tasks)
    await asyncio.sleep(0)  # the turn of the loop that ends with the write
    whole, *rest = transport.writes
    assert whole.startswith(b"HTTP/1.1 200 OK\r\n") and whole.endswith(b"\r\n\r\nhello")
    assert rest == closed
