"""Bus, log and blobs in memory: for unit tests and simulation, with the semantics of the real ones and no waiting."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, count
from typing import Any, Literal

from sia_events.infra.delivery import checked_name, delay, give_up, give_up_unread, is_last, is_outage
from sia_events.infra.tail import Tail, check_copied, check_part, following, left_at, stored
from sia_events.shared.events import RunBranched
from sia_events.shared.ports import BlobMissing, Blobs, Clock, Envelope, Feed, NoSuchPosition, Rows
from sia_events.shared.record import Draft, Record, UnreadableRecord, parse_record, to_wire

RETRY_DELAY_S = 0.001


class SystemTime:
    """The `Clock` port on the machine's own."""

    def now(self) -> datetime:
        return datetime.now(UTC)


class MemoryBlobs:
    """The `Blobs` port."""

    def __init__(self) -> None:
        self._bodies: dict[str, bytes] = {}

    async def put(self, body: bytes) -> str:
        digest = hashlib.sha256(body).hexdigest()
        self._bodies[digest] = body
        return digest

    async def get(self, digest: str) -> bytes:
        try:
            return self._bodies[digest]
        except KeyError:
            raise BlobMissing(f"no blob {digest} in memory") from None


@dataclass(frozen=True)
class Message:
    """What stands on the stream of events; `read` is the record in `wire`, or why it is none."""

    run: str
    type: str
    wire: bytes
    read: Record | UnreadableRecord


class MemoryBus:
    """The `Bus` port. A stream is a list, and a sequence is an index plus one."""

    def __init__(
        self, blobs: Blobs | None = None, clock: Clock | None = None, *, retry_delay: float = RETRY_DELAY_S
    ) -> None:
        self._blobs = blobs or MemoryBlobs()
        self._clock = clock or SystemTime()
        self._retry_delay = retry_delay
        self._events: list[Message] = []
        self._envelopes: list[Envelope] = []
        self._tails: dict[str, Tail] = {}
        self._served: Counter[str] = Counter()
        self._again: set[tuple[str, str]] = set()
        self._places: dict[str, dict[str, tuple[int, int]]] = {}
        self._news = asyncio.Event()

    async def append(self, run: str, drafts: Sequence[Draft]) -> Sequence[Record]:
        if not drafts:
            return []
        tail = self._tail(run)
        tail.require_known()
        tail.require_whole()
        if found := stored(tail, drafts):
            return found
        opens = drafts[0].event
        fork: Record | None = None
        if isinstance(opens, RunBranched) and not tail.records:
            if opens.parent == run:
                raise NoSuchPosition(f"run {run!r} cannot branch from itself")
            fork = left_at(await self.history(opens.parent), opens)
        records = following(tail, drafts, fork, self._clock.now())
        for record in records:
            self._store(Message(run, record.type, to_wire(record), record))
        return records

    def inject(self, run: str, type: str, wire: bytes) -> None:
        """Put a message on the stream that no append wrote, as anybody with access to a real one could."""
        try:
            read = parse_record(wire)
        except UnreadableRecord as error:
            read = error
        self._store(Message(run, type, wire, read))

    def _store(self, message: Message) -> None:
        self._events.append(message)
        self._tail(message.run).take(len(self._events), message.read)
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _tail(self, run: str) -> Tail:
        return self._tails.setdefault(checked_name(run), Tail(run))

    async def history(self, run: str) -> Sequence[Record]:
        parts: dict[str, Sequence[Record]] = {}
        end = None
        while run not in parts:
            tail = self._tail(run)
            tail.require_known()
            parts[run] = tail.up_to(end)
            if not (fork := tail.fork):
                break
            run, end = fork.parent, fork.at if end is None else min(end, fork.at)
        return tuple(chain.from_iterable(reversed(parts.values())))

    async def runs(self) -> Sequence[str]:
        return [run for run, tail in self._tails.items() if tail.records]

    async def serve(
        self,
        service: str,
        types: Sequence[str],
        answer: Callable[[Record], Awaitable[None]],
        run: str | None = None,
        at_once: int = 1,
    ) -> None:
        place = 0 if run else self._served[service]
        slots, unanswered = asyncio.Semaphore(at_once), set[int]()

        def keep_place() -> None:
            if run is None:
                self._served[service] = min(unanswered, default=place + 1) - 1

        async def deliver(message: Message, sequence: int) -> None:
            try:
                await self._deliver(service, message, sequence, answer)
            finally:
                slots.release()
            unanswered.remove(sequence)
            keep_place()

        async with asyncio.TaskGroup() as group:
            while True:
                for asked in [(name, each) for name, each in self._again if name == service and run is None]:
                    self._again.discard(asked)
                    for sequence, message in enumerate(self._events[:place], 1):
                        if message.type in types and message.run == asked[1]:
                            await self._deliver(service, message, sequence, answer)
                if place == len(self._events):
                    await self._news.wait()
                    continue
                message = self._events[place]
                place += 1
                if message.type in types and message.run == (run or message.run):
                    unanswered.add(place)
                    await slots.acquire()
                    group.create_task(deliver(message, place))
                keep_place()

    async def again(self, run: str, service: str) -> None:
        self._again.add((service, checked_name(run)))
        self._tell()

    async def _deliver(
        self, service: str, message: Message, sequence: int, answer: Callable[[Record], Awaitable[None]]
    ) -> None:
        record = await self._record(service, message, sequence, check_part)
        tries = 0
        for times in count(1) if record else ():
            assert record
            try:
                return await answer(record)
            except Exception as error:
                tries += not is_outage(error)
                if is_last(error, tries):
                    return await give_up(self, self._blobs, service, record, message.wire, sequence, error, tries)
                await asyncio.sleep(delay(times, self._retry_delay))

    async def _record(
        self, reader: str, message: Message, sequence: int, check: Callable[[Tail, Record], None]
    ) -> Record | None:
        """The message as a record of its run; what is none becomes a dead letter, by whoever reads it first."""
        try:
            if isinstance(message.read, UnreadableRecord):
                raise message.read
            check(self._tail(message.run), message.read)
            return message.read
        except UnreadableRecord as error:
            await give_up_unread(self, self._blobs, reader, message.run, message.wire, sequence, error)
            return None

    async def trace(self, envelope: Envelope) -> None:
        checked_name(envelope.run)
        self._envelopes.append(envelope)
        self._tell()

    async def traces(self, run: str, kind: str, key: str | None) -> Sequence[Envelope]:
        return [e for e in self._envelopes if (e.run, e.kind) == (run, kind) and key in (None, e.key)]

    async def traced(self, run: str, kind: str, key: str) -> AsyncIterator[Sequence[Envelope]]:
        seen = 0
        while True:
            if found := (await self.traces(run, kind, key))[seen:]:
                seen += len(found)
                yield found
            else:
                await self._news.wait()

    async def feed(self, name: str, batch: int = 500) -> AsyncIterator[Feed]:
        streams: tuple[tuple[Literal["SIA", "SIA_TRACE"], list[Any]], ...]
        streams = (("SIA", self._events), ("SIA_TRACE", self._envelopes))
        places = self._places.setdefault(name, {})
        while True:
            news = False
            for stream, messages in streams:
                acked, offered = places.get(stream, (0, 0))
                last = offered if offered > acked else min(len(messages), acked + batch)
                if last == acked:
                    continue
                news = True
                places[stream] = (acked, last)
                part = list(enumerate(messages[acked:last], acked + 1))

                async def ack(stream: str = stream, last: int = last) -> None:
                    places[stream] = (last, last)

                if stream == "SIA":
                    read = [await self._record(name, message, sequence, check_copied) for sequence, message in part]
                    yield Feed(stream, acked + 1, last, tuple(filter(None, read)), (), ack)
                else:
                    yield Feed(stream, acked + 1, last, (), tuple(part), ack)
            if not news:
                await self._news.wait()

    async def lag(self, name: str) -> int:
        acked = sum(acked for acked, _ in self._places.get(name, {}).values())
        return len(self._events) + len(self._envelopes) - acked

    async def rewind(self, name: str) -> None:
        self._places.pop(name, None)


class MemoryLog:
    """The `Log` port, without SQL: `query` is refused."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, int], Record] = {}
        self._envelopes: dict[int, Envelope] = {}

    async def append(self, records: Sequence[Record], token: str) -> None:
        self._records.update({(record.run, record.position): record for record in records})

    async def append_traces(self, envelopes: Sequence[tuple[int, Envelope]], token: str) -> None:
        self._envelopes.update(envelopes)

    async def records(self, run: str) -> Sequence[Record]:
        return [self._records[key] for key in sorted(self._records) if key[0] == run]

    async def wires(self, run: str) -> Sequence[tuple[int, bytes]]:
        return [(record.position, record.wire) for record in await self.records(run)]

    async def runs(self) -> Sequence[str]:
        first: dict[str, datetime] = {}
        for record in self._records.values():
            first[record.run] = min(first.get(record.run, record.time), record.time)
        return sorted(first, key=lambda run: (first[run], run))

    async def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> Sequence[Mapping[str, Any]]:
        raise NotImplementedError("the log in memory speaks no SQL")

    async def select(self, sql: str, form: Rows) -> bytes:
        raise NotImplementedError("the log in memory speaks no SQL")

    async def clear(self) -> None:
        self._records.clear()
        self._envelopes.clear()

    async def close(self) -> None:
        return None
