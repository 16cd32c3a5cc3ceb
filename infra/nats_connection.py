"""One connection to a NATS server: looked at, made, and asked until it answers."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar, cast
from urllib.parse import urlsplit

import structlog
from faststream.nats import NatsBroker
from nats.aio.client import Client
from nats.errors import Error as RefusedByServer

from sia_events.infra import nats_feed
from sia_events.infra.nats_partitions import WHOLE, Partitions
from sia_events.infra.nats_server import MINIMUM, server_info, too_old
from sia_events.infra.nats_streams import KEPT, UNANSWERED, Message, Retention, ensure_streams, heeding, read
from sia_events.shared.ports import BusUnreachable

CONNECT_S = 10.0
AGAIN_S = 0.1
PING_S, PINGS_UNANSWERED = 5.0, 2

T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True)
class Connection:
    """The client, and the broker whose connection it is. The server may be away for `patience` seconds."""

    broker: NatsBroker
    client: Client
    patience: float
    partitions: Partitions = WHOLE

    async def ask(self, question: Callable[[Client], Awaitable[T]]) -> T:
        """Ask until the server answers. Raises BusUnreachable when it has not for so long that nobody is mending it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.patience
        while True:
            try:
                return await heeding(question(self.client))
            except UNANSWERED as error:
                if loop.time() > deadline:
                    raise BusUnreachable(
                        f"the NATS server has not answered for {self.patience:.0f} s ({error!r}). "
                        "What it acknowledged is kept. See that it runs and has disk left, then run the same command."
                    ) from error
            await asyncio.sleep(AGAIN_S)

    async def read(
        self,
        stream: str,
        start: int,
        subject: str | None = None,
        limit: int = 2**62,
        enough: int = 2**62,
        until: int = 2**62,
    ) -> list[Message]:
        """As `nats_streams.read`, asked until it is answered."""
        return await self.ask(lambda client: read(client, stream, start, subject, limit, enough, until))


@asynccontextmanager
async def connected(
    url: str, replicas: int, patience: float, partitions: Partitions = WHOLE, retention: Retention = KEPT
) -> AsyncIterator[Connection]:
    """A connection to the server (or servers, comma between) at `url`, our streams made and checked there.

    Raises BusUnreachable when nothing fit listens there, StreamUnfit and BusFull when the streams cannot be had.
    """
    servers = url.split(",")
    for server in servers:
        await _check(server)

    async def connected_again() -> None:
        _end_when_untaken(client)

    broker = NatsBroker(
        servers,
        name="sia",
        reconnect_time_wait=cast(int, 0.2),
        max_reconnect_attempts=-1,
        # A network that drops what it is given ends no connection: one that is silent for so long is made anew.
        ping_interval=cast(int, PING_S),
        max_outstanding_pings=PINGS_UNANSWERED,
        error_cb=_lost,
        reconnected_cb=connected_again,
        logger=None,
        apply_types=False,
        graceful_timeout=5.0,
    )
    try:
        try:
            async with asyncio.timeout(CONNECT_S):
                client = await broker.connect()
                _end_when_untaken(client)
                await ensure_streams(client, replicas, partitions, retention)
                await nats_feed.settle(client, partitions.names)
        except (TimeoutError, *UNANSWERED) as error:
            said = f"the NATS server at {masked(url)} lets us in but does not answer: {error!r}"
            raise BusUnreachable(said) from error
        except RefusedByServer as error:
            # A class of its own the client has for a connection that was open before, and not for one that never was.
            if "authorization" not in str(error).lower():
                raise
            mend = "Put the right user and password, or token, into SIA_NATS_URL, or unset it for a server of our own."
            raise BusUnreachable(f"the NATS server at {masked(url)} does not let us in: {error}. {mend}") from error
        yield Connection(broker, client, patience, partitions)
    finally:
        with suppress(TimeoutError, *UNANSWERED):
            async with asyncio.timeout(CONNECT_S):
                await broker.stop()


def _end_when_untaken(client: Client) -> None:
    """Have the kernel end the connection when nobody takes what is sent on it for so long as a ping may take.

    Before it connects anew the client waits until what it has written is sent: of a silent network, for ever.
    """
    writer = getattr(client._transport, "_io_writer", None)  # there is no other way to the socket
    if writer and hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux (tcp(7)); elsewhere the kernel's own patience holds
        patience = int(1000 * PING_S * PINGS_UNANSWERED)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)


async def _check(server: str) -> None:
    """Look before connecting: the client would wait for ever, and an old server would fail at the first append."""
    place = urlsplit(server if "://" in server else f"nats://{server}")
    mend = "Start one, or name another in SIA_NATS_URL, or unset it for a server of our own."
    try:
        info = await server_info(place.hostname or "localhost", place.port or 4222)
    except (OSError, ValueError, TimeoutError) as error:
        raise BusUnreachable(f"no NATS server answers at {masked(server)}: {error}. {mend}") from error
    if too_old(info["version"]):
        least = ".".join(map(str, MINIMUM))
        raise BusUnreachable(f"{masked(server)} is nats-server {info['version']}; {least} or later is needed. {mend}")
    if not info.get("jetstream"):
        raise BusUnreachable(f"the NATS server at {masked(server)} has JetStream off. Start it with -js. {mend}")


def masked(url: str) -> str:
    """The URL without the token or password in it."""
    return ",".join(server.rpartition("@")[2] for server in url.split(","))


async def _lost(error: Exception) -> None:
    log.debug("bus connection", error=repr(error))
