"""What stands on the streams, message by message, and a run's records put back where they belong."""

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from urllib.parse import unquote
from uuid import uuid4

from nats.aio.client import Client

from sia_events.infra import nats_feed
from sia_events.infra.delivery import checked_name
from sia_events.infra.nats_connection import Connection
from sia_events.infra.nats_partitions import EVENTS, ROOTS, TRACE
from sia_events.infra.nats_runs import Runs
from sia_events.infra.nats_streams import (
    ADVISORIES,
    IN_PLACE_OF,
    PLACES,
    READ_AT_ONCE,
    Message,
    begin_behind,
    begins,
    bounds,
    publish,
    subjects_with,
)
from sia_events.infra.nats_wire import ENCODING, packed, read_envelope, run_of, trace_subject
from sia_events.shared.ports import Consumer, Envelope, Stored, StreamName, StreamSize, Traced
from sia_events.shared.record import Record, UnreadableRecord


class NatsStreams:
    """The `Streams` port."""

    def __init__(self, nats: Connection, runs: Runs) -> None:
        self._nats = nats
        self._partitions = nats.partitions
        self._runs = runs

    def histories(self) -> Sequence[str]:
        return self._partitions.names

    def holding(self, stream: StreamName, run: str) -> str:
        return self._partitions.of(stream, run)

    async def runs(self) -> Sequence[str]:
        found: dict[str, None] = {}
        for stream in self._partitions.names:
            subjects = await self._nats.ask(lambda client, stream=stream: subjects_with(client, stream, ">"))
            for each in subjects:
                with suppress(ValueError, IndexError):  # under a name that no run can have stands nothing of ours
                    found[checked_name(run_of(each))] = None
        return list(found)

    async def messages(self, stream: StreamName, run: str) -> AsyncIterator[Stored]:
        async for message in self._read(stream, run):
            kind = unquote(message.subject.split(".", 4)[3])
            lost = int(message.in_place_of) if message.in_place_of.isdecimal() else None
            yield Stored(message.sequence, run, kind, message.data, lost)

    async def traced(self, run: str) -> AsyncIterator[Traced]:
        async for message in self._read("SIA_TRACE", run):
            lost = message.in_place_of.partition(".")[0]
            in_place_of = int(lost) if lost.isdecimal() else None
            try:
                envelope = read_envelope(message, self._partitions)
            except UnreadableRecord as error:
                yield Traced(message.sequence, None, str(error))
            else:
                yield Traced(message.sequence, envelope, in_place_of=in_place_of)

    async def envelopes(self, run: str) -> AsyncIterator[tuple[int, Envelope]]:
        async for message in self.traced(run):
            if message.envelope is not None:
                yield message.sequence, message.envelope

    async def counted(self, stream: StreamName, run: str) -> int:
        name, subjects = self._partitions.of(stream, run), f"{ROOTS[stream]}.{checked_name(run)}.>"
        return sum((await self._nats.ask(lambda client: subjects_with(client, name, subjects))).values())

    async def first(self, stream: str) -> int:
        return (await self._nats.ask(lambda client: bounds(client.jetstream(), stream)))[0]

    async def lost(self, stream: str) -> tuple[int, Sequence[int]]:
        expected, last = await self._nats.ask(lambda client: bounds(client.jetstream(), stream))
        expected = max(expected, await self._nats.ask(lambda client: begins(client.jetstream(), stream)))
        missing: list[int] = []
        while messages := await self._nats.read(stream, expected, limit=READ_AT_ONCE):
            for message in messages:
                missing.extend(range(expected, message.sequence))
                expected = message.sequence + 1
        first = await self.first(stream)  # some may have gone by their age meanwhile
        return last, [lost for lost in (*missing, *range(expected, last + 1)) if lost >= first]

    async def sizes(self, feed: str) -> Sequence[StreamSize]:
        found: list[StreamSize] = []
        for name in (*self._partitions.names, PLACES, ADVISORIES):
            info = await self._nats.ask(lambda client, name=name: client.jetstream().stream_info(name))
            limit = info.config.max_bytes or -1
            read = name in self._partitions.names
            lag = await self._nats.ask(lambda client, name=name: nats_feed.lag(client, feed, [name])) if read else None
            found.append(StreamSize(name, info.state.messages, info.state.bytes, limit if limit > 0 else None, lag))
        return found

    async def consumers(self) -> Sequence[Consumer]:
        found: list[Consumer] = []
        for stream in self._partitions.cut(EVENTS):
            before = len(found)
            while page := await self._nats.ask(partial(_consumers, stream, len(found) - before)):
                found += page
        return found

    async def copied(self, stream: str, feed: str) -> int:
        return await self._acked(stream, feed)

    async def step_back(self, stream: str, feed: str, sequence: int) -> None:
        place = await self._nats.ask(lambda client: nats_feed.place(client, feed, stream))
        if place.acked > sequence:
            back = replace(place, acked=sequence, offered=sequence)
            await self._nats.ask(lambda client: nats_feed.keep(client, feed, stream, back))

    async def begin_behind(self, stream: str, sequence: int) -> None:
        await self._nats.ask(lambda client: begin_behind(client.jetstream(), stream, sequence))

    async def check_whole(self, run: str) -> None:
        await self._runs.check_whole(run)

    async def restore(self, run: str, records: Sequence[Record]) -> int:
        return await self._runs.restore(run, records)

    async def put_back(self, lost: Sequence[tuple[int, Envelope]]) -> None:
        known: dict[str, set[str]] = {}
        for sequence, envelope in lost:
            subject = trace_subject(envelope.run, envelope.kind, envelope.key, self._partitions)
            stream = self._partitions.of(TRACE, envelope.run)
            if subject not in known:
                known[subject] = {message.in_place_of for message in await self._nats.read(stream, 1, subject)}
            for part, body in enumerate(packed(envelope.lines, self._nats.client.max_payload - 1024)):
                if (place := f"{sequence}.{part}") not in known[subject]:
                    # As the id this would not do: the server takes what it has lost lately for what it still has.
                    headers = {"Nats-Msg-Id": uuid4().hex, "Content-Encoding": ENCODING, IN_PLACE_OF: place}
                    message = (subject, body, headers)
                    await self._nats.ask(lambda client, message=message: publish(client, [message]))

    async def _acked(self, stream: str, feed: str) -> int:
        return (await self._nats.ask(lambda client: nats_feed.place(client, feed, stream))).acked

    async def _read(self, stream: StreamName, run: str) -> AsyncIterator[Message]:
        start, subject = 1, f"{ROOTS[stream]}.{checked_name(run)}.>"
        while messages := await self._nats.read(self._partitions.of(stream, run), start, subject, limit=READ_AT_ONCE):
            for message in messages:
                yield message
            start = messages[-1].sequence + 1


async def _consumers(stream: str, offset: int, client: Client) -> list[Consumer]:
    page = await client.jetstream().consumers_info(stream, offset)
    return [Consumer(e.name, e.num_pending or 0, e.num_ack_pending or 0, bool(e.num_waiting)) for e in page]
