"""What a call cost, read from outside the process that worked, and how two costs compare."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil


@dataclass(frozen=True)
class Cost:
    """Nanoseconds between a request and the last byte of its reply.

    `cpu` is the kernel's own account of every thread of the worker, dead ones included. `idle` is the part of `wall`
    in which neither worker nor judge ran or queued for a CPU: an honest kernel has next to none, one whose work is
    done elsewhere has much.
    """

    cpu: int
    wall: int
    idle: int


@dataclass(frozen=True)
class Instant:
    cpu: int
    wall: int
    waited: int
    judge: int


@dataclass(frozen=True)
class Interval:
    """Median with 20th and 80th percentile."""

    median: float
    low: float
    high: float


def processes(pid: int) -> tuple[int, ...]:
    """`pid` and all its descendants: a worker in a box is a grandchild of the judge."""
    return (pid, *(child.pid for child in psutil.Process(pid).children(recursive=True)))


def instant(pids: Sequence[int]) -> Instant:
    """The clocks of `pids` now. Raises OSError when one of them is gone."""
    wall = time.perf_counter_ns()
    judge = time.thread_time_ns() + run_queue_wait(Path("/proc/thread-self/schedstat"))
    waited = sum(run_queue_wait(Path(f"/proc/{pid}/schedstat")) for pid in pids)
    return Instant(sum(cpu_time(pid) for pid in pids), wall, waited, judge)


def cost(before: Instant, after: Instant) -> Cost:
    cpu, wall = after.cpu - before.cpu, after.wall - before.wall
    return Cost(cpu, wall, max(0, wall - cpu - (after.waited - before.waited) - (after.judge - before.judge)))


def cpu_time(pid: int) -> int:
    """CPU nanoseconds of the whole process `pid`, by the clock id that clock_getcpuclockid(3) would give."""
    whole_process, scheduler_clock = 0, 2
    return time.clock_gettime_ns((~pid << 3) | whole_process | scheduler_clock)


def run_queue_wait(schedstat: Path) -> int:
    """Nanoseconds a thread was ready to run and had no CPU (second field of schedstat)."""
    return int(schedstat.read_text().split()[1])


def interval(values: Sequence[float]) -> Interval:
    low, median, high = np.quantile(values, (0.2, 0.5, 0.8))
    return Interval(float(median), float(low), float(high))
