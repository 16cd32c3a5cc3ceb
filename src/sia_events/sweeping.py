"""`sia gc`: blobs that nothing recorded points at, found and removed."""

from datetime import UTC, datetime, timedelta
from typing import Any

from sia_events import app
from sia_events.catching_up import settled
from sia_events.errors import Unusable
from sia_events.event_log import recorder
from sia_events.event_log.references import mentioned
from sia_events.home import describe
from sia_events.infra.blobs import Kept, StoredBlobs
from sia_events.infra.clickhouse import ClickHouseLog
from sia_events.log_here import open_log
from sia_events.same_streams import require_same
from sia_events.shared.events import RunCancelled, RunFinished
from sia_events.shared.failpoints import reach
from sia_events.shared.settings import Settings

YOUNG = timedelta(hours=1)


async def sweep(settings: Settings, remove: bool, now: datetime | None = None) -> dict[str, Any]:
    """Find the blobs that are named nowhere, and remove them when asked to: {blobs, bytes, removed, kept, since}.

    What was written `since`, an hour before now or before a run began that is not over, is not looked at: its record
    may be on its way, and what is stored again so soon keeps its time. Whatever looks like a digest counts as one, in
    records, traces, and blobs that are kept: so more may be kept than has to be, and never less. Raises Unusable while
    services run here, and where the stream has lost what the tables do not have.
    """
    running = await settled(settings)
    if remove and running:
        raise Unusable(f"{describe(running, settings.home)}; nothing was removed. Stop it first: sia down")
    async with app.stores_of_home(settings, "gc", running is not None) as node, open_log(settings) as log:
        await require_same(settings, node.streams, log)
        listed = [(store, [kept async for kept in store.listed()]) for store in (node.blobs, node.private)]
        marked, opened = await _marked(node, log)
        since = min([now or datetime.now(UTC), *opened]) - YOUNG
        found: list[tuple[StoredBlobs, Kept]] = []
        count = 0
        for store, there in listed:
            names = await _reached(store, there, marked, since)
            found += [(store, kept) for kept in there if kept.digest not in names]
            count += len(names)
        removed = 0
        for store, kept in found if remove else ():
            reach("sia gc before removing a blob")
            removed += await store.remove(kept.digest, since)
            reach("sia gc after removing a blob")
    return {
        "blobs": sorted(kept.digest for _, kept in found),
        "bytes": sum(kept.size for _, kept in found),
        "removed": removed,
        "kept": count,
        "since": since.isoformat(timespec="seconds"),
    }


async def _marked(node: app.Node, log: ClickHouseLog) -> tuple[set[str], list[datetime]]:
    """Every digest that is written in a record or a trace, and when each run began that is not over."""
    for stream in node.streams.histories():
        _, lost = await node.streams.lost(stream)
        copied = await node.streams.copied(stream, recorder.NAME)
        if any(sequence > copied for sequence in lost):
            raise Unusable(f"{stream} has lost what the tables do not have; nothing was removed. See sia verify --all")
    marked: set[str] = set()
    opened: list[datetime] = []
    for run in dict.fromkeys([*await node.streams.runs(), *await log.runs()]):
        async for message in node.streams.messages("SIA", run):
            marked |= mentioned(message.body)
        for _, body in await log.rows(run):
            marked |= mentioned(body)
        tabled = {sequence for sequence, _, _ in await log.lines(run)}
        async for sequence, envelope in node.streams.envelopes(run):
            tabled.discard(sequence)
            marked |= mentioned(b"\n".join(envelope.lines))
        for _, envelope in await log.envelopes(run, sorted(tabled)) if tabled else ():
            marked |= mentioned(b"\n".join(envelope.lines))
        own = [record for record in await node.bus.history(run) if record.run == run]
        if own and not any(isinstance(record.event, RunFinished | RunCancelled) for record in own):
            opened.append(own[0].time)
    return marked, opened


async def _reached(store: StoredBlobs, there: list[Kept], marked: set[str], since: datetime) -> set[str]:
    """The blobs that are marked or too young to tell, and those that one of them names."""
    names = {kept.digest for kept in there}
    queue = [kept.digest for kept in there if kept.digest in marked or kept.written >= since]
    reached: set[str] = set()
    while queue:
        if (digest := queue.pop()) in reached:
            continue
        reached.add(digest)
        queue += names & mentioned(await store.get(digest))
    return reached
