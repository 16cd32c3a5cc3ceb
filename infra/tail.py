"""What one process knows of one run on the stream: its own records in order, and how far it has read them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from sia_events.shared.events import RunBranched
from sia_events.shared.ports import NoSuchPosition, RunExists
from sia_events.shared.record import GENESIS, Draft, NewerRecord, Record, UnreadableRecord, follows, place


class RunTooNew(Exception):
    """Other code has written to the run: whoever cannot read all of it must not write behind it."""


class RunIncomplete(Exception):
    """Records of the run are lost while later ones stand: whoever wrote now would write in the place of the lost."""


@dataclass
class Tail:
    """Grows with the stream. `sequence` is that of the last message read under the run's subjects, readable or not.

    A message that is no record of this run at the next position (unreadable, forged, published twice by hand) is
    counted in `skipped` and is no part of the run. `newer` is a record of the run that only other code can read.
    `beyond` is the last position that stands behind some that are lost; `ahead` the last record read that may be such,
    and `past_gap` are those that are.
    """

    run: str
    records: list[Record] = field(default_factory=list)
    ids: dict[UUID, Record] = field(default_factory=dict)
    sequence: int = 0
    skipped: int = 0
    newer: NewerRecord | None = None
    beyond: int = 0
    ahead: Record | NewerRecord | None = None
    past_gap: dict[UUID, Record] = field(default_factory=dict)

    def take(self, sequence: int, read: Record | UnreadableRecord) -> None:
        """Take over what was read of the run's next message: its record, or why it is none."""
        self.sequence = sequence
        if isinstance(read, NewerRecord) and self._continued_by(read):
            self.newer = self.newer or read
        elif isinstance(read, UnreadableRecord) or read.run != self.run or read.position != self._next(read):
            self.skipped += 1
            if isinstance(read, Record | NewerRecord) and read.run == self.run and read.position > self._next(read):
                # A number alone is anybody's, and stops no run; two that follow from each other are what was appended.
                if self.ahead and follows(self.ahead.chain, read.wire, read.chain):
                    if not self.records and isinstance(self.ahead, NewerRecord):
                        self.newer = self.newer or self.ahead
                    self.beyond = max(self.beyond, read.position)
                    self.past_gap |= {each.id: each for each in (self.ahead, read) if isinstance(each, Record)}
                self.ahead = read
        else:
            self.records.append(read)
            self.ids[read.id] = read

    def require_known(self) -> None:
        """Raises RunTooNew."""
        if self.newer:
            raise RunTooNew(str(self.newer)) from self.newer

    def require_whole(self) -> None:
        """Raises RunIncomplete, and RunTooNew where what stands under the name may be the first record of a branch."""
        if not self.records and isinstance(self.ahead, NewerRecord):
            raise RunTooNew(str(self.ahead)) from self.ahead
        last = self.records[-1].position if self.records else 0
        if last < self.beyond:
            raise RunIncomplete(
                f"run {self.run}: behind record {last} some are lost, and others stand up to {self.beyond}; "
                f"nothing was written. Put them back: sia verify {self.run} --repair"
            )

    def up_to(self, end: int | None) -> Sequence[Record]:
        """The run's own records up to the position `end`, or all of them."""
        if end is None or not self.records:
            return tuple(self.records)
        return tuple(self.records[: max(0, end + 1 - self.records[0].position)])

    def _continued_by(self, newer: NewerRecord) -> bool:
        """Whether it is a link of the run's chain: anybody can write a number, and that alone must not stop a run."""
        last = self.records[-1] if self.records else None
        position, chain = (last.position, last.chain) if last else (0, GENESIS)
        return newer.run == self.run and newer.position == position + 1 and follows(chain, newer.wire, newer.chain)

    def _next(self, read: Record | NewerRecord) -> int:
        if self.records:
            return self.records[-1].position + 1
        opens = read.event if isinstance(read, Record) else None
        return opens.at + 1 if isinstance(opens, RunBranched) else 1

    @property
    def fork(self) -> RunBranched | None:
        """Where the run leaves its parent, if it has one."""
        first = self.records[0].event if self.records else None
        return first if isinstance(first, RunBranched) else None


def check_part(tail: Tail, record: Record) -> None:
    """Raises UnreadableRecord for what looks like a record and is none of the run: it stood where another one does."""
    if tail.ids.get(record.id) != record:
        raise UnreadableRecord(f"record {record.id} is no part of run {tail.run}: it has no position of its own there")


def check_copied(tail: Tail, record: Record) -> None:
    """As `check_part`, but records behind some that are lost pass: whoever reads a copy has to see that gap."""
    if tail.past_gap.get(record.id) != record:
        check_part(tail, record)


def stored(tail: Tail, drafts: Sequence[Draft]) -> list[Record] | None:
    """The records of `drafts` as first appended, or None when none of them is there.

    Raises RunExists when they would open a run that another draft opened.
    """
    found = [tail.ids[draft.id] for draft in drafts if draft.id in tail.ids]
    if found and len(found) < len(drafts):
        raise AssertionError(f"run {tail.run}: {len(found)} of {len(drafts)} records of one atomic append are there")
    if not found and tail.records and drafts[0].cause is None:
        raise RunExists(f"run {tail.run!r} exists already; nothing was written. Resume it, or choose another name.")
    return found or None


def left_at(parent: Sequence[Record], branch: RunBranched) -> Record:
    """The record of `parent` (its history) that the branch goes on behind. Raises NoSuchPosition."""
    found = next((record for record in parent if record.position == branch.at), None)
    if found is None:
        raise NoSuchPosition(
            f"run {branch.parent!r} has {len(parent)} records that its stream can tell, and no position {branch.at}; "
            f"nothing was written. Where sia log {branch.parent} shows it: sia verify {branch.parent} --repair"
        )
    return found


def following(tail: Tail, drafts: Sequence[Draft], fork: Record | None, time: datetime) -> list[Record]:
    """`drafts` placed behind the tail, or, where they open a branch, behind `fork`, a record of its parent."""
    behind = tail.records[-1] if tail.records else fork
    position, chain = (behind.position, behind.chain) if behind else (0, GENESIS)
    records: list[Record] = []
    for draft in drafts:
        position += 1
        record = place(draft, tail.run, position, chain, time)
        records.append(record)
        chain = record.chain
    return records
