"""How far a feed has come on each stream, kept on the server, so that a batch cut short comes again unchanged."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from nats.aio.client import Client
from nats.js.errors import NotFoundError

from sia_events.infra.nats_streams import PLACES, last_sequence, publish


@dataclass(frozen=True)
class Place:
    """Stream sequences: the last one acked, and the last one of the batch handed out behind it."""

    acked: int = 0
    offered: int = 0


async def place(client: Client, name: str, stream: str) -> Place:
    try:
        kept = await client.jetstream().get_last_msg(PLACES, _subject(name, stream), direct=True)
    except NotFoundError:
        return Place()
    return Place(**json.loads(kept.data or b"{}"))


async def keep(client: Client, name: str, stream: str, place: Place) -> None:
    await publish(client, [(_subject(name, stream), json.dumps(asdict(place)).encode(), {})])


async def lag(client: Client, name: str, streams: Iterable[str]) -> int:
    """Messages that the feed has not acked."""
    jetstream = client.jetstream()
    # A store that was put back to an earlier copy ends before the place: then nothing of that stream is owed.
    return sum([max(0, await last_sequence(jetstream, s) - (await place(client, name, s)).acked) for s in streams])


def _subject(name: str, stream: str) -> str:
    return f"sia.places.{name}.{stream}"
