"""The runs on the stream as one process knows them: appended to by compare-and-set, and read as far as is asked."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain, count

from nats.aio.client import Client

from sia_events.infra.delivery import checked_name
from sia_events.infra.nats_connection import Connection
from sia_events.infra.nats_partitions import EVENTS
from sia_events.infra.nats_seek import seek
from sia_events.infra.nats_streams import IN_PLACE_OF, Message, counted_last, publish, read, subjects_with
from sia_events.infra.nats_wire import CLOUD_EVENTS, read_record, subject_of
from sia_events.infra.tail import RunIncomplete, Tail, check_copied, check_part, following, left_at, stored
from sia_events.shared.events import RunBranched
from sia_events.shared.ports import Clock, NoSuchPosition, RunExists
from sia_events.shared.record import Draft, Record, UnreadableRecord, to_wire

KEPT_RUNS = 64
BEHIND_S = 0.1
LOOKS = 20
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
        parts: dict[str, Sequence[Record]] = {}
        end = None
        # What somebody forged may come back to itself, and is a history without a beginning.
        while run not in parts:
            tail, lock = self._tail(run)
            async with lock:
                await self._nats.ask(lambda client, tail=tail: self._catch_up(client, tail))
            parts[run] = tail.up_to(end)
            if not (fork := tail.fork):
                break
            run, end = fork.parent, fork.at if end is None else min(end, fork.at)
        return tuple(chain.from_iterable(reversed(parts.values())))

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
        record = read_record(message, self._nats.partitions)
        check_part(await self._see(run, message.sequence), record)
        return record

    async def record_to_copy(self, message: Message, run: str) -> Record:
        """As `record_in`, and a record behind some that are lost too. Raises UnreadableRecord."""
        record = read_record(message, self._nats.partitions)
        check_copied(await self._see(run, message.sequence), record)
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
            records = following(tail, drafts, await self._fork(client, tail, drafts), self._clock.now())
            behind = tail.sequence
            messages = [
                (self._subject(each), to_wire(each), {"Nats-Msg-Id": str(each.id), **_behind(tail.run, behind, i)})
                for i, each in enumerate(records)
            ]
            if last := await publish(client, messages):
                for sequence, record in enumerate(records, last - len(records) + 1):
                    tail.take(sequence, record)
                return records
            await self._read_news(client, tail)

    async def _restore(self, client: Client, tail: Tail, records: Sequence[Record]) -> int:
        """Compare and set, as an append, but of records that have their place. Cut short, it goes on where it was."""
        counted = sum((await subjects_with(client, self._stream(tail.run), _subjects(tail.run))).values())
        await self._catch_up(client, tail)
        before = len(tail.records)
        # The server goes on counting those that it cannot read: what is put back tells how many are made good by it.
        lost = counted - before - tail.skipped
        mark = {IN_PLACE_OF: str(lost)} if lost > 0 else {}
        while True:
            if any(one.wire != other.wire for one, other in zip(tail.records, records, strict=False)):
                raise RunExists(f"run {tail.run!r} exists already and has other records; nothing of it was changed")
            missing = records[len(tail.records) :][:RESTORED_AT_ONCE]
            if not missing:
                return max(0, len(records) - before)
            # Less than what was read, where the last message is one of the lost.
            behind = await counted_last(client, self._stream(tail.run), _subjects(tail.run))
            # No message id: the server would take a record that it has lost lately for one that it still has.
            messages = [
                (self._subject(each), to_wire(each), {**_behind(tail.run, behind, i), **mark})
                for i, each in enumerate(missing)
            ]
            if behind <= tail.sequence and (last := await publish(client, messages)):
                for sequence, record in enumerate(missing, last - len(missing) + 1):
                    tail.take(sequence, record)
            else:
                await self._catch_up(client, tail)

    async def _fork(self, client: Client, tail: Tail, drafts: Sequence[Draft]) -> Record | None:
        """The record that `drafts` go on behind, if they open a branch; sought, as its run may be long."""
        opens = drafts[0].event
        if tail.records or not isinstance(opens, RunBranched):
            return None
        if opens.parent == tail.run:
            raise NoSuchPosition(f"run {tail.run!r} cannot branch from itself")
        found = await seek(client, self._nats.partitions, opens.parent, opens.at)
        return found or left_at(await self.history(opens.parent), opens)

    async def _read_news(self, client: Client, tail: Tail) -> None:
        """Read what somebody else wrote first. Raises RunIncomplete where that is nothing, and never will be."""
        before = tail.sequence
        for look in count():
            await self._catch_up(client, tail)
            if tail.sequence > before:
                return
            counted = await counted_last(client, self._stream(tail.run), _subjects(tail.run))
            if counted < before or (counted == before and look == LOOKS):
                break
            await asyncio.sleep(BEHIND_S)
        raise RunIncomplete(
            f"run {tail.run}: the server refuses what would come next and cannot read what it has there; nothing was "
            f"written. Put it back: sia verify {tail.run} --repair"
        )

    async def _catch_up(self, client: Client, tail: Tail) -> None:
        for message in await read(client, self._stream(tail.run), tail.sequence + 1, _subjects(tail.run)):
            try:
                tail.take(message.sequence, read_record(message, self._nats.partitions))
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

    def _stream(self, run: str) -> str:
        return self._nats.partitions.of(EVENTS, run)

    def _subject(self, record: Record) -> str:
        return subject_of(record, self._nats.partitions)

    def _tail(self, run: str) -> tuple[Tail, asyncio.Lock]:
        found = self._tails.setdefault(checked_name(run), (Tail(run), asyncio.Lock()))
        self._tails.move_to_end(run)
        if len(self._tails) > KEPT_RUNS:
            # Whoever works with it still does so safely: an append is checked against the stream.
            self._tails.popitem(last=False)
        return found


def _subjects(run: str) -> str:
    return f"sia.events.{run}.>"


def _behind(run: str, sequence: int, number: int) -> dict[str, str]:
    """Headers of the `number`-th message of an append: its first is taken only behind the run's message `sequence`."""
    if number:
        return CLOUD_EVENTS
    return {
        **CLOUD_EVENTS,
        "Nats-Expected-Last-Subject-Sequence": str(sequence),
        "Nats-Expected-Last-Subject-Sequence-Subject": _subjects(run),
    }
