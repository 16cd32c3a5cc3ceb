"""Measures the kernel that an attempt wrote."""

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress

from sia_events.kernel_bench.host import BenchUnavailable, Launch, Stopped, plain
from sia_events.kernel_bench.measure import Measurement, measure
from sia_events.kernel_bench.problems import PROBLEMS, Problem
from sia_events.shared.events import Event, ExecutionLogged, KernelMeasured
from sia_events.shared.registration import decode_task
from sia_events.shared.service import Work
from sia_events.shared.tree import load_tree

KERNEL = "kernel.py"


async def measure_kernel(work: Work, logged: ExecutionLogged) -> Sequence[Event]:
    """Check and time the attempt's kernel.py, for a task that names a kernel problem; of others it says nothing."""
    assert work.run.task is not None
    task = decode_task(await work.ports.blobs.get(work.run.task.spec))
    if task.kernel is None:
        return []
    outputs = await load_tree(work.ports.blobs, logged.outputs)
    source = outputs.get(KERNEL, b"").decode(errors="replace")
    found = await _measured(source, PROBLEMS[task.kernel], task.repeats, work.ports.boxed or plain)
    return [
        KernelMeasured(
            attempt=logged.attempt,
            version=logged.version,
            problem=found.problem,
            correct=found.correct,
            speedup=round(found.speedup or 0.0, 6),
            low=round(found.low or 0.0, 6),
            high=round(found.high or 0.0, 6),
            flagged=found.flagged,
            reason=found.reason[-500:],
            rounds=tuple(round(speedup, 6) for speedup in found.rounds),
        )
    ]


async def _measured(source: str, problem: Problem, repeats: int, launch: Launch) -> Measurement:
    """`measure` in a thread. A cancellation waits until its workers are ended: a thread that went on would keep the
    process, and them, for as long as a kernel may take.
    """
    stop, stopping = os.pipe()

    def measured() -> Measurement:
        with open(stop, "rb"):  # closed by who reads it: a second cancellation waits for nobody
            return measure(source, problem, repeats=repeats, launch=launch, stop=stop)

    measuring = asyncio.create_task(asyncio.to_thread(measured))
    with os.fdopen(stopping, "wb", buffering=0) as open_end:
        try:
            return await asyncio.shield(measuring)
        except asyncio.CancelledError:
            # Nothing is written: the thread sees the end of the pipe, and may have closed its own already.
            open_end.close()
            with suppress(Stopped, BenchUnavailable):
                await measuring
            raise
