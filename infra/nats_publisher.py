"""Plain messages on a NATS server, which no stream keeps: whoever listens just then has them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import nats
from nats.errors import Error

from sia_events.infra.nats_wire import CLOUD_EVENTS
from sia_events.shared.ports import BusUnreachable

CONNECT_S = 10

Publish = Callable[[str, bytes], Awaitable[None]]


@asynccontextmanager
async def publisher(url: str) -> AsyncIterator[Publish]:
    """What publishes one message under a subject; at the end all of them have left. Raises BusUnreachable."""
    try:
        client = await nats.connect(url.split(","), name="sia replay", connect_timeout=CONNECT_S)
    except (OSError, TimeoutError, Error) as error:
        raise BusUnreachable(f"no NATS server takes messages at {url.rpartition('@')[2]}: {error!r}") from error

    async def publish(subject: str, body: bytes) -> None:
        await client.publish(subject, body, headers=CLOUD_EVENTS)

    try:
        yield publish
        await client.flush()
    finally:
        await client.close()
