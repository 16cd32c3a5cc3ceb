"""What stands on the streams, message by message, and a run's records put back where they belong."""

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from urllib.parse import unquote

from nats.aio.client import Client

from sia_events.infra import nats_feed
from sia_events.infra.delivery import checked_name
from sia_events.infra.nats_connection import Connection
from sia_events.infra.nats_runs import Runs
from sia_events.infra.nats_streams import (
    ADVISORIES,
    EVENTS,
    PLACES,
    READ_AT_ONCE,
    TRACE,
    Message,
    last_sequence,
    subjects_with,
)
from sia_events.infra.nats_wire import read_envelope, run_of
from sia_events.shared.ports import Consumer, Envelope, Stored, StreamName, StreamSize
from sia_events.shared.record import Record, UnreadableRecord

SUBJECTS = {EVENTS: "sia.events", TRACE: "sia.trace"}


class NatsStreams:
    """The `Streams` port."""

    def __init__(self, nats: Connection, runs: Runs) -> None:
        self._nats = nats
        self._runs = runs

    async def runs(self) -> Sequence[str]:
        found: dict[str, None] = {}
        for stream, subject in SUBJECTS.items():
            subjects = await self._nats.ask(lambda c, s=stream, p=subject: subjects_with(c, s, f"{p}.>"))
            for each in subjects:
                with suppress(ValueError, IndexError):  # under a name that no run can have stands nothing of ours
                    found[checked_name(run_of(each))] = None
        return list(found)

    async def messages(self, stream: StreamName, run: str) -> AsyncIterator[Stored]:
        async for message in self._read(stream, run):
            yield Stored(message.sequence, run, unquote(message.subject.split(".", 4)[3]), message.data)

    async def envelopes(self, run: str) -> AsyncIterator[tuple[int, Envelope]]:
        async for message in self._read("SIA_TRACE", run):
            with suppress(UnreadableRecord):
                yield message.sequence, read_envelope(message)

    async def lost(self, stream: StreamName) -> tuple[int, Sequence[int]]:
        last = await self._nats.ask(lambda client: last_sequence(client.jetstream(), stream))
        missing: list[int] = []
        expected = 1
        while messages := await self._nats.read(stream, expected, limit=READ_AT_ONCE):
            for message in messages:
                missing.extend(range(expected, message.sequence))
                expected = message.sequence + 1
        return last, [*missing, *range(expected, last + 1)]

    async def sizes(self, feed: str) -> Sequence[StreamSize]:
        found: list[StreamSize] = []
        for name in (EVENTS, TRACE, PLACES, ADVISORIES):
            info = await self._nats.ask(lambda client, name=name: client.jetstream().stream_info(name))
            limit = info.config.max_bytes or -1
            read = name in nats_feed.STREAMS
            lag = max(0, info.state.last_seq - await self._acked(name, feed)) if read else None
            found.append(StreamSize(name, info.state.messages, info.state.bytes, limit if limit > 0 else None, lag))
        return found

    async def consumers(self) -> Sequence[Consumer]:
        found: list[Consumer] = []
        while page := await self._nats.ask(partial(_consumers, len(found))):
            found += page
        return found

    async def copied(self, stream: StreamName, feed: str) -> int:
        return await self._acked(stream, feed)

    async def step_back(self, stream: StreamName, feed: str, sequence: int) -> None:
        place = await self._nats.ask(lambda client: nats_feed.place(client, feed, stream))
        if place.acked > sequence:
            back = replace(place, acked=sequence, offered=sequence)
            await self._nats.ask(lambda client: nats_feed.keep(client, feed, stream, back))

    async def check_whole(self, run: str) -> None:
        await self._runs.check_whole(run)

    async def restore(self, run: str, records: Sequence[Record]) -> int:
        return await self._runs.restore(run, records)

    async def _acked(self, stream: str, feed: str) -> int:
        return (await self._nats.ask(lambda client: nats_feed.place(client, feed, stream))).acked

    async def _read(self, stream: StreamName, run: str) -> AsyncIterator[Message]:
        start, subject = 1, f"{SUBJECTS[stream]}.{checked_name(run)}.>"
        while messages := await self._nats.read(stream, start, subject, limit=READ_AT_ONCE):
            for message in messages:
                yield message
            start = messages[-1].sequence + 1


async def _consumers(offset: int, client: Client) -> list[Consumer]:
    page = await client.jetstream().consumers_info(EVENTS, offset)
    return [Consumer(e.name, e.num_pending or 0, e.num_ack_pending or 0, bool(e.num_waiting)) for e in page]
