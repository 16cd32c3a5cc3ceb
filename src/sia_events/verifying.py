"""`sia verify`: what was recorded, held against what can be read of it in every place; and mended from the others."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sia_events import app, log_here
from sia_events.catching_up import only_in_tables, settled
from sia_events.errors import Unusable
from sia_events.event_log import recorder
from sia_events.event_log.reconciling import Finding, Reconciled, Start, reconcile
from sia_events.event_log.reconciling_traces import Traces, reconcile_lines
from sia_events.event_log.references import Reference, members, named
from sia_events.home import describe, running_node
from sia_events.infra.blobs import open_blobs
from sia_events.infra.clickhouse import ClickHouseLog, LogUnavailable, QueryRefused
from sia_events.infra.store_lock import StoreHeld
from sia_events.log_here import open_log
from sia_events.reading import PATIENCE_S
from sia_events.shared.events import RunBranched
from sia_events.shared.failpoints import reach
from sia_events.shared.ports import BlobCorrupt, BlobMissing, Blobs, BusUnreachable, Envelope, RunExists
from sia_events.shared.record import NewerRecord, Record, UnreadableRecord, parse_record
from sia_events.shared.settings import Settings

Copied = dict[str, int]
Row = TypeVar("Row")
CHAIN = 32  # bytes
ENVELOPES = 500  # that are held at once


@dataclass(frozen=True)
class Chains:
    """A run's own records, as far as a branch has to know them: the chain of each, from position `first` on."""

    first: int
    of_each: bytes
    fork: RunBranched | None

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Chains":
        opens = records[0].event if records else None
        first = records[0].position if records else 1
        chains = b"".join(bytes.fromhex(record.chain) for record in records)
        return cls(first, chains, opens if isinstance(opens, RunBranched) else None)

    def at(self, position: int) -> str | None:
        start = CHAIN * (position - self.first)
        return self.of_each[start : start + CHAIN].hex() or None


@dataclass
class Looked:
    """What one look found, and what mending it needs; `private` where the evaluator's blobs are kept here.

    Of a sound run only the `chains` are kept: the stream has its records. `records` counts those of all runs.
    `lines` has a run's trace sequences whose rows are wrong or not there yet, and those that only the tables have;
    `lost` the last sequence of a stream, and those up to it of which nothing can be read; `blobs` who named each, by
    digest and whether it is private, and `references` what was followed. `under_way` are runs that are looked at,
    `unread` those whose rows the engine does not give.
    """

    all: bool
    runs: dict[str, Reconciled] = field(default_factory=dict)
    chains: dict[str, Chains] = field(default_factory=dict)
    records: int = 0
    lines: dict[str, tuple[frozenset[int], frozenset[int]]] = field(default_factory=dict)
    lost: dict[str, tuple[int, Sequence[int]]] = field(default_factory=dict)
    torn: bool = False
    unread: set[str] = field(default_factory=set)
    private: bool = True
    findings: list[Finding] = field(default_factory=list)
    of_blobs: list[Finding] = field(default_factory=list)
    blobs: dict[tuple[str, bool], str | None] = field(default_factory=dict)
    references: set[Reference] = field(default_factory=set)
    counted: int = 0
    under_way: set[str] = field(default_factory=set)

    @property
    def open(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.harmless]

    @property
    def in_tables_alone(self) -> set[str]:
        """Runs of which the tables have something that the streams have not; of unread ones, may have."""
        missing = [f for f in self.open if f.run and f.store == "stream" and f.kind == "missing"]
        # What the tables lack too has that for a detail.
        alone = {f.run for f in missing if f.run and (not f.detail or f.run in self.unread)}
        return alone | {name for name, run in self.runs.items() if run.apart}


async def verify(settings: Settings, run: str | None, repair: bool, source: str | None) -> dict[str, Any]:
    """Hold the stream, the tables and the blobs of `run`, or of everything, against each other.

    {runs, records, lines, blobs, findings, mended, left}: a finding is {kind, store, run, place, detail, harmless};
    `mended` are those that a repair has taken away, `left` those that somebody has to look at. Raises Unusable, and
    BlobsUnavailable for a `source` that is none, before anything is written.
    """
    elsewhere = _source(source)
    patience = time.monotonic() + PATIENCE_S
    while True:
        running = await settled(settings)
        if repair and running:
            raise Unusable(f"{describe(running, settings.home)}; nothing is mended under it. Stop it first: sia down")
        try:
            looking = _verified(settings, run, repair, elsewhere, running is not None)
            if running is None or settings.nats_url:
                return await looking
            if told := await _while_running(settings, running, looking):
                return told
            patience = time.monotonic() + PATIENCE_S
        except (BusUnreachable, LogUnavailable, StoreHeld):
            # Whoever had the stores may just be gone, and the last of them not closed yet.
            if settings.nats_url or time.monotonic() > patience:
                raise
        await asyncio.sleep(app.POLL_S)


def _source(place: str | None) -> Blobs | None:
    """Other blobs to mend from. A folder is not made for it."""
    if place and "://" not in place and not Path(place).is_dir():
        raise Unusable(f"--from {place}: no such folder; nothing was written")
    return open_blobs(place) if place else None


async def _while_running(
    settings: Settings, running: Mapping[str, object], look: Coroutine[None, None, dict[str, Any]]
) -> dict[str, Any] | None:
    """What `look` finds in the stores of that process; None where it ends before, and takes them along."""

    async def ended() -> None:
        while (now := running_node(settings)) and now.get("pid") == running.get("pid"):  # noqa: ASYNC110 - a lock tells nobody
            await asyncio.sleep(app.POLL_S)

    looking, ending = asyncio.create_task(look), asyncio.create_task(ended())
    try:
        await asyncio.wait({looking, ending}, return_when=asyncio.FIRST_COMPLETED)
        return looking.result() if looking.done() else None
    finally:
        looking.cancel()
        ending.cancel()
        await asyncio.gather(looking, ending, return_exceptions=True)


async def _verified(
    settings: Settings, run: str | None, repair: bool, elsewhere: Blobs | None, running: bool
) -> dict[str, Any]:
    async with app.stores_of_home(settings, "verify", running) as node, open_log(settings) as log:
        names = await _names(node, log, run)
        first = await _look(settings, node, log, names, run is None)
        last = first
        if repair and first.open:
            refused = await _mend(settings, node, log, first, elsewhere)
            last = await _look(settings, node, log, names, run is None)
            last.findings = [Finding(**{**asdict(f), "detail": _why(f, refused)}) for f in last.findings]
    left = [asdict(finding) for finding in last.open]
    still = {(f.kind, f.store, f.run, f.place) for f in last.open}
    return {
        "runs": len(last.runs),
        "records": last.records,
        "lines": last.counted,
        "blobs": len(last.blobs),
        "findings": [asdict(finding) for finding in first.findings],
        "mended": [asdict(f) for f in first.open if (f.kind, f.store, f.run, f.place) not in still],
        "left": left,
    }


async def look_at_all(settings: Settings, node: app.Node, log: ClickHouseLog) -> Looked:
    """What one look at everything finds. Raises QueryRefused where the tables do not even tell which runs they have."""
    return await _look(settings, node, log, await _names(node, log, None), True)


async def _names(node: app.Node, log: ClickHouseLog, run: str | None) -> list[str]:
    """The runs to look at, parents before their branches. Raises Unusable when there is none of the name."""
    known = list(dict.fromkeys([*await node.streams.runs(), *await log.runs()]))
    if run is None:
        return known
    found = [run] if run in known else [name for name in known if name.startswith(run)]
    if len(found) != 1:
        raise Unusable(f"{'no run' if not found else 'several runs begin with'} {run!r}; sia runs lists them")
    return found


async def _look(
    settings: Settings, node: app.Node, log: ClickHouseLog, names: Sequence[str], everything: bool
) -> Looked:
    # On a bus that is shared, the answers lie with the evaluator, who may be elsewhere.
    shared = settings.nats_url is not None and not [each async for each in node.private.listed()]
    looked = Looked(everything, private=not shared)
    # First of all how far the tables are, then the tables, then the stream: what comes meanwhile is not missed.
    copied: Copied = {stream: await node.streams.copied(stream, recorder.NAME) for stream in node.streams.histories()}
    for table, part, why in await log.torn():
        looked.torn = True
        looked.findings.append(Finding("unreadable", "tables", None, f"part {part} of {table}", why))
    for name in names:
        await _look_at(node, log, name, copied, looked)
    if everything:
        await _look_for_gaps(node, copied, looked)
        await _look_at_unnamed_blobs(node, looked)
    looked.findings += looked.of_blobs
    return looked


async def _look_at(node: app.Node, log: ClickHouseLog, name: str, copied: Copied, looked: Looked) -> None:
    if name in looked.runs:
        return
    looked.under_way.add(name)
    rows, tabled = await _told(log.rows(name), name, looked), await _told(log.lines(name), name, looked)
    # Counted before they are read: what comes meanwhile is not taken for lost.
    traced = node.streams.holding("SIA_TRACE", name)
    first = await node.streams.first(traced)
    counted, traces = await node.streams.counted("SIA", name), Traces(await node.streams.counted("SIA_TRACE", name))
    wires: list[tuple[int, bytes]] = []
    made_good = 0, 0
    async for each in node.streams.messages("SIA", name):
        wires.append((each.sequence, each.body))
        if each.made_good is not None:
            made_good = each.sequence, each.made_good
    start = await _start(node, log, [wire for _, wire in (*wires, *rows)], copied, looked)
    stream, unread = node.streams.holding("SIA", name), (0, 0)
    if counted > len(wires):
        last = wires[-1][0] if wires else 0
        unread = counted - len(wires), sum(lost > last for lost in (await _lost(node, stream, looked))[1])
    found = reconcile(name, wires, rows, copied[stream], start, unread, made_good)
    async for message in node.streams.traced(name):
        traces.take(message)
    before, first = first, await node.streams.first(traced)
    if first > before:
        traces.counted = 0  # some went by their age meanwhile: nobody knows of how many that are not there it is so
    of_lines, wrong, lost = reconcile_lines(name, traces, tabled, copied[traced], first)
    await _look_at_blobs(node, looked, name, found.records)
    looked.records += len(found.records)
    looked.runs[name] = replace(found, records=()) if found.sound else found
    looked.chains[name] = Chains.of(found.records)
    looked.lines[name] = wrong, lost
    looked.under_way.remove(name)
    looked.findings += [*found.findings, *of_lines]
    looked.counted += sum(len(digests) for digests in traces.envelopes.values())


async def _told(asked: Awaitable[Sequence[Row]], name: str, looked: Looked) -> Sequence[Row]:
    """Rows of a run; none where they lie in a torn part. Raises Unusable where the engine refuses whole ones."""
    try:
        return await asked
    except QueryRefused as refused:
        if not looked.torn:
            # For want of memory, say: of tables that are whole nothing is to be removed.
            raise Unusable(f"the tables do not tell of run {name}, though no part is torn: {refused}") from refused
    if name not in looked.unread:
        looked.unread.add(name)
        looked.findings.append(Finding("unreadable", "tables", name, "its rows", "they lie in a torn part"))
    return []


async def _start(
    node: app.Node, log: ClickHouseLog, wires: Sequence[bytes], copied: Copied, looked: Looked
) -> Start | None:
    """Where the run's own records begin: at 1, or behind the position of its parent that it branched from."""
    unknown = False
    for wire in wires:
        try:
            first = parse_record(wire)
        except NewerRecord as newer:
            unknown = unknown or newer.position > 1
            continue
        except UnreadableRecord:
            continue
        if first.position == 1:
            return Start()
        if isinstance(first.event, RunBranched) and first.position == first.event.at + 1:
            chain = await _chain(node, log, first.event, copied, looked)
            return Start(first.event.at, chain) if chain else None
    return None if unknown else Start()


async def _chain(node: app.Node, log: ClickHouseLog, fork: RunBranched, copied: Copied, looked: Looked) -> str | None:
    """The chain of the record that a run branched from. What was forged may descend from itself, and has none."""
    name, descended = fork.parent, set[str]()
    while name not in descended | looked.under_way:
        descended.add(name)
        await _look_at(node, log, name, copied, looked)
        parent = looked.chains[name]
        if parent.first <= fork.at:
            return parent.at(fork.at)
        if parent.fork is None or fork.at > parent.fork.at:
            return None
        name = parent.fork.parent
    return None


async def _lost(node: app.Node, stream: str, looked: Looked) -> tuple[int, Sequence[int]]:
    if stream not in looked.lost:
        looked.lost[stream] = await node.streams.lost(stream)
    return looked.lost[stream]


async def _look_for_gaps(node: app.Node, copied: Copied, looked: Looked) -> None:
    for stream in node.streams.histories():
        last, lost = await _lost(node, stream, looked)
        told = "it had been copied: what its run lacks is named there"
        for sequence in lost:
            harmless = told if sequence <= copied[stream] else ""
            place = f"{stream} sequence {sequence}"
            looked.findings.append(Finding("missing", "stream", None, place, "nothing can be read of it", harmless))
        if last < copied[stream]:
            place = f"{stream} sequences {last + 1} to {copied[stream]}"
            looked.findings.append(Finding("missing", "stream", None, place, "they had been there and are gone"))


async def _look_at_blobs(node: app.Node, looked: Looked, name: str, records: Sequence[Record]) -> None:
    """Every blob that a record names, and the members of trees."""
    for record in records:
        for reference in named(record):
            if looked.private or not reference.private:
                await _look_at_blob(node, looked, reference, name, f"record {record.position} names it")


async def _look_at_unnamed_blobs(node: app.Node, looked: Looked) -> None:
    for store, private in ((node.blobs, False), (node.private, True)):
        async for kept in store.listed():
            reference = Reference(kept.digest, private)
            await _look_at_blob(node, looked, reference, None, "nothing that was looked at names it")


async def _look_at_blob(node: app.Node, looked: Looked, reference: Reference, run: str | None, why: str) -> None:
    place = (reference.digest, reference.private)
    if reference in looked.references or (place in looked.blobs and not reference.tree):
        return
    looked.references.add(reference)
    seen = place in looked.blobs
    looked.blobs[place] = run
    store = node.private if reference.private else node.blobs
    try:
        body = await store.get(reference.digest)
    except (BlobMissing, BlobCorrupt) as error:
        kind = "missing" if isinstance(error, BlobMissing) else "altered"
        if not seen:
            looked.of_blobs.append(Finding(kind, "blobs", run, reference.digest, why))
        return
    # Files of a tree that read like a manifest themselves are somebody's content, and name nothing.
    for member in members(body) if reference.tree else ():
        within = Reference(member, reference.private)
        await _look_at_blob(node, looked, within, run, f"tree {reference.digest} names it")


async def _mend(
    settings: Settings, node: app.Node, log: ClickHouseLog, looked: Looked, elsewhere: Blobs | None
) -> dict[str | None, str]:
    """Mend what can be mended: the tables from the stream, then the stream from the tables, then blobs.

    Returns by run why something of it could not be.
    """
    refused: dict[str | None, str] = {}
    put_back: set[str] = set()
    log_here.forget_copied(settings)
    reach("sia verify before mending")
    # The tables first, with what was not copied yet: a server that is killed over a damaged stream may drop what stands
    # behind the damage.
    for name, run in looked.runs.items() if not looked.torn else ():
        if run.apart:
            continue
        await _mend_tables(node, log, name, run, looked.lines[name][0])
    reach("sia verify after mending the tables")
    with suppress(QueryRefused):  # of torn tables nothing more can be told than each run does below
        await _count_on(node, log, looked)
    for name, run in looked.runs.items():
        if run.apart:
            refused[name] = (
                f"from position {run.apart} on the stream and the tables have two histories of one name, each whole: "
                "neither is a copy of the other, and nothing of them was changed. Streams of another server, or from "
                "an older backup? To keep the stream's alone: sia rebuild --lose-old-traces"
            )
            continue
        try:
            # Behind those that are put back nobody would miss what was lost behind them.
            if not (run.sound or run.cut_off):
                await node.streams.restore(name, run.records)
        except RunExists as error:
            refused[name] = str(error)
        reach("sia verify after putting back records")
        if not run.whole:
            refused[name] = "no good copy of it is left in the stream or in the tables; an archive may have one"
        lost = sorted(looked.lines[name][1])
        if lost:
            # What is cut short here is begun again: neither step does anything twice.
            try:
                await node.streams.put_back(await log.envelopes(name, lost))
            except QueryRefused as error:
                refused[name] = f"its rows lie in a torn part: {error}"
                continue
            put_back.add(name)
            reach("sia verify after putting back traces")
            if not looked.torn:
                await _move_lines(node, log, name, frozenset(lost))
    reach("sia verify after mending the streams")
    for stream, (end, _) in looked.lost.items():
        await node.streams.step_back(stream, recorder.NAME, end)
    if not looked.torn:
        # Behind a record that is lost, what follows would pass for no part of its run.
        if settings.nats_url is None and all(run.whole for run in looked.runs.values()):
            await recorder.catch_up(node.bus, log)
    elif looked.all and all(run.whole for run in looked.runs.values()) and not (looked.in_tables_alone - put_back):
        if why := await only_in_tables(settings, node, log):
            refused[None] = f"{why}; to lose them and fill the tables anew: sia rebuild --lose-old-traces"
        else:
            await recorder.rebuild(node.bus, log)
    else:
        refused[None] = (
            "the tables are filled anew once everything else is mended: sia verify --all --repair; from what the "
            "streams have, whatever else the tables may have: sia rebuild --lose-old-traces"
        )
    await _mend_blobs(node, looked, elsewhere)
    reach("sia verify after mending the blobs")
    await log_here.mark_copied(settings, node.bus)
    return refused


async def _mend_tables(node: app.Node, log: ClickHouseLog, name: str, run: Reconciled, lines: frozenset[int]) -> None:
    await log.mend(name, [record for record in run.records if record.position in run.wrong], [])
    part: list[tuple[int, Envelope]] = []
    async for each in node.streams.envelopes(name):
        if each[0] in lines:
            part.append(each)
        if len(part) == ENVELOPES:
            await log.mend(name, [], part)
            part = []
    await log.mend(name, [], part)


async def _count_on(node: app.Node, log: ClickHouseLog, looked: Looked) -> None:
    """Have trace streams that were lost as a whole give no envelope a sequence that another has in the tables."""
    if any(lost for _, lost in looked.lines.values()):
        newest = await log.newest_line()
        for stream in {node.streams.holding("SIA_TRACE", name) for name in looked.lines}:
            await node.streams.begin_behind(stream, newest)


async def _move_lines(node: app.Node, log: ClickHouseLog, name: str, lost: frozenset[int]) -> None:
    """Take out the rows of envelopes that stand elsewhere now; the recorder copies these.

    A stream that has lost its end gives the next ones sequences of before. What stands in the place of a lost one is
    written here: what it copied before, the recorder may not be let to copy again.
    """
    taken = [
        (each.sequence, each.envelope)
        async for each in node.streams.traced(name)
        if each.envelope and each.in_place_of is not None and each.sequence in lost
    ]
    for start in range(0, len(taken), ENVELOPES):
        await log.mend(name, [], taken[start : start + ENVELOPES])
    await log.remove_lines(name, sorted(lost - {sequence for sequence, _ in taken}))


async def _mend_blobs(node: app.Node, looked: Looked, elsewhere: Blobs | None) -> None:
    """Put back blobs whose bytes are still somewhere: `elsewhere`, or on the stream, as a dead letter's."""
    bad = {f.place: f.run for f in looked.findings if f.store == "blobs"}
    for (digest, private), run in looked.blobs.items():
        if digest not in bad:
            continue
        store = node.private if private else node.blobs
        if elsewhere:
            try:
                await store.put(await elsewhere.get(digest))
                continue
            except (BlobMissing, BlobCorrupt):
                pass
        if run is not None:
            async for message in node.streams.messages("SIA", run):
                if hashlib.sha256(message.body).hexdigest() == digest:
                    await store.put(message.body)
                    break


def _why(finding: Finding, refused: dict[str | None, str]) -> str:
    return refused.get(finding.run) or refused.get(None) or finding.detail
