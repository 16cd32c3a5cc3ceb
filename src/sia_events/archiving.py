"""`sia archive` and `sia restore`: a run as one file, and back on another home with the same ids and the same chain."""

import asyncio
import hashlib
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from operator import eq
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from sia_events import app
from sia_events.catching_up import settled
from sia_events.errors import Unusable
from sia_events.event_log.references import members, mentioned, named
from sia_events.infra import archive
from sia_events.infra.archive import ArchiveUnusable
from sia_events.infra.clickhouse import ClickHouseLog, LogFull, LogUnavailable, QueryRefused, StoreTooNew, StoreUnsafe
from sia_events.infra.store_lock import StoreHeld
from sia_events.log_here import open_log, require_ours
from sia_events.shared.events import RunBranched
from sia_events.shared.failpoints import reach
from sia_events.shared.ports import Envelope
from sia_events.shared.record import GENESIS, NewerRecord, Record, UnreadableRecord, broken_link, parse_record, to_wire
from sia_events.shared.settings import Settings

T = TypeVar("T")

NOT_READ = (LogUnavailable, LogFull, QueryRefused, StoreTooNew, StoreUnsafe, StoreHeld)
ENVELOPES = 500  # in one member, so that neither side holds a run's traces as a whole
MEMBER = re.compile(
    r"(?P<kind>records)/(?P<run>[A-Za-z0-9][\w-]{0,63})\.jsonl"
    r"|(?P<traces>traces)/(?P<of>[A-Za-z0-9][\w-]{0,63})/\d+\.jsonl"
    r"|(?P<blobs>blobs|private)/(?P<digest>[0-9a-f]{64})",
    re.ASCII,
)


class _Traced(msgspec.Struct, omit_defaults=True):
    """A line of a traces member: one envelope. Its kind is a word of a subject.

    `raw` stands in the place of `lines` where one of them is no UTF-8, as text cannot hold that; in Base64.
    """

    kind: Annotated[str, msgspec.Meta(pattern=r"^[^\s.*>]+\Z")]
    key: Annotated[str, msgspec.Meta(min_length=1)]
    lines: list[str] | None = None
    raw: list[bytes] | None = None

    def __post_init__(self) -> None:
        if (self.lines is None) == (self.raw is None):
            raise ValueError("an envelope has lines or raw")


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Traced).decode


@dataclass
class Contents:
    """What an archive holds, checked: records by run, parents first; how many envelopes of each, and the blobs."""

    records: dict[str, list[Record]] = field(default_factory=dict)
    envelopes: dict[str, int] = field(default_factory=dict)
    blobs: int = 0


async def archive_run(settings: Settings, run: str, into: Path | None, answers: bool) -> dict[str, Any]:
    """Write the run and the parents of its lineage, as they are now, to one file.

    {file, bytes, runs, records, blobs, missing, left_out}: `missing` are blobs that records name and nobody has,
    `left_out` says in words what stood among the traces and is not in the file. Without `answers` the private blobs
    stay here. Raises Unusable.
    """
    running = await settled(settings)
    async with app.stores_of_home(settings, "archive", running is not None) as node, AsyncExitStack() as opened:
        log = await _opened(settings, opened)
        known = await node.streams.runs()
        found = [run] if run in known else [name for name in known if name.startswith(run)]
        if len(found) != 1:
            raise Unusable(f"{'no run' if not found else 'several runs begin with'} {run!r}; sia runs lists them")
        file = into or Path(f"{found[0]}.sia.tar.zst")
        if file.exists():
            raise Unusable(f"{file} is there already; nothing was written. Name another file.")
        runs = await _lineage(node, found[0])
        told: dict[str, Any] = {"blobs": 0, "missing": [], "left_out": []}
        head = {
            "run": found[0],
            "runs": list(runs),
            "schema": max(record.schema for records in runs.values() for record in records),
            "answers": answers,
        }
        try:
            await archive.write(file, head, _members(node, log, runs, answers, told))
        except OSError as error:
            raise Unusable(f"{file} cannot be written: {error.strerror}; there is none now") from error
    count = sum(len(records) for records in runs.values())
    size = await asyncio.to_thread(os.path.getsize, file)
    return {"file": str(file), "bytes": size, "runs": list(runs), "records": count, **told}


async def restore(settings: Settings, file: Path) -> dict[str, Any]:
    """Put what an archive holds where it belongs; what is there already is left alone. {runs, records, blobs}.

    Everything is read and checked before the first byte is written. Raises ArchiveUnusable, Unusable, NewerRecord.
    """
    contents = _checked(file)
    running = await settled(settings)
    async with app.stores_of_home(settings, "restore", running is not None) as node:
        await require_ours(settings, node.streams)
        for run, records in contents.records.items():
            await _check_free(node, run, records)
        before = {run: [_mark(e) async for _, e in node.streams.envelopes(run)] for run in contents.records}
        ages = {run: await node.streams.first(node.streams.holding("SIA_TRACE", run)) > 1 for run in before}
        lacking = _lacking(file, before, ages)
        # Blobs first and records last: whoever finds a record finds what it names, and a run is there when it is whole.
        seen = dict.fromkeys(contents.records, 0)
        reach("sia restore before writing")
        for name, pieces in archive.read(file):
            match = _match(file, name)
            if match["blobs"]:
                await (node.private if match["blobs"] == "private" else node.blobs).put(b"".join(pieces))
                reach("sia restore after storing a blob")
            elif match["traces"]:
                for envelope in _envelopes(match["of"], pieces):
                    if seen[envelope.run] in lacking[envelope.run]:
                        await node.bus.trace(envelope)
                        reach("sia restore after sending an envelope")
                    seen[envelope.run] += 1
        put = 0
        for run, records in contents.records.items():
            put += await node.streams.restore(run, records)
            reach("sia restore after putting back a run")
    return {"runs": list(contents.records), "records": put, "blobs": contents.blobs}


async def _lineage(node: app.Node, run: str) -> dict[str, list[Record]]:
    """The run's own records and those of its parents, each run whole, parents first. Raises Unusable."""
    history = await node.bus.history(run)
    own = [record for record in history if record.run == run]
    if not own or broken_link(history) or len(history) < history[-1].position:
        raise Unusable(f"the records of run {run} are not whole; nothing was written. sia verify {run} --repair")
    first = own[0].event
    before = await _lineage(node, first.parent) if isinstance(first, RunBranched) and own[0].position > 1 else {}
    return {**before, run: own}


async def _opened(settings: Settings, stack: AsyncExitStack) -> ClickHouseLog | Exception:
    """The log, or why there is none: an archive is made without."""
    try:
        return await stack.enter_async_context(open_log(settings))
    except NOT_READ as error:
        return error


async def _asked(
    log: ClickHouseLog | Exception,
    run: str,
    left_out: list[str],
    ask: Callable[[ClickHouseLog], Awaitable[Sequence[T]]],
) -> Sequence[T] | None:
    """What the log answers; None where it cannot, which is told once of a run."""
    try:
        if isinstance(log, Exception):
            raise log
        return await ask(log)
    except NOT_READ as error:
        told = f"run {run}: what only the log has of its traces, as that cannot be read: {error}"
        left_out += [told] if told not in left_out else []
        return None


async def _members(
    node: app.Node,
    log: ClickHouseLog | Exception,
    runs: Mapping[str, Sequence[Record]],
    answers: bool,
    told: dict[str, Any],
) -> AsyncIterator[tuple[str, bytes]]:
    public, private, trees = set[str](), set[str](), set[tuple[str, bool]]()
    for run, records in runs.items():
        yield f"records/{run}.jsonl", b"".join(to_wire(record) + b"\n" for record in records)
        for record in records:
            for reference in named(record):
                (private if reference.private else public).add(reference.digest)
                if reference.tree:
                    trees.add((reference.digest, reference.private))
    wanted = set(public)
    for run in runs:
        envelopes: list[bytes] = []
        number = 0
        async for envelope in _traces(node, log, run, told["left_out"]):
            envelopes.append(_encode(_traced(envelope)) + b"\n")
            wanted |= mentioned(b"\n".join((envelope.key.encode(), *envelope.lines)))
            if len(envelopes) == ENVELOPES:
                yield f"traces/{run}/{number:06}.jsonl", b"".join(envelopes)
                envelopes, number = [], number + 1
        if envelopes:
            yield f"traces/{run}/{number:06}.jsonl", b"".join(envelopes)
    if not answers:
        private.clear()
    for folder, store, listed, first in (
        ("blobs", node.blobs, public, wanted),
        ("private", node.private, private, private),
    ):
        there = {kept.digest async for kept in store.listed()}
        told["missing"] += sorted(listed - there)
        queue, done = sorted(first & there), set[str]()
        while queue:
            if (digest := queue.pop()) in done:
                continue
            done.add(digest)
            body = await store.get(digest)
            if (digest, store is node.private) in trees:
                told["missing"] += sorted({*members(body)} - there)
            queue += [each for each in sorted({*members(body), *mentioned(body)}) if each in there and each not in done]
            told["blobs"] += 1
            yield f"{folder}/{digest}", body


async def _traces(
    node: app.Node, log: ClickHouseLog | Exception, run: str, left_out: list[str]
) -> AsyncIterator[Envelope]:
    """The run's envelopes: first those that the stream has let go by their age and the tables still have.

    What the stream has lost comes from the tables and last, as a repair puts it back.
    """
    stream = node.streams.holding("SIA_TRACE", run)
    first = await node.streams.first(stream)
    rows = await _asked(log, run, left_out, lambda log: log.lines(run))
    tabled = {sequence for sequence, _, _ in rows or ()}
    old = {sequence for sequence in tabled if sequence < first}
    async for envelope in _tabled(log, run, old, left_out):
        yield envelope
    lost, put_back = tabled - old, set[int]()
    unread = await node.streams.counted("SIA_TRACE", run)
    async for message in node.streams.traced(run):
        unread -= 1
        lost.discard(message.sequence)
        if message.in_place_of is not None:
            put_back.add(message.in_place_of)
        if message.envelope is None:
            left_out.append(f"run {run}, trace sequence {message.sequence}: {message.why}")
        elif message.in_place_of not in old:
            yield message.envelope
    before, first = first, await node.streams.first(stream)
    if {sequence for sequence in lost if sequence >= first} & put_back:
        raise Unusable(f"a repair of run {run} was cut short; nothing was written. First: sia verify {run} --repair")
    async for envelope in _tabled(log, run, lost - put_back, left_out):
        yield envelope
    if (gone := unread - len(lost) - len(put_back)) > 0 and first == before:
        where = "on the stream and in the tables" if rows is not None else "on the stream"
        left_out.append(f"run {run}: {gone} of its trace envelopes are lost, {where}")


async def _tabled(
    log: ClickHouseLog | Exception, run: str, sequences: Collection[int], left_out: list[str]
) -> AsyncIterator[Envelope]:
    """Those envelopes of the run as the tables have them, in order."""
    ordered = sorted(sequences)
    for at in range(0, len(ordered), ENVELOPES):
        some = ordered[at : at + ENVELOPES]
        for _, envelope in await _asked(log, run, left_out, lambda log, some=some: log.envelopes(run, some)) or ():
            yield envelope


def _checked(file: Path) -> Contents:
    """What the archive holds, every byte of it read. Raises ArchiveUnusable, NewerRecord."""
    head = archive.read_head(file)
    contents = Contents()
    for name, pieces in archive.read(file):
        match = _match(file, name)
        try:
            if match["kind"]:
                contents.records[match["run"]] = [parse_record(line) for line in archive.lines(pieces)]
            elif match["traces"]:
                count = sum(1 for _ in _envelopes(match["of"], pieces))
                contents.envelopes[match["of"]] = contents.envelopes.get(match["of"], 0) + count
        except NewerRecord:
            raise
        except (UnreadableRecord, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ArchiveUnusable(f"{file} was altered: {name}: {error}; nothing was written") from error
        if match["blobs"]:
            contents.blobs += 1
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
            if digest.hexdigest() != match["digest"]:
                raise ArchiveUnusable(f"{file} was altered: {name} is another blob; nothing was written")
    _check_chains(file, contents.records)
    if list(contents.records) != head.get("runs") or not contents.envelopes.keys() <= contents.records.keys():
        raise ArchiveUnusable(f"{file} was altered: it does not hold the runs it names; nothing was written")
    return contents


def _check_chains(file: Path, runs: Mapping[str, Sequence[Record]]) -> None:
    """Whether every run follows from its first record, or from where it branched. Raises ArchiveUnusable."""
    whole: dict[str, list[Record]] = {}
    for run, records in runs.items():
        first = records[0].event if records else None
        before: list[Record] = []
        known = bool(records)
        if isinstance(first, RunBranched):
            before = whole.get(first.parent, [])[: max(0, first.at)]
            known = len(before) == first.at > 0
        start, chain = (len(before) + 1, before[-1].chain) if before else (1, GENESIS)
        numbered = [record.position for record in records] == list(range(start, start + len(records)))
        if not known or not numbered or any(r.run != run for r in records) or broken_link(records, chain):
            raise ArchiveUnusable(f"{file} was altered: the hash chain of run {run} is broken; nothing was written")
        whole[run] = [*before, *records]


async def _check_free(node: app.Node, run: str, records: Sequence[Record]) -> None:
    """Whether what is there of the run is of this run. Raises Unusable."""
    there = [record.wire for record in await node.bus.history(run) if record.run == run]
    if any(one != other.wire for one, other in zip(there, records, strict=False)):
        raise Unusable(f"there is another run {run} here; nothing was written. Restore under another SIA_HOME.")


def _lacking(file: Path, before: Mapping[str, Sequence[str]], ages: Mapping[str, bool]) -> dict[str, frozenset[int]]:
    """Which of a run's traces in the archive, by their place there, are not here. Raises Unusable."""
    archived: dict[str, list[str]] = {run: [] for run in before}
    for name, pieces in archive.read(file):
        if (match := _match(file, name))["traces"]:
            archived[match["of"]] += map(_mark, _envelopes(match["of"], pieces))
    return {run: _not_there(run, there, archived[run], ages[run]) for run, there in before.items()}


def _not_there(run: str, there: Sequence[str], archived: Sequence[str], ages: bool) -> frozenset[int]:
    """What comes behind those that are there. Where the oldest have gone by their age, those stay gone.

    Of what was lost in between, or put back behind others, only the marks tell: each that is not there is lacking.
    """
    places = (at for at, mark in enumerate(archived) if mark == there[0]) if there and archived else (0,)
    for at in places:
        if (at == 0 or ages) and all(map(eq, there, archived[at:])):
            return frozenset(range(at + len(there), len(archived)))
    if ages:
        raise Unusable(f"run {run} has other traces here; nothing was written")
    left, lacking = Counter(there), list[int]()
    for at, mark in enumerate(archived):
        if left[mark]:
            left[mark] -= 1
        else:
            lacking.append(at)
    return frozenset(lacking)


def _traced(envelope: Envelope) -> _Traced:
    try:
        return _Traced(envelope.kind, envelope.key, lines=[line.decode() for line in envelope.lines])
    except UnicodeDecodeError:
        return _Traced(envelope.kind, envelope.key, raw=list(envelope.lines))


def _envelopes(run: str, pieces: Iterable[bytes]) -> Iterator[Envelope]:
    for line in archive.lines(pieces):
        each = _decode(line)
        lines = each.raw or [text.encode() for text in each.lines or ()]
        # What stands on a stream under another kind than ours is nobody's, and is carried all the same.
        yield Envelope(run, each.kind, each.key, tuple(lines))  # pyright: ignore[reportArgumentType]


def _mark(envelope: Envelope) -> str:
    return hashlib.sha256(repr((envelope.kind, envelope.key, envelope.lines)).encode()).hexdigest()


def _match(file: Path, name: str) -> "re.Match[str]":
    if match := MEMBER.fullmatch(name):
        return match
    raise ArchiveUnusable(f"{file} has a member {name!r} that no archive has; nothing was written")
