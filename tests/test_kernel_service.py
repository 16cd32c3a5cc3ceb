"""kernel_bench as a service: an attempt's kernel.py measured in a box, and nothing said of other tasks."""

import asyncio
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import assert_none_left, until
from given import recorded
from story import OPENING, asked, logged, registered

from sia_events.infra.box import kernel_box
from sia_events.infra.memory import MemoryBlobs, MemoryBus, SystemTime
from sia_events.infra.sandbox import binary, check
from sia_events.kernel_bench import perform
from sia_events.kernel_bench.problems import PROBLEMS, TRIMUL, Case, shipped
from sia_events.kernel_bench.service import kernel_bench
from sia_events.shared.events import ExecutionLogged, KernelMeasured
from sia_events.shared.ports import Ports
from sia_events.shared.registration import register
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.task import find_task
from sia_events.shared.tree import store_tree

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("torch") is None or check() is not None,
    reason="kernels need Linux, torch and a box",
)
SMALL = replace(TRIMUL, checked=(Case(16, 1, 32),), timed=(Case(24, 1, 64, masked=True),))


async def answered(source: str, home: Path, monkeypatch: pytest.MonkeyPatch, kernel: str | None = "trimul") -> Any:
    monkeypatch.setattr(perform, "PROBLEMS", {"trimul": SMALL})
    blobs = MemoryBlobs()
    task = replace(find_task("words"), kernel=kernel)
    spec = (await register(task, blobs, MemoryBlobs(), 8)).spec
    ran = logged("g0a", "dev").model_copy(update={"outputs": await store_tree(blobs, {"kernel.py": source.encode()})})
    records = recorded(registered(spec=spec), *OPENING[1:], asked("g0a", "dev"), ran)
    ports = Ports(MemoryBus(blobs), blobs, None, SystemTime(), None, home, boxed=partial(kernel_box, binary()))  # type: ignore[arg-type]
    return await kernel_bench.performs[ExecutionLogged](Work(fold(records), records[-1], ports), ran)


async def test_an_attempts_kernel_is_checked_and_timed_in_a_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (event,) = await answered(shipped("channel_first"), tmp_path, monkeypatch)
    assert isinstance(event, KernelMeasured) and event.correct, event.reason
    assert event.speedup > 0 and event.problem == TRIMUL.name


async def test_a_boxed_kernel_reads_no_private_data_and_no_other_kernel_and_reaches_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    secret = Path(find_task("words").path) / "data/private/items.jsonl"
    assert secret.exists()
    spying = shipped("reference").replace(
        "def custom_kernel(data):",
        "import os, socket, sys\n"
        f"assert not os.path.exists({str(secret)!r}), 'read the answers'\n"
        "assert os.listdir(os.path.dirname(sys.argv[0])) == ['worker.py'], 'saw the kernels that ship'\n"
        "assert [name for _, name in socket.if_nameindex()] == ['lo'], 'saw a network'\n"
        "def custom_kernel(data):",
    )
    assert spying != shipped("reference")
    (event,) = await answered(spying, tmp_path, monkeypatch)
    assert isinstance(event, KernelMeasured) and event.correct, event.reason


async def test_a_measurement_that_is_cancelled_ends_with_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: Callable[[], list[psutil.Process]]
):
    sleeping = "import time\ndef custom_kernel(data):\n    time.sleep(100)\n"
    measuring = asyncio.create_task(answered(sleeping, tmp_path, monkeypatch))
    await asyncio.to_thread(until, lambda: any("worker.py" in " ".join(child.cmdline()) for child in children()))
    measuring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await measuring
    assert_none_left(children)


async def test_a_task_without_a_kernel_is_none_of_its_business(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert not await answered("", tmp_path, monkeypatch, kernel=None)


def test_every_problem_names_a_baseline_that_ships():
    assert all(shipped(problem.baseline) for problem in PROBLEMS.values())
