"""What replay and branches cost: records decided again a second, and a branch at any depth of its parent."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from sia_events import app, raw_engines
from sia_events.event_log import recorder
from sia_events.figures import Figure
from sia_events.home import own_nats_url
from sia_events.infra.clock import SystemClock
from sia_events.infra.memory import MemoryLog
from sia_events.infra.nats import connect
from sia_events.instant_run import instant_run, long_run
from sia_events.replaying import cores, decide_every
from sia_events.shared.events import RunBranched, RunSettings
from sia_events.shared.record import opening, parse_record
from sia_events.shared.replay import replay
from sia_events.shared.run import fold
from sia_events.stream_figures import NEWS, bus_on

GENERATIONS = 90  # about a thousand records
BRANCHES, AT_ONCE = 25, 1_000
SAME = 1.25
HEAD = 512  # what a stream keeps of a message beside its body: subject, headers, checksum


class _Same(MemoryLog):
    """A log that has one run under many names."""

    def __init__(self, wires: Sequence[bytes], times: int) -> None:
        super().__init__()
        self._rows, self._times = list(enumerate(wires, 1)), times

    async def runs(self) -> Sequence[str]:
        return [f"r{number}" for number in range(self._times)]

    async def wires(self, run: str) -> Sequence[tuple[int, bytes]]:
        return self._rows


async def replayed(records: int) -> list[Figure]:
    """Records from their bytes to the verdict: read, decided again, compared, chain and ids too; and to the last state.

    The same run over and over: as `sia replay --all` has it, on every core, and on one. `eventsourcing` reconstructs as
    many aggregates of as many events.
    """
    wires = [record.wire for record in instant_run("bench", GENERATIONS)]
    times = max(1, records // len(wires))
    began = time.perf_counter()
    found = await decide_every(_Same(wires, times), keep_going=False, alone_s=0.0)
    every = len(wires) * times / (time.perf_counter() - began)
    if any(isinstance(each, str) or each.divergences for each in found.values()):
        raise RuntimeError("no figure: the run does not replay")
    # Apart, as theirs: what other figures leave in memory is looked through by the collector again and again.
    seconds = await raw_engines.apart(_replay_apart, wires, max(1, times // 10))
    whole, parsed, folded = (len(wires) * max(1, times // 10) / each for each in seconds)
    beside: dict[str, Any] = {"records": len(wires) * times, "runs": times}
    if find_spec("eventsourcing"):
        took = await raw_engines.apart(raw_engines.rebuild_aggregates, max(1, times // 10), len(wires), NEWS.text)
        theirs = len(wires) * max(1, times // 10) / took
        beside |= {"eventsourcing rebuilds": theirs, "ratio": folded / theirs}
    else:
        beside |= {"eventsourcing": "not installed"}
    told = {"cores": cores(), "one core, a CPU s": whole, "reading alone": parsed}
    return [
        Figure("replay of all runs, from bytes", every, "records/s", ">= 50000", every >= 50_000, told),
        Figure("state rebuilt from bytes", folded, "records a CPU s", "", None, beside),
    ]


def _replay_apart(wires: Sequence[bytes], times: int) -> tuple[float, float, float]:
    """CPU seconds of so many replays from bytes, of reading alone, of the fold from bytes."""
    services = tuple(app.SERVICES.values())
    return (
        _cpu_seconds(lambda: replay([parse_record(wire) for wire in wires], services), times),
        _cpu_seconds(lambda: [parse_record(wire) for wire in wires], times),
        _cpu_seconds(lambda: fold(parse_record(wire) for wire in wires), times),
    )


async def branched(home: Path, depths: Sequence[int]) -> list[Figure]:
    """Opening a branch at each depth of one run, by those who have read nothing of it; and what the streams grow by.

    What they grow by beyond the branch's own record, once it is stored, would be a copy. The depths take turns, and a
    message that nats-py alone appends with them: all meet the same load.
    """
    opened = {depth: list[_Opened]() for depth in sorted(depths)}
    raw: list[float] = []
    async with bus_on(home) as node, raw_engines.raw_stream(url := own_nats_url(node.settings)) as client:
        deep = (record.wire for record in long_run("deep", max(depths), NEWS))
        while some := list(islice(deep, AT_ONCE)):
            await raw_engines.publish_batch(client, f"sia.events.deep.{type(NEWS).__name__}", some)
        for number in range(BRANCHES):
            for depth, found in opened.items():
                found.append(await _opened(node, url, depth, number))
            raw.append(1000 * await raw_engines.publish_each(client, [bytes(opened[min(depths)][-1].record)], 1))
    figures: list[Figure] = []
    shallow, deepest = opened[min(depths)], opened[max(depths)]
    for depth, found in opened.items():
        value, grown = statistics.median(each.ms for each in found), statistics.fmean(each.grown for each in found)
        beside = {
            "slowest": max(each.ms for each in found),
            "raw nats-py append": statistics.median(raw),
            "stored bytes": grown,
            "its record": found[-1].record,
        }
        good = value < 100 and grown < found[-1].record + HEAD
        figures.append(Figure(f"a branch at {depth}", value, "ms", "< 100, nothing copied", good, beside))
    ratio = statistics.median(there.ms / here.ms for there, here in zip(deepest, shallow, strict=True))
    # By how much two turns at one depth differ: as often more as less.
    again = [shallow[at].ms / shallow[at - 1].ms for at in range(1, len(shallow))]
    noise = max(SAME, statistics.quantiles(again, n=4)[2]) if len(again) > 1 else SAME
    name, goal = f"a branch at {max(depths)}, beside one at {min(depths)}", f"<= {noise:.2f}, the noise"
    told = {"turns": BRANCHES, "upper quartile, same depth again": noise}
    return [*figures, Figure(name, ratio, "x", goal, ratio <= noise, told)]


@dataclass(frozen=True)
class _Opened:
    """A branch: how long it took, in ms, by how many bytes the streams grew, and how long its record is."""

    ms: float
    grown: int
    record: int


async def _opened(node: app.Node, url: str, depth: int, number: int) -> _Opened:
    fork = RunBranched(parent="deep", at=depth, generation=0, overrides={}, settings=RunSettings(), code="bench")
    name, before = f"branch-{depth}-{number}", await _stored(node)
    async with connect(url, node.blobs, SystemClock()) as bus:
        began = time.perf_counter()
        (record,) = await bus.append(name, opening(name, [fork]))
        took = time.perf_counter() - began
    return _Opened(1000 * took, await _stored(node) - before, len(record.wire))


async def _stored(node: app.Node) -> int:
    return sum(size.bytes for size in await node.streams.sizes(recorder.NAME))


def _cpu_seconds(work: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - began
