"""What replay and branches cost: records decided again a second, and a branch at any depth of its parent."""

import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from sia_events import app, raw_engines
from sia_events.event_log import recorder
from sia_events.figures import Figure
from sia_events.home import own_nats_url
from sia_events.infra.clock import SystemClock
from sia_events.infra.nats import connect
from sia_events.instant_run import instant_run, long_run
from sia_events.shared.events import RunBranched, RunSettings
from sia_events.shared.record import opening, parse_record
from sia_events.shared.replay import replay
from sia_events.shared.run import fold
from sia_events.stream_figures import NEWS, bus_on

GENERATIONS = 90  # about a thousand records
BRANCHES, AT_ONCE = 9, 1_000
HEAD = 512  # what a stream keeps of a message beside its body: subject, headers, checksum


async def replayed(records: int) -> list[Figure]:
    """Records that are decided again and compared, chain and ids too; and that are read and folded to the last state.

    The same run over and over. `eventsourcing` reconstructs as many aggregates of as many events.
    """
    wires = [record.wire for record in instant_run("bench", GENERATIONS)]
    times = max(1, records // len(wires))
    services = tuple(app.SERVICES.values())

    read = [parse_record(wire) for wire in wires]

    def decided() -> None:
        found = replay(read, services)
        if found.divergences or found.records != len(wires):
            raise RuntimeError(f"no figure: the run does not replay: {found}")

    whole = len(wires) * times / _cpu_seconds(decided, times)
    parsed = len(wires) * times / _cpu_seconds(lambda: [parse_record(wire) for wire in wires], times)
    folded = len(wires) * times / _cpu_seconds(lambda: fold(parse_record(wire) for wire in wires), times)
    beside: dict[str, Any] = {"records": len(wires) * times, "runs": times}
    if find_spec("eventsourcing"):
        took = await raw_engines.apart(raw_engines.rebuild_aggregates, times, len(wires), NEWS.text)
        theirs = len(wires) * times / took
        beside |= {"eventsourcing rebuilds": theirs, "ratio": folded / theirs}
    else:
        beside |= {"eventsourcing": "not installed"}
    return [
        Figure("replay", whole, "records a CPU s", ">= 50000", whole >= 50_000, {"read before, at": parsed}),
        Figure("state rebuilt from bytes", folded, "records a CPU s", "", None, beside),
    ]


async def branched(home: Path, depths: Sequence[int]) -> list[Figure]:
    """Opening a branch at each depth of one run, by those who have read nothing of it; and what the streams grow by.

    What they grow by beyond the branch's own record, once it is stored, would be a copy.
    """
    found: list[Figure] = []
    async with bus_on(home) as node, raw_engines.raw_stream(url := own_nats_url(node.settings)) as client:
        deep = (record.wire for record in long_run("deep", max(depths), NEWS))
        while some := list(islice(deep, AT_ONCE)):
            await raw_engines.publish_batch(client, f"sia.events.deep.{type(NEWS).__name__}", some)
        shallow = 0.0
        for depth in sorted(depths):
            fork = RunBranched(
                parent="deep", at=depth, generation=0, overrides={}, settings=RunSettings(), code="bench"
            )
            took: list[float] = []
            own = 0
            before = await _stored(node)
            for number in range(BRANCHES):
                name = f"branch-{depth}-{number}"
                async with connect(url, node.blobs, SystemClock()) as bus:
                    began = time.perf_counter()
                    (opened,) = await bus.append(name, opening(name, [fork]))
                    took.append(time.perf_counter() - began)
                    own = len(opened.wire)
            grown = (await _stored(node) - before) / BRANCHES
            value = 1000 * statistics.median(took)
            shallow = shallow or value
            beside = {
                "slowest": 1000 * max(took),
                "x the first": value / shallow,
                "stored bytes": grown,
                "its record": own,
            }
            good = value < 100 and grown < own + HEAD
            found.append(Figure(f"a branch at {depth}", value, "ms", "< 100, nothing copied", good, beside))
    return found


async def _stored(node: app.Node) -> int:
    return sum(size.bytes for size in await node.streams.sizes(recorder.NAME))


def _cpu_seconds(work: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - began
