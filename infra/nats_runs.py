"""The runs on the stream as one process knows them: appended to by compare-and-set, and read as far as is asked."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from nats.aio.client import Client

from sia_events.infra.delivery import checked_name
from sia_events.infra.nats_connection import Connection
from sia_events.infra.nats_streams import EVENTS, Message, publish, read
from sia_events.infra.nats_wire import CLOUD_EVENTS, read_record, subject_of
from sia_events.infra.tail import RunIncomplete, Tail, check_part, following, stored
from sia_events.shared.events import RunBranched
from sia_events.shared.ports import Clock, NoSuchPosition, RunExists
from sia_events.shared.record import Draft, Record, UnreadableRecord, to_wire

KEPT_RUNS = 64
BEHIND_S = 0.1
RESTORED_AT_ONCE = 500


class Runs:
    """Keeps the records of the runs that it was asked about last, so that only news is read."""

    def __init__(self, nats: Connection, clock: Clock) -> None:
        self._nats = nats
        self._clock = clock
        self._tails: OrderedDict[str, tuple[Tail, asyncio.Lock]] = OrderedDict()

    async def append(self, run: str, drafts: Sequence[Draft]) -> Sequence[Record]:
        """As `Bus.append`."""
        if not drafts:
            return []
        tail, lock = self._tail(run)
        async with lock:
            return await self._nats.ask(lambda client: self._append(client, tail, drafts))

    async def history(self, run: str) -> Sequence[Record]:
        """As `Bus.history`."""
        tail, lock = self._tail(run)
        async with lock:
            await self._nats.ask(lambda client: self._catch_up(client, tail))
        if fork := tail.fork:
            return (*(await self.history(fork.parent))[: fork.at], *tail.records)
        return tuple(tail.records)

    async def restore(self, run: str, records: Sequence[Record]) -> int:
        """As `Streams.restore`."""
        tail, lock = self._tail(run)
        async with lock:
            return await self._nats.ask(lambda client: self._restore(client, tail, records))

    async def check_whole(self, run: str) -> None:
        """As `Streams.check_whole`."""
        history = await self.history(run)
        self._tail(run)[0].require_whole()
        if history and len(history) < history[-1].position:
            raise RunIncomplete(f"run {run}: what it branched from has lost records: sia verify {run} --repair")

    async def record_in(self, message: Message, run: str) -> Record:
        """The record that a message under the run's subjects is. Raises UnreadableRecord where it is no part of it."""
        record = read_record(message)
        check_part(await self._see(run, message.sequence), record)
        return record

    async def _append(self, client: Client, tail: Tail, drafts: Sequence[Draft]) -> Sequence[Record]:
        """Compare and set on the run's last message. Who loses, or cannot know, reads on and looks for its records."""
        if not tail.sequence:
            await self._catch_up(client, tail)
        tail.require_known()
        while True:
            tail.require_whole()
            if found := stored(tail, drafts):
                return found
            records = following(tail, drafts, await self._parent(tail, drafts), self._clock.now())
            messages = [
                (subject_of(record), to_wire(record), {"Nats-Msg-Id": str(record.id), **_behind(tail, i)})
                for i, record in enumerate(records)
            ]
            if last := await publish(client, messages):
                for sequence, record in enumerate(records, last - len(records) + 1):
                    tail.take(sequence, record)
                return records
            await self._catch_up(client, tail)

    async def _restore(self, client: Client, tail: Tail, records: Sequence[Record]) -> int:
        """Compare and set, as an append, but of records that have their place. Cut short, it goes on where it was."""
        await self._catch_up(client, tail)
        before = len(tail.records)
        while True:
            if any(one.wire != other.wire for one, other in zip(tail.records, records, strict=False)):
                raise RunExists(f"run {tail.run!r} exists already and has other records; nothing of it was changed")
            missing = records[len(tail.records) :][:RESTORED_AT_ONCE]
            if not missing:
                return max(0, len(records) - before)
            # No message id: the server would take a record that it has lost lately for one that it still has.
            messages = [(subject_of(record), to_wire(record), _behind(tail, i)) for i, record in enumerate(missing)]
            if last := await publish(client, messages):
                for sequence, record in enumerate(missing, last - len(missing) + 1):
                    tail.take(sequence, record)
            else:
                await self._catch_up(client, tail)

    async def _parent(self, tail: Tail, drafts: Sequence[Draft]) -> Sequence[Record]:
        """The history that `drafts` branch from, if they open a branch."""
        opens = drafts[0].event
        if tail.records or not isinstance(opens, RunBranched):
            return ()
        if opens.parent == tail.run:
            raise NoSuchPosition(f"run {tail.run!r} cannot branch from itself")
        return await self.history(opens.parent)

    async def _catch_up(self, client: Client, tail: Tail) -> None:
        for message in await read(client, EVENTS, tail.sequence + 1, f"sia.events.{tail.run}.>"):
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
                await self._nats.ask(lambda client: self._catch_up(client, tail))
            if tail.sequence < sequence:
                await asyncio.sleep(BEHIND_S)
        return tail

    def _tail(self, run: str) -> tuple[Tail, asyncio.Lock]:
        found = self._tails.setdefault(checked_name(run), (Tail(run), asyncio.Lock()))
        self._tails.move_to_end(run)
        if len(self._tails) > KEPT_RUNS:
            # Whoever works with it still does so safely: an append is checked against the stream.
            self._tails.popitem(last=False)
        return found


def _behind(tail: Tail, number: int) -> dict[str, str]:
    """Headers of the `number`-th message of an append: its first is taken only where the tail is still the tail."""
    if number:
        return CLOUD_EVENTS
    return {
        **CLOUD_EVENTS,
        "Nats-Expected-Last-Subject-Sequence": str(tail.sequence),
        "Nats-Expected-Last-Subject-Sequence-Subject": f"sia.events.{tail.run}.>",
    }
