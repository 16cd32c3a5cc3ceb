"""Two copies of a run held against its hash chain: what is missing, doubled, altered or unreadable, and where."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import msgspec

from sia_events.shared.events import ServiceFailed
from sia_events.shared.record import GENESIS, Record, UnreadableRecord, follows, parse_record

ONCE = "readers take it once"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was written. `harmless`, when not empty, says why no reader is misled by it."""

    kind: Literal["missing", "doubled", "altered", "unreadable"]
    store: Literal["stream", "tables", "blobs"]
    run: str | None
    place: str
    detail: str = ""
    harmless: str = ""


@dataclass(frozen=True)
class Start:
    """Where a run's own records begin: behind this position, whose chain is this."""

    position: int = 0
    chain: str = GENESIS


@dataclass(frozen=True)
class Reconciled:
    """`records` are the run's own, up to the first of which there is no good copy; `whole` where there is none such.

    `wrong` are positions of which the tables have nothing, or not yet, or something else than the chain says. `cut_off`
    says that those without a good copy are the last, so that no later one tells of them. `apart` is the position from
    which stream and tables have two histories, each whole: neither is the other's copy.
    """

    findings: tuple[Finding, ...]
    records: tuple[Record, ...]
    whole: bool
    wrong: frozenset[int]
    cut_off: bool = False
    apart: int | None = None

    @property
    def sound(self) -> bool:
        """Whether the stream and the tables have every record, once and as it was written."""
        return self.whole and not self.findings and not self.wrong


class _Placed(msgspec.Struct):
    run: str
    position: int
    chain: str


@dataclass(frozen=True)
class _Copy:
    """`chain` is what the copy says of itself, None where it says nothing; `sequence` is 0 in the tables."""

    wire: bytes
    chain: str | None
    sequence: int = 0


_placed = msgspec.json.Decoder(_Placed).decode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def reconcile(
    run: str,
    stream: Iterable[tuple[int, bytes]],
    rows: Iterable[tuple[int, bytes]],
    copied: int,
    start: Start | None,
    unread: tuple[int, int] = (0, 0),
    made_good: tuple[int, int] = (0, 0),
) -> Reconciled:
    """Walk the run's chain position by position; at each one the copy that follows from the one before is the record.

    `stream` are (sequence, bytes) in the stream's order, `rows` (position, bytes). Up to the sequence `copied` the
    tables have to have what the stream has; what came later may still be on its way. `start` is None where the run
    branched from what is not known: then its first record is taken as it stands. `unread` are how many messages of the
    run the stream's server counts and cannot read, and how many of them may stand behind the last that it can.
    `made_good` is the sequence of the last record that was put back, and how many of the unread it tells to be so.
    """
    streamed, strangers = _streamed(run, stream)
    tabled = _tabled(run, rows)
    good, gaps = _chain(streamed, tabled, start)
    apart = _apart(good, streamed, tabled, start)

    found = [Finding("missing", "stream", run, _places(gap), "in the tables too") for gap in gaps]
    end = _lost_end(streamed, good, start, unread, made_good)
    if end:
        found.append(Finding("missing", "stream", run, _places(end), "it was lost before it was copied"))
    for position in sorted({*good, *streamed, *tabled}):
        copy, here, there = good.get(position), streamed.get(position, ()), tabled.get(position, ())
        strangers |= {other.sequence: _other(run, other) for other in here if not _same(other, copy)}
        if copy:
            found += _on_the_stream(run, position, sum(_same(other, copy) for other in here))
        found += _in_the_tables(run, position, copy, there, copied)
    found += _disorder(run, streamed, good)
    wrong = {int(f.place.split()[1]) for f in found if f.store == "tables" and not f.harmless}
    wrong |= {position for position, copy in good.items() if copy.sequence > copied and position not in tabled}

    records: list[Record] = []
    last = gaps[0].start if gaps else max(good, default=0) + 1
    for position in (position for position in good if position < last):
        try:
            records.append(parse_record(good[position].wire))
        except UnreadableRecord as error:
            found.append(Finding("unreadable", "stream", run, f"position {position}", str(error)))
            break
    failed = [(r.event, r.position) for r in records if isinstance(r.event, ServiceFailed)]
    letters = {event.sequence: position for event, position in failed if event.failed is None}
    for sequence, finding in sorted(strangers.items()):
        kept = f"no part of the run, as its record {letters[sequence]} tells" if sequence in letters else ""
        found.append(replace(finding, harmless=kept))
    whole = len(records) == len(good) and tabled.keys() <= good.keys() and not end and apart is None
    return Reconciled(tuple(found), tuple(records), whole, frozenset(wrong), bool(end), apart)


def _apart(
    good: Mapping[int, _Copy],
    streamed: Mapping[int, Sequence[_Copy]],
    tabled: Mapping[int, Sequence[_Copy]],
    start: Start | None,
) -> int | None:
    """Where the tables have another record than the stream that follows as well: damage leaves none that does."""
    previous = start.chain if start else None
    for position, copy in good.items():
        on_stream = {other.wire for other in streamed.get(position, ())}
        others = (other for other in tabled.get(position, ()) if other.wire not in on_stream)
        if copy.sequence and previous and any(_follows(previous, other) for other in others):
            return position
        previous = copy.chain
    return None


def _streamed(run: str, stream: Iterable[tuple[int, bytes]]) -> tuple[dict[int, list[_Copy]], dict[int, Finding]]:
    """The stream's copies by position, and what is no record of the run by sequence."""
    copies: dict[int, list[_Copy]] = defaultdict(list)
    strangers: dict[int, Finding] = {}
    for sequence, wire in stream:
        try:
            one = _placed(wire)
        except _UNREADABLE as error:
            strangers[sequence] = Finding("unreadable", "stream", run, f"sequence {sequence}", f"no record: {error}")
            continue
        copy = _Copy(wire, one.chain, sequence)
        if one.run == run:
            copies[one.position].append(copy)
        else:
            strangers[sequence] = _other(run, copy)
    return copies, strangers


def _tabled(run: str, rows: Iterable[tuple[int, bytes]]) -> dict[int, list[_Copy]]:
    copies: dict[int, list[_Copy]] = defaultdict(list)
    for position, wire in rows:
        try:
            one = _placed(wire)
            copies[position].append(_Copy(wire, one.chain if (one.run, one.position) == (run, position) else None))
        except _UNREADABLE:
            copies[position].append(_Copy(wire, None))
    return copies


def _chain(
    streamed: Mapping[int, Sequence[_Copy]], tabled: Mapping[int, Sequence[_Copy]], start: Start | None
) -> tuple[dict[int, _Copy], list[range]]:
    """The copy of each position that follows from the one before it, and the positions between of which there is none.

    Behind such a gap a copy is taken as it stands, where the tables have it or the next record follows from it: anybody
    who can write to the stream can write a number.
    """
    good: dict[int, _Copy] = {}
    gaps: list[range] = []
    present = sorted({*streamed, *tabled})
    last = start.position if start else present[0] - 1 if present else 0
    previous = start.chain if start else None
    for position in (position for position in present if position > last):
        copies = [*streamed.get(position, ()), *tabled.get(position, ())]
        if position == last + 1:
            found = next((c for c in copies if (previous is None and c.chain) or _follows(previous or "", c)), None)
        else:
            after = [*streamed.get(position + 1, ()), *tabled.get(position + 1, ())]
            borne_out = (c for c in copies if c.chain and any(_follows(c.chain, next_) for next_ in after))
            found = next((c for c in tabled.get(position, ()) if c.chain), None) or next(borne_out, None)
        if found:
            if position > last + 1:
                gaps.append(range(last + 1, position))
            good[position], previous, last = found, found.chain, position
    return good, gaps


def _follows(previous: str, copy: _Copy) -> bool:
    return copy.chain is not None and follows(previous, copy.wire, copy.chain)


def _same(one: _Copy, other: _Copy | None) -> bool:
    return other is not None and one.wire == other.wire


def _on_the_stream(run: str, position: int, same: int) -> Iterator[Finding]:
    if same == 0:
        yield Finding("missing", "stream", run, f"position {position}")
    if same > 1:
        yield Finding("doubled", "stream", run, f"position {position}", f"{same} times", ONCE)


def _in_the_tables(
    run: str, position: int, good: _Copy | None, there: Sequence[_Copy], copied: int
) -> Iterator[Finding]:
    place = f"position {position}"
    if any(not _same(copy, good) for copy in there):
        yield Finding("altered", "tables", run, place, "it is not the record that follows from the one before it")
    elif good and not there and good.sequence <= copied:
        yield Finding("missing", "tables", run, place)
    elif len(there) > 1:
        yield Finding("doubled", "tables", run, place, f"{len(there)} times", ONCE)


def _places(gap: range) -> str:
    return f"position {gap.start}" if len(gap) == 1 else f"positions {gap.start} to {gap.stop - 1}"


def _lost_end(
    streamed: Mapping[int, Sequence[_Copy]],
    good: Mapping[int, _Copy],
    start: Start | None,
    unread: tuple[int, int],
    made_good: tuple[int, int],
) -> range:
    """The positions behind the last record known whose messages are lost, as far as the server's count tells.

    What is missing between two records in the stream's order is lost too, and told already; it stays counted once the
    record has been put back, as does all that was lost before the last time that some were.
    """
    count, behind = unread
    since, explained = made_good
    own = sorted(
        (c.sequence, position) for position, copies in streamed.items() for c in copies if _same(c, good.get(position))
    )
    before = start.position if start else min(good, default=1) - 1
    order = [before, *(position for _, position in own)]
    later = order[sum(sequence <= since for sequence, _ in own) :]
    between = sum(max(0, there - here - 1) for here, there in pairwise(later))
    last = max([before, *good])
    in_tables = sum(position > max(order) for position in good)
    return range(last + 1, last + 1 + max(0, min(count - explained - between, behind) - in_tables))


def _disorder(run: str, streamed: Mapping[int, Sequence[_Copy]], good: Mapping[int, _Copy | None]) -> Iterator[Finding]:
    """A record that stands on the stream before one that it follows from: who reads in order does not reach it."""
    after = 0
    for position, copy in good.items():
        sequences = [c.sequence for c in streamed.get(position, ()) if _same(c, copy)]
        if not sequences:
            return
        behind = [sequence for sequence in sequences if sequence > after]
        if not behind:
            yield Finding("altered", "stream", run, f"position {position}", "it stands before the one it follows from")
            return
        after = min(behind)


def _other(run: str, copy: _Copy) -> Finding:
    return Finding("altered", "stream", run, f"sequence {copy.sequence}", "a record that is no part of the run")
