"""How far a feed has come on each stream, kept on the server, so that a batch cut short comes again unchanged."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import structlog
from nats.aio.client import Client
from nats.js.errors import NotFoundError

from sia_events.infra.nats_streams import PLACES, bounds, nothing_behind, publish, subjects_with

log = structlog.get_logger()


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


async def settle(client: Client, streams: Iterable[str]) -> None:
    """Take each place back to where its stream ends now: a server may lose the end of a stream over damage to it.

    To be had before anything is appended, which would get sequences from before that place and never be copied.
    """
    for stream in streams:
        _, last = await bounds(client.jetstream(), stream)
        for subject in await subjects_with(client, PLACES, _subject("*", stream)):
            name = subject.split(".")[2]
            if (await place(client, name, stream)).acked > last:
                log.warning("a stream ends before what was copied of it", stream=stream, last=last)
                await keep(client, name, stream, Place(last, last))


async def lag(client: Client, name: str, streams: Iterable[str]) -> int:
    """Messages that the feed has not acked."""
    owed = 0
    for stream in streams:
        first, last = await bounds(client.jetstream(), stream)
        # Nothing is owed of what age has taken, or what is lost at the stream's end: nobody can copy it any more.
        acked = max(first - 1, (await place(client, name, stream)).acked)
        if last > acked and not await nothing_behind(client, stream, acked):
            owed += last - acked
    return owed


def _subject(name: str, stream: str) -> str:
    return f"sia.places.{name}.{stream}"
