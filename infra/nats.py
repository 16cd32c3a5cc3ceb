"""The bus on NATS JetStream: append, history, serve, trace and feed over one connection."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from secrets import token_hex
from typing import cast
from uuid import uuid4

import structlog
from nats.js.errors import NotFoundError

from sia_events.infra import nats_feed
from sia_events.infra.delivery import checked_name, give_up, give_up_unread
from sia_events.infra.nats_connection import Connection, connected
from sia_events.infra.nats_feed import Place
from sia_events.infra.nats_partitions import ANY, EVENTS, TRACE, Partitions
from sia_events.infra.nats_runs import Runs
from sia_events.infra.nats_serve import Serving, Unanswerable, consumer, serve
from sia_events.infra.nats_stored import NatsStreams
from sia_events.infra.nats_streams import KEPT, Message, Retention, nothing_behind, publish, subjects_with
from sia_events.infra.nats_wire import ENCODING, packed, read_envelope, read_record, run_of, trace_subject
from sia_events.shared.ports import Blobs, Clock, Envelope, Feed
from sia_events.shared.record import Draft, Record, UnreadableRecord

ACK_WAIT_S = 30.0
RETRY_DELAY_S = 1.0
PATIENCE_S = 60.0  # how long a server may be away before we say so; one of our own is back within a second
FEED_S = 0.25  # how long news gathers before it is handed out: an insert costs the same for one row and for a hundred
FEED_BYTES = 16 * 2**20  # that a batch is cut at, packed and unpacked: a message may have half as many
OPENINGS_S = 1.0
TRACED_S = 1.0  # how long news of a trace gathers before whoever follows it is told
OPENINGS = ("RunStarted", "RunBranched")
CLOSINGS = ("RunFinished", "RunCancelled")

Answer = Callable[[Record], Awaitable[None]]

log = structlog.get_logger()


class NatsBus:
    """The `Bus` port."""

    def __init__(self, nats: Connection, runs: Runs, blobs: Blobs, ack_wait: float, retry_delay: float) -> None:
        self._nats = nats
        self._partitions = nats.partitions
        self._runs = runs
        self._blobs = blobs
        self._ack_wait = ack_wait
        self._retry_delay = retry_delay
        self.streams = NatsStreams(nats, runs)

    async def append(self, run: str, drafts: Sequence[Draft]) -> Sequence[Record]:
        return await self._runs.append(run, drafts)

    async def history(self, run: str) -> Sequence[Record]:
        return await self._runs.history(run)

    async def runs(self) -> Sequence[str]:
        return list(dict.fromkeys([run for kind in OPENINGS for run in await self._runs_with(kind)]))

    async def serve(
        self, service: str, types: Sequence[str], answer: Answer, run: str | None = None, at_once: int = 1
    ) -> None:
        if run is not None:
            # A consumer of its own each time: what was answered before is answered again from the record.
            name = f"{service}-{checked_name(run)}-{token_hex(4)}"
            serving = self._serving(name, service, types, answer, run, at_once)
            await serve(self._nats.broker, self._nats.client, serving, keep=False)
            return
        async with asyncio.TaskGroup() as group:
            async for opened in self._open_runs():
                group.create_task(self._serve_to_its_end(service, types, answer, opened, at_once))

    async def again(self, run: str, service: str) -> None:
        name = _shared(service, checked_name(run))
        with suppress(NotFoundError):
            # Whoever serves the run misses the consumer and makes it anew, from the first record on.
            stream = self._partitions.of(EVENTS, run)
            await self._nats.ask(lambda client: client.jetstream().delete_consumer(stream, name))

    async def _serve_to_its_end(
        self, service: str, types: Sequence[str], answer: Answer, run: str, at_once: int
    ) -> None:
        """Serve one run, shared with other processes that serve it, until its closing record has been handled."""
        closed = asyncio.Event()

        async def until_closed(record: Record) -> None:
            if record.type in types:
                await answer(record)
            if record.type in CLOSINGS:
                closed.set()

        serving = self._serving(_shared(service, run), service, [*types, *CLOSINGS], until_closed, run, at_once)
        task = asyncio.create_task(serve(self._nats.broker, self._nats.client, serving, keep=True))
        ended = asyncio.create_task(closed.wait())
        try:
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            task.cancel()
            ended.cancel()
            await asyncio.gather(task, ended, return_exceptions=True)

    async def _open_runs(self) -> AsyncIterator[str]:
        """Every run that is not over, and then each new one."""
        known = {run for kind in CLOSINGS for run in await self._runs_with(kind)}
        last = {(stream, kind): 0 for stream in self._partitions.cut(EVENTS) for kind in OPENINGS}
        while True:
            for (stream, kind), seen in last.items():
                for message in await self._nats.read(stream, seen + 1, self._partitions.subject(EVENTS, ANY, kind)):
                    last[stream, kind] = message.sequence
                    if (run := run_of(message.subject)) not in known:
                        known.add(run)
                        yield run
            await asyncio.sleep(OPENINGS_S)

    def _serving(
        self, name: str, service: str, types: Sequence[str], answer: Answer, run: str, at_once: int
    ) -> Serving:
        async def handle(message: Message) -> None:
            try:
                record = await self._runs.record_in(message, run)
            except UnreadableRecord as error:
                raise Unanswerable from error
            await answer(record)

        async def bury(message: Message, error: Exception, tries: int) -> None:
            if isinstance(error, Unanswerable):
                why = cast(Exception, error.__cause__)
                await give_up_unread(self, self._blobs, service, run, message.data, message.sequence, why)
            else:
                record = read_record(message, self._partitions)
                await give_up(self, self._blobs, service, record, message.data, message.sequence, error, tries)

        subjects = list(dict.fromkeys(self._partitions.subject(EVENTS, run, kind) for kind in types))
        made = consumer(name, subjects, self._ack_wait, in_order=at_once == 1)
        return Serving(self._partitions.of(EVENTS, run), made, handle, bury, self._retry_delay, at_once)

    async def trace(self, envelope: Envelope) -> None:
        subject = trace_subject(envelope.run, envelope.kind, envelope.key, self._partitions)
        for body in packed(envelope.lines, self._nats.client.max_payload - 1024):
            # The id makes one message of a second try; bodies alone may well be equal.
            message = (subject, body, {"Nats-Msg-Id": uuid4().hex, "Content-Encoding": ENCODING})
            await self._nats.ask(lambda client, message=message: publish(client, [message]))

    async def traces(self, run: str, kind: str, key: str | None) -> Sequence[Envelope]:
        messages = sorted(await self._traced(run, kind, key, 0), key=lambda message: message.place)
        return [envelope for _, envelope in self._envelopes(messages)]

    async def traced(self, run: str, kind: str, key: str) -> AsyncIterator[Sequence[Envelope]]:
        last = 0
        while True:
            if messages := await self._traced(run, kind, key, last):
                last = messages[-1].sequence
                if found := [envelope for _, envelope in self._envelopes(messages)]:
                    yield found
            await asyncio.sleep(TRACED_S)

    async def feed(self, name: str, batch: int = 500) -> AsyncIterator[Feed]:
        streams = self._partitions.names
        places = {s: await self._nats.ask(lambda client, s=s: nats_feed.place(client, name, s)) for s in streams}

        async def keep(stream: str, place: Place) -> None:
            await self._nats.ask(lambda client: nats_feed.keep(client, name, stream, place))
            places[stream] = place

        while True:
            full = False
            for stream in streams:
                at = places[stream]
                # What was handed out and not acked is handed out again as the same batch, by where it ended.
                again = at.offered - at.acked
                enough, until = (2**62, at.offered) if again else (FEED_BYTES, 2**62)
                messages = await self._nats.read(stream, at.acked + 1, limit=again or batch, enough=enough, until=until)
                came = messages[-1].sequence if messages else at.acked
                # Another replica may be behind the one that we read before; or else what is missing is lost.
                if came == at.acked or (came < at.offered and not await self._is_end(stream, came)):
                    continue
                full = full or len(messages) == batch or sum(len(each.data) for each in messages) >= enough
                last = min(came, at.offered) if again else came
                records, envelopes = (), ()
                if stream in self._partitions.cut(EVENTS):
                    records = await self._records(name, [each for each in messages if each.sequence <= last])
                else:
                    envelopes, unpacked = self._unpacked(messages, last, enough)
                    full, last = full or unpacked < last, unpacked
                if last > at.offered:
                    await keep(stream, Place(at.acked, last))

                async def ack(stream: str = stream, last: int = last) -> None:
                    await keep(stream, Place(last, last))

                yield Feed(stream, at.acked + 1, last, records, envelopes, ack)
            if not full:
                await asyncio.sleep(FEED_S)

    async def _is_end(self, stream: str, sequence: int) -> bool:
        return await self._nats.ask(lambda client: nothing_behind(client, stream, sequence))

    async def lag(self, name: str) -> int:
        return await self._nats.ask(lambda client: nats_feed.lag(client, name, self._partitions.names))

    async def rewind(self, name: str) -> None:
        for stream in self._partitions.names:
            await self._nats.ask(lambda client, stream=stream: nats_feed.keep(client, name, stream, Place()))

    async def _records(self, reader: str, messages: Sequence[Message]) -> tuple[Record, ...]:
        """Those of the messages that are records; each other one becomes a dead letter, by whoever reads it first."""
        records: list[Record] = []
        for message in messages:
            run = run_of(message.subject)
            try:
                records.append(await self._runs.record_to_copy(message, run))
            except UnreadableRecord as error:
                with suppress(ValueError):  # under a name that no run can have there is no run to tell
                    await give_up_unread(self, self._blobs, reader, run, message.data, message.sequence, error)
        return tuple(records)

    async def _runs_with(self, kind: str) -> list[str]:
        pattern, found = self._partitions.subject(EVENTS, ANY, kind), list[str]()
        for stream in self._partitions.cut(EVENTS):
            found += await self._nats.ask(lambda client, stream=stream: subjects_with(client, stream, pattern))
        return [run_of(subject) for subject in found]

    async def _traced(self, run: str, kind: str, key: str | None, last: int) -> Sequence[Message]:
        """What stands behind the sequence `last`."""
        subject = trace_subject(run, kind, key, self._partitions)
        return await self._nats.read(self._partitions.of(TRACE, run), last + 1, subject)

    def _unpacked(
        self, messages: Sequence[Message], last: int, enough: int
    ) -> tuple[tuple[tuple[int, Envelope], ...], int]:
        """The envelopes among the messages up to sequence `last`, or up to where their lines have `enough` bytes."""
        found: list[tuple[int, Envelope]] = []
        size = 0
        for message in messages:
            if message.sequence > last:
                break
            found += (news := self._envelopes([message]))
            size += sum(len(line) for _, envelope in news for line in envelope.lines)
            if size >= enough:
                return tuple(found), message.sequence
        return tuple(found), last

    def _envelopes(self, messages: Sequence[Message]) -> tuple[tuple[int, Envelope], ...]:
        """Those of the messages that are envelopes. What somebody else put there tells nothing of any run."""
        found: list[tuple[int, Envelope]] = []
        for message in messages:
            try:
                found.append((message.sequence, read_envelope(message, self._partitions)))
            except UnreadableRecord as error:
                log.error("a message among the traces is no envelope", sequence=message.sequence, error=str(error))
        return tuple(found)


def _shared(service: str, run: str) -> str:
    """The consumer that all processes share who serve a run among others."""
    return f"{service}-{run}"


@asynccontextmanager
async def connect(
    url: str,
    blobs: Blobs,
    clock: Clock,
    replicas: int = 1,
    *,
    ack_wait: float = ACK_WAIT_S,
    retry_delay: float = RETRY_DELAY_S,
    patience: float = PATIENCE_S,
    partitions: int = 1,
    retention: Retention = KEPT,
) -> AsyncIterator[NatsBus]:
    """A bus on the server (or servers, comma between) at `url`; times are in seconds. Raises as `connected` does.

    History stands there in as many `partitions` as it was begun with, each run in one.
    """
    async with connected(url, replicas, patience, Partitions(partitions), retention) as connection:
        yield NatsBus(connection, Runs(connection, clock), blobs, ack_wait, retry_delay)
