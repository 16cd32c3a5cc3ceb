"""The history checker: what clients were told, held against what can be read afterwards. Pure; knows of no store.

A client was told of a record when its append returned, of a trace line when its envelope was taken, and of a reply when
the gateway gave it away. What a client was not told of may be there or not, but in one piece, once, and in its place; a
line as often at most as somebody began to send it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from sia_events.shared.events import RunBranched
from sia_events.shared.record import GENESIS, link, parse_record


@dataclass(frozen=True)
class Line:
    """One line of a trace; `body` is its SHA-256. Lines of one run, kind and key stand in an order."""

    run: str
    kind: str
    key: str
    body: str

    def __str__(self) -> str:
        return f"{self.kind} {self.key} of run {self.run}"


@dataclass(frozen=True)
class Reply:
    """A reply: (run, attempt, request, how-manieth) names its call, `payment` is its place among all that were paid."""

    call: tuple[str, str, str, int]
    payment: int

    def __str__(self) -> str:
        run, attempt, request, n = self.call
        return f"call {n} {request[:8]} of {attempt} of run {run}"


@dataclass(frozen=True)
class Told:
    """What clients were told, in that order. A record is its run, its position and the SHA-256 of its bytes.

    `sent` are the lines that a client handed over, whether or not it was told that they were taken.
    """

    records: Sequence[tuple[str, int, str]] = ()
    lines: Sequence[Line] = ()
    replies: Sequence[Reply] = ()
    sent: Sequence[Line] = ()


@dataclass(frozen=True)
class Held:
    """What can be read, in each place's own order: records as bytes by run, trace lines, replies in the journal.

    `paid` are the requests that the provider has answered, in that order, each in a form that tells equal ones.
    """

    stream: Mapping[str, Sequence[bytes]]
    tables: Mapping[str, Sequence[bytes]]
    lines: Sequence[Line] = ()
    tabled_lines: Sequence[Line] = ()
    journal: Sequence[Reply] = ()
    paid: Sequence[str] = ()


@dataclass(frozen=True)
class Fault:
    kind: Literal["lost", "doubled", "altered", "reordered", "chain broken", "paid again"]
    where: Literal["stream", "tables", "journal", "provider"]
    what: str


def check(told: Told, held: Held) -> list[Fault]:
    """Everything in which `held` is not what was told, or not in itself whole; empty where all is well."""
    return [
        *_of_runs(held),
        *_of_told_records(told, held),
        *_of_lines(told, held),
        *_of_replies(told, held),
        *_of_payments(told, held),
    ]


def _of_runs(held: Held) -> Iterator[Fault]:
    for run, wires in held.stream.items():
        yield from _of_run(run, wires, held)
        yield from _copied(run, wires, held.tables.get(run, ()))
    for run in held.tables.keys() - held.stream.keys():
        yield Fault("lost", "stream", f"run {run}, which the tables have")


def _of_run(run: str, wires: Sequence[bytes], held: Held) -> Iterator[Fault]:
    """Whether the run's records follow from each other: no gap, none twice, in order, and one chain."""
    records = [parse_record(wire) for wire in wires]
    before, chain = 0, GENESIS
    if records and isinstance(fork := records[0].event, RunBranched):
        before, chain = fork.at, _chain_at(fork.parent, fork.at, held)
    ids = Counter(record.id for record in records)
    yield from (Fault("doubled", "stream", f"record {one} of run {run}") for one, n in ids.items() if n > 1)
    for record in records:
        here = f"record {record.position} of run {run}"
        if record.position <= before:
            yield Fault("reordered", "stream", f"{here}, behind {before}")
            continue
        if record.position > before + 1:
            yield Fault("lost", "stream", f"records {before + 1} to {record.position - 1} of run {run}")
        elif link(chain, record.wire) != record.chain:
            yield Fault("chain broken", "stream", here)
        before, chain = record.position, record.chain


def _chain_at(run: str, position: int, held: Held) -> str:
    """The chain of a run at a position, which may be its parent's; "" where no such record can be read."""
    records = [parse_record(wire) for wire in held.stream.get(run, ())]
    if records and position < records[0].position and isinstance(fork := records[0].event, RunBranched):
        return _chain_at(fork.parent, position, held)
    return next((record.chain for record in records if record.position == position), "")


def _copied(run: str, wires: Sequence[bytes], rows: Sequence[bytes]) -> Iterator[Fault]:
    """Whether the tables have of a run what the stream has."""
    there, copied = Counter(wires), Counter(rows)
    yield from (Fault("lost", "tables", _named(wire)) for wire in there - copied)
    for wire in copied:
        if wire not in there:
            yield Fault("altered", "tables", _named(wire))
        elif copied[wire] > 1:
            yield Fault("doubled", "tables", _named(wire))
    if there == copied and list(wires) != list(rows):
        yield Fault("reordered", "tables", f"run {run}")


def _named(wire: bytes) -> str:
    record = parse_record(wire)
    return f"record {record.position} of run {record.run}"


def _of_told_records(told: Told, held: Held) -> Iterator[Fault]:
    there = {
        (run, parse_record(wire).position): sha256(wire).hexdigest()
        for run, wires in held.stream.items()
        for wire in wires
    }
    for run, position, digest in told.records:
        found = there.get((run, position))
        if found != digest:
            kind = "altered" if found else "lost"
            yield Fault(kind, "stream", f"record {position} of run {run}, whose append was acknowledged")


def _of_lines(told: Told, held: Held) -> Iterator[Fault]:
    streamed, tabled = Counter(held.lines), Counter(held.tabled_lines)
    yield from (Fault("lost", "stream", f"a line of {one}, acknowledged") for one in Counter(told.lines) - streamed)
    yield from (Fault("doubled", "stream", f"a line of {one}") for one in streamed - Counter(told.sent))
    yield from (Fault("lost", "tables", f"a line of {one}") for one in streamed - tabled)
    yield from (Fault("doubled", "tables", f"a line of {one}") for one in tabled - streamed)
    if streamed == tabled:
        here, there = _in_order(held.lines), _in_order(held.tabled_lines)
        yield from (Fault("reordered", "tables", " ".join(key)) for key in here if here[key] != there[key])


def _in_order(lines: Sequence[Line]) -> Mapping[tuple[str, str, str], list[str]]:
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for line in lines:
        found[line.run, line.kind, line.key].append(line.body)
    return found


def _of_replies(told: Told, held: Held) -> Iterator[Fault]:
    recorded = {reply.call: reply.payment for reply in held.journal}
    times = Counter(reply.call for reply in held.journal)
    yield from (Fault("doubled", "journal", str(Reply(call, 0))) for call, n in times.items() if n > 1)
    for reply in dict.fromkeys(told.replies):
        if reply.call not in recorded:
            yield Fault("lost", "journal", f"{reply}, whose reply was given")
        elif recorded[reply.call] != reply.payment:
            yield Fault("altered", "journal", f"{reply}, whose reply was given")


def _of_payments(told: Told, held: Held) -> Iterator[Fault]:
    """No request is paid for again once its reply was recorded or given away."""
    latest = {request: payment for payment, request in enumerate(held.paid, 1)}
    for reply in dict.fromkeys([*held.journal, *told.replies]):
        if reply.payment < latest[held.paid[reply.payment - 1]]:
            yield Fault("paid again", "provider", str(reply))
