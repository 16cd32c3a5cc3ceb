"""A link to a server that can be cut: a TCP relay on loopback, told in which way it fails."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit


class Link:
    """Carries connections to (host, port) while it is whole; `url` leads through it."""

    def __init__(self, url: str) -> None:
        self._to = urlsplit(url)
        self._carried: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._refusing = False
        self.port = 0

    @property
    def url(self) -> str:
        user = f"{self._to.username}@" if self._to.username else ""
        return f"{self._to.scheme}://{user}127.0.0.1:{self.port}"

    def cut(self) -> None:
        """End every connection and every new one at once, as a host does whose server is gone."""
        self._refusing = True
        for pair in list(self._carried):
            for end in pair:
                end.transport.abort()

    def hush(self) -> None:
        """Carry nothing any more and say nothing of it, as a network does that drops what it is given."""
        self._open.clear()

    def forget(self) -> None:
        """Never carry anything of the connections there are again; new ones are carried: a firewall's restart."""
        for task in self._tasks:
            task.cancel()
        self._open.set()

    def mend(self) -> None:
        """Carry again: what a hush held back, and new connections."""
        self._refusing = False
        self._open.set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        if self._refusing:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection(self._to.hostname, self._to.port)
        pair = (writer, far_writer)
        self._carried.add(pair)
        ways = [self._pass(reader, far_writer), self._pass(far_reader, writer)]
        for way in ways:
            task = asyncio.create_task(way)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while some := await reader.read(2**16):
                await self._open.wait()
                writer.write(some)
                await writer.drain()
            writer.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.cut()


@asynccontextmanager
async def link(url: str) -> AsyncIterator[Link]:
    """A whole link to the server at `url`, until the block ends."""
    made = Link(url)
    server = await asyncio.start_server(made.carry, "127.0.0.1", 0, limit=2**12)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        await made.close()
