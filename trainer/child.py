"""The learning process as its parent sees it: started, heard line by line, and never left behind."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from sia_events.shared.environment import plain
from sia_events.shared.ports import Envelope, Ports
from sia_events.trainer.spec import LESS_MEMORY

VMSTAT = Path("/proc/vmstat")


class LearningFailed(Exception):
    """The learning process ended without an adapter; the message is its last words. Its checkpoint is kept."""


class LearningRefused(Exception):
    """The learning process takes no such rollouts or adapter, whenever it is asked; the message is why."""


class LearningDiverged(Exception):
    """Learning left the finite numbers, as it would whenever it is asked; the message says where."""


class _OutOfMemory(Exception):
    """The kernel ended the learning process, which had told of so many steps, for want of memory."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class LearningTooLarge(Exception):
    """Not one step of learning fits into this machine's memory, whenever it is asked; the message says what to do."""


async def run_learner(spec: Path, ports: Ports, run: str, key: str) -> dict[str, Any]:
    """Run the learner on a spec file, which lies beside its checkpoint, and return its last line.

    Its lines go to the trace as they come. It ends with us: it watches its standard input. Where the kernel ended it in
    want of memory it is started once more, with half as much at once. Raises LearningFailed, and LearningRefused,
    LearningDiverged or LearningTooLarge where another try would end so too.
    """
    try:
        return await _run(spec, ports, run, key)
    except _OutOfMemory as killed:
        step = killed.step
    try:
        return await _run(spec, ports, run, key, "--halved")
    except _OutOfMemory as killed:
        step = max(step, killed.step)
    ended = "The kernel ended learning for want of memory, also with half as much at once. "
    if not step:
        raise LearningTooLarge(f"{ended}{LESS_MEMORY}")
    raise LearningFailed(f"{ended}It goes on behind step {step} or the one before. {LESS_MEMORY}")


async def _run(spec: Path, ports: Ports, run: str, key: str, *options: str) -> dict[str, Any]:
    before = killed_for_memory()
    threads = str(ports.threads)
    env = {**plain(), "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sia_events.trainer.learn", str(spec), "--die-with-parent", *options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
        limit=2**24,
    )
    assert child.stdout and child.stderr
    words = asyncio.create_task(child.stderr.read())
    last: dict[str, Any] = {}
    try:
        async for line in child.stdout:
            last = msgspec.json.decode(line)
            await ports.bus.trace(Envelope(run, "training", key, (line.rstrip(),)))
        code = await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    said = (await words).decode(errors="replace").strip()[-2000:]
    if code == -signal.SIGKILL and killed_for_memory() > before:
        raise _OutOfMemory(last.get("step", 0))
    if code < 0:
        raise LearningFailed(
            f"learning was killed by signal {-code}; it goes on behind step {last.get('step', 0)} or the one before. "
            f"{said}"
        )
    if code == os.EX_DATAERR:
        raise LearningRefused(said.rpartition("learn: ")[2])
    if code == os.EX_SOFTWARE:
        raise LearningDiverged(said.rpartition("learn: ")[2])
    if code == os.EX_OSERR:
        why = said.rpartition("learn: ")[2]
        if "step" not in last:
            raise LearningTooLarge(why)
        # Others may have taken the memory since: what fitted may fit again.
        raise LearningFailed(f"{why} It goes on behind step {last['step']} or the one before.")
    if code or not last.get("done"):
        raise LearningFailed(said or f"learning ended with exit status {code}, without an adapter and without a word")
    return last


def killed_for_memory() -> int:
    """How many processes the kernel has ended for want of memory, the machine's or a control group's; 0: unknown.

    A process that it ends so has no last words, and dies of the same signal as one that a person kills.
    """
    try:
        told = dict(line.split() for line in VMSTAT.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(told.get("oom_kill", 0))
