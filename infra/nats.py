"""The bus on NATS JetStream: append, history, serve, trace and feed over one connection."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from secrets import token_hex
from typing import TypeVar, cast
from urllib.parse import urlsplit
from uuid import uuid4

import structlog
from faststream.nats import NatsBroker
from nats.aio.client import Client
from nats.js.errors import NotFoundError

from sia_events.infra import nats_feed
from sia_events.infra.delivery import checked_name, give_up, give_up_unread
from sia_events.infra.nats_feed import STREAMS, Place
from sia_events.infra.nats_serve import Serving, Unanswerable, consumer, serve
from sia_events.infra.nats_server import MINIMUM, server_info, too_old
from sia_events.infra.nats_streams import (
    EVENTS,
    TRACE,
    UNANSWERED,
    Message,
    ensure_streams,
    heeding,
    publish,
    read,
    subjects_with,
)
from sia_events.infra.nats_wire import (
    CLOUD_EVENTS,
    packed,
    read_envelope,
    read_record,
    run_of,
    subject_of,
    trace_subject,
)
from sia_events.infra.tail import Tail, check_part, following, stored
from sia_events.shared.events import RunBranched
from sia_events.shared.ports import Blobs, BusUnreachable, Clock, Envelope, Feed, NoSuchPosition
from sia_events.shared.record import Draft, Record, UnreadableRecord, to_wire

ACK_WAIT_S = 30.0
RETRY_DELAY_S = 1.0
PATIENCE_S = 60.0  # how long a server may be away before we say so; one of our own is back within a second
CONNECT_S = 10.0
FEED_S = 0.1  # how long news gathers before it is handed out: an insert costs the same for one row and for a hundred
OPENINGS_S = 1.0
OPENINGS = ("RunStarted", "RunBranched")
CLOSINGS = ("RunFinished", "RunCancelled")
KEPT_RUNS = 64

Answer = Callable[[Record], Awaitable[None]]
T = TypeVar("T")

log = structlog.get_logger()


class NatsBus:
    """The `Bus` port. It keeps the records of the runs that it was asked about last, so that only news is read."""

    def __init__(
        self,
        broker: NatsBroker,
        client: Client,
        blobs: Blobs,
        clock: Clock,
        *,
        ack_wait: float = ACK_WAIT_S,
        retry_delay: float = RETRY_DELAY_S,
        patience: float = PATIENCE_S,
    ) -> None:
        self._broker = broker
        self._client = client
        self._blobs = blobs
        self._clock = clock
        self._ack_wait = ack_wait
        self._retry_delay = retry_delay
        self._patience = patience
        self._tails: OrderedDict[str, tuple[Tail, asyncio.Lock]] = OrderedDict()

    async def append(self, run: str, drafts: Sequence[Draft]) -> Sequence[Record]:
        if not drafts:
            return []
        tail, lock = self._tail(run)
        async with lock:
            return await self._patiently(lambda: self._append(tail, drafts))

    async def _append(self, tail: Tail, drafts: Sequence[Draft]) -> Sequence[Record]:
        """Compare and set on the run's last message. Who loses, or cannot know, reads on and looks for its records."""
        if not tail.sequence:
            await self._catch_up(tail)
        tail.require_known()
        while True:
            if found := stored(tail, drafts):
                return found
            records = following(tail, drafts, await self._parent(tail, drafts), self._clock.now())
            messages = [
                (subject_of(record), to_wire(record), {"Nats-Msg-Id": str(record.id), **CLOUD_EVENTS})
                for record in records
            ]
            messages[0][2].update(
                {
                    "Nats-Expected-Last-Subject-Sequence": str(tail.sequence),
                    "Nats-Expected-Last-Subject-Sequence-Subject": f"sia.events.{tail.run}.>",
                }
            )
            if last := await publish(self._client, messages):
                for sequence, record in enumerate(records, last - len(records) + 1):
                    tail.take(sequence, record)
                return records
            await self._catch_up(tail)

    async def _parent(self, tail: Tail, drafts: Sequence[Draft]) -> Sequence[Record]:
        """The history that `drafts` branch from, if they open a branch."""
        opens = drafts[0].event
        if tail.records or not isinstance(opens, RunBranched):
            return ()
        if opens.parent == tail.run:
            raise NoSuchPosition(f"run {tail.run!r} cannot branch from itself")
        return await self.history(opens.parent)

    async def history(self, run: str) -> Sequence[Record]:
        tail, lock = self._tail(run)
        async with lock:
            await self._patiently(lambda: self._catch_up(tail))
        if fork := tail.fork:
            return (*(await self.history(fork.parent))[: fork.at], *tail.records)
        return tuple(tail.records)

    async def runs(self) -> Sequence[str]:
        return list(dict.fromkeys([run for kind in OPENINGS for run in await self._runs_with(kind)]))

    async def serve(
        self, service: str, types: Sequence[str], answer: Answer, run: str | None = None, at_once: int = 1
    ) -> None:
        if run is not None:
            # A consumer of its own each time: what was answered before is answered again from the record.
            name = f"{service}-{checked_name(run)}-{token_hex(4)}"
            serving = self._serving(name, service, types, answer, run, at_once)
            await serve(self._broker, self._client, serving, keep=False)
            return
        async with asyncio.TaskGroup() as group:
            async for opened in self._open_runs():
                group.create_task(self._serve_to_its_end(service, types, answer, opened, at_once))

    async def again(self, run: str, service: str) -> None:
        name = _shared(service, checked_name(run))
        with suppress(NotFoundError):
            # Whoever serves the run misses the consumer and makes it anew, from the first record on.
            await self._patiently(lambda: self._client.jetstream().delete_consumer(EVENTS, name))

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
        task = asyncio.create_task(serve(self._broker, self._client, serving, keep=True))
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
        last = dict.fromkeys(OPENINGS, 0)
        while True:
            for kind in OPENINGS:
                for message in await self._read(EVENTS, last[kind] + 1, f"sia.events.*.{kind}"):
                    last[kind] = message.sequence
                    if (run := run_of(message.subject)) not in known:
                        known.add(run)
                        yield run
            await asyncio.sleep(OPENINGS_S)

    def _serving(
        self, name: str, service: str, types: Sequence[str], answer: Answer, run: str, at_once: int
    ) -> Serving:
        async def handle(message: Message) -> None:
            try:
                record = read_record(message)
                check_part(await self._see(run, message.sequence), record)
            except UnreadableRecord as error:
                raise Unanswerable from error
            await answer(record)

        async def bury(message: Message, error: Exception, tries: int) -> None:
            if isinstance(error, Unanswerable):
                why = cast(Exception, error.__cause__)
                await give_up_unread(self, self._blobs, service, run, message.data, message.sequence, why)
            else:
                record = read_record(message)
                await give_up(self, self._blobs, service, record, message.data, message.sequence, error, tries)

        subjects = list(dict.fromkeys(f"sia.events.{run}.{kind}" for kind in types))
        made = consumer(name, subjects, self._ack_wait, in_order=at_once == 1)
        return Serving(made, handle, bury, self._retry_delay, at_once)

    async def trace(self, envelope: Envelope) -> None:
        subject = trace_subject(envelope.run, envelope.kind, envelope.key)
        for body in packed(envelope.lines, self._client.max_payload - 1024):
            # The id makes one message of a second try; bodies alone may well be equal.
            message = (subject, body, {"Nats-Msg-Id": uuid4().hex, "Content-Encoding": "deflate"})
            await self._patiently(lambda message=message: publish(self._client, [message]))

    async def traces(self, run: str, kind: str, key: str | None) -> Sequence[Envelope]:
        return [envelope for _, envelope in _envelopes(await self._read(TRACE, 1, trace_subject(run, kind, key)))]

    async def feed(self, name: str, batch: int = 500) -> AsyncIterator[Feed]:
        places = {s: await self._patiently(lambda s=s: nats_feed.place(self._client, name, s)) for s in STREAMS}

        async def keep(stream: str, place: Place) -> None:
            await self._patiently(lambda: nats_feed.keep(self._client, name, stream, place))
            places[stream] = place

        while True:
            news = False
            for stream in STREAMS:
                at = places[stream]
                # What was handed out and not acked is handed out again as the same batch.
                messages = await self._read(stream, at.acked + 1, limit=at.offered - at.acked or batch)
                if not messages or messages[-1].sequence < at.offered:
                    continue
                news = True
                last = messages[-1].sequence
                if last > at.offered:
                    await keep(stream, Place(at.acked, last))

                async def ack(stream: str = stream, last: int = last) -> None:
                    await keep(stream, Place(last, last))

                if stream == EVENTS:
                    yield Feed("SIA", at.acked + 1, last, await self._records(name, messages), (), ack)
                else:
                    yield Feed("SIA_TRACE", at.acked + 1, last, (), _envelopes(messages), ack)
            if not news:
                await asyncio.sleep(FEED_S)

    async def lag(self, name: str) -> int:
        return await self._patiently(lambda: nats_feed.lag(self._client, name))

    async def rewind(self, name: str) -> None:
        for stream in STREAMS:
            await self._patiently(lambda stream=stream: nats_feed.keep(self._client, name, stream, Place()))

    async def _records(self, reader: str, messages: Sequence[Message]) -> tuple[Record, ...]:
        """Those of the messages that are records; each other one becomes a dead letter, by whoever reads it first."""
        records: list[Record] = []
        for message in messages:
            run = run_of(message.subject)
            try:
                record = read_record(message)
                check_part(await self._see(run, message.sequence), record)
                records.append(record)
            except UnreadableRecord as error:
                with suppress(ValueError):  # under a name that no run can have there is no run to tell
                    await give_up_unread(self, self._blobs, reader, run, message.data, message.sequence, error)
        return tuple(records)

    def _tail(self, run: str) -> tuple[Tail, asyncio.Lock]:
        found = self._tails.setdefault(checked_name(run), (Tail(run), asyncio.Lock()))
        self._tails.move_to_end(run)
        if len(self._tails) > KEPT_RUNS:
            # Whoever works with it still does so safely: an append is checked against the stream.
            self._tails.popitem(last=False)
        return found

    async def _catch_up(self, tail: Tail) -> None:
        for message in await read(self._client, EVENTS, tail.sequence + 1, f"sia.events.{tail.run}.>"):
            try:
                tail.take(message.sequence, read_record(message))
            except UnreadableRecord as error:
                tail.take(message.sequence, error)
        tail.require_known()

    async def _see(self, run: str, sequence: int) -> Tail:
        """Read a run at least up to a message that was delivered: another replica may be behind the one that did."""
        tail, lock = self._tail(run)
        while tail.sequence < sequence:
            async with lock:
                await self._patiently(lambda: self._catch_up(tail))
            if tail.sequence < sequence:
                await asyncio.sleep(FEED_S)
        return tail

    async def _read(self, stream: str, start: int, subject: str | None = None, limit: int = 2**62) -> list[Message]:
        return await self._patiently(lambda: read(self._client, stream, start, subject, limit))

    async def _runs_with(self, kind: str) -> list[str]:
        subjects = await self._patiently(lambda: subjects_with(self._client, EVENTS, f"sia.events.*.{kind}"))
        return [run_of(subject) for subject in subjects]

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until the server answers. Raises BusUnreachable when it has not for so long that nobody is mending it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        while True:
            try:
                return await heeding(ask())
            except UNANSWERED as error:
                if loop.time() > deadline:
                    raise BusUnreachable(
                        f"the NATS server has not answered for {self._patience:.0f} s ({error!r}). "
                        "What it acknowledged is kept. See that it runs and has disk left, then run the same command."
                    ) from error
            await asyncio.sleep(FEED_S)


def _shared(service: str, run: str) -> str:
    """The consumer that all processes share who serve a run among others."""
    return f"{service}-{run}"


def _envelopes(messages: Sequence[Message]) -> tuple[tuple[int, Envelope], ...]:
    """Those of the messages that are envelopes. What somebody else put there tells nothing of any run."""
    found: list[tuple[int, Envelope]] = []
    for message in messages:
        try:
            found.append((message.sequence, read_envelope(message)))
        except UnreadableRecord as error:
            log.error("a message among the traces is no envelope", sequence=message.sequence, error=str(error))
    return tuple(found)


@asynccontextmanager
async def connect(url: str, blobs: Blobs, clock: Clock, replicas: int = 1, **patience: float) -> AsyncIterator[NatsBus]:
    """A bus on the server (or servers, comma between) at `url`, its streams made and checked.

    `patience` are NatsBus's own: ack_wait, retry_delay, patience, in seconds. Raises BusUnreachable when nothing fit
    listens there, StreamUnfit and BusFull when the streams cannot be had.
    """
    servers = url.split(",")
    for server in servers:
        await _check(server)
    broker = NatsBroker(
        servers,
        name="sia",
        reconnect_time_wait=cast(int, 0.2),
        max_reconnect_attempts=-1,
        error_cb=_lost,
        logger=None,
        apply_types=False,
        graceful_timeout=5.0,
    )
    try:
        async with asyncio.timeout(CONNECT_S):
            client = await broker.connect()
            await ensure_streams(client, replicas)
    except (TimeoutError, *UNANSWERED) as error:
        raise BusUnreachable(f"the NATS server at {_shown(url)} lets us in but does not answer: {error!r}") from error
    try:
        yield NatsBus(broker, client, blobs, clock, **patience)
    finally:
        with suppress(TimeoutError, *UNANSWERED):
            await asyncio.wait_for(broker.stop(), CONNECT_S)


async def _check(server: str) -> None:
    """Look before connecting: the client would wait for ever, and an old server would fail at the first append."""
    place = urlsplit(server if "://" in server else f"nats://{server}")
    mend = "Start one, or name another in SIA_NATS_URL, or unset it for a server of our own."
    try:
        info = await server_info(place.hostname or "localhost", place.port or 4222)
    except (OSError, ValueError, TimeoutError) as error:
        raise BusUnreachable(f"no NATS server answers at {_shown(server)}: {error}. {mend}") from error
    if too_old(info["version"]):
        least = ".".join(map(str, MINIMUM))
        raise BusUnreachable(f"{_shown(server)} is nats-server {info['version']}; {least} or later is needed. {mend}")
    if not info.get("jetstream"):
        raise BusUnreachable(f"the NATS server at {_shown(server)} has JetStream off. Start it with -js. {mend}")


def _shown(url: str) -> str:
    """The URL without the token or password in it."""
    return ",".join(server.rpartition("@")[2] for server in url.split(","))


async def _lost(error: Exception) -> None:
    log.debug("bus connection", error=repr(error))
