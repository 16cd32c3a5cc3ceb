"""All runs of a log, decided again by several processes: what they find is what one finds, and they end with it."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from bus_on import until
from given import altered
from test_replay import FAMILY, RUNS

from sia_events import replaying
from sia_events.errors import Unusable
from sia_events.infra.memory import MemoryLog
from sia_events.replaying import decide_every
from sia_events.shared.record import Record, parse_record
from sia_events.shared.replay import Replayed

# Decides the same run over and over, in processes of its own from the first on.
ENDLESS = """
import asyncio, itertools, signal
from sia_events.replaying import decide_every
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever tests in the background may have it ignored
class Log:
    async def runs(self):
        return (f"r{{number}}" for number in itertools.count())
    async def wires(self, run):
        return list(enumerate(open({path!r}, "rb").read().splitlines(), 1))
asyncio.run(decide_every(Log(), False, alone_s=0.0))
"""


def recorded(path: Path) -> list[Record]:
    return [parse_record(line) for line in path.read_bytes().splitlines()]


async def every_kind() -> MemoryLog:
    """Runs that agree, a family of branches, one that was altered, and one that lost a record."""
    log = MemoryLog()
    family = recorded(FAMILY)
    await log.append(family, "whole")
    for path in RUNS:
        if path != FAMILY:
            await log.append([replace(each, run=path.stem) for each in recorded(path)], path.stem)
    own = [record for record in family if record.run == family[0].run]
    changed = [altered(each, code="somebody") if each.position == 4 else each for each in own]
    await log.append([replace(each, run="changed") for each in changed], "changed")
    await log.append([replace(each, run="lost") for each in own if each.position != 4], "lost")
    return log


async def test_several_processes_find_what_one_finds():
    log = await every_kind()
    alone = await decide_every(log, keep_going=True, alone_s=60)
    apart = await decide_every(log, keep_going=True, alone_s=0)
    assert list(alone) == list(apart) == list(await log.runs()) and len(alone) > len(RUNS)
    assert apart == alone
    assert "behind record 3 the log has record 5" in str(alone["lost"])
    assert [run for run, each in alone.items() if isinstance(each, Replayed) and each.divergences] == ["changed"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for children by their parent")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_no_process_is_left_behind_one_that_is_ended(number: int):
    program = ENDLESS.format(path=str(FAMILY))
    command = [sys.executable, "-c", program]
    parent = await asyncio.to_thread(subprocess.Popen, command, stderr=subprocess.PIPE, text=True)
    told = psutil.Process(parent.pid)
    children: Sequence[psutil.Process] = []

    def deciding() -> bool:
        nonlocal children
        children = [each for each in told.children() if each.cpu_times().user > 1]
        return bool(children)

    try:
        await until(deciding, 60)
        parent.send_signal(number)
        said = await asyncio.to_thread(parent.communicate, timeout=30)
        await until(lambda: not any(each.is_running() for each in children), 20)
        # One word of it, and not one of each process and of each run that waited.
        assert said[1].count("KeyboardInterrupt") <= 2 and "exception calling callback" not in said[1]
    finally:
        parent.kill()


async def test_a_process_that_is_killed_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replaying, "_told", _killed)
    with pytest.raises(Unusable, match="was killed, for want of memory"):
        await decide_every(await every_kind(), keep_going=False, alone_s=0)


def _killed(*_: object) -> None:
    signal.raise_signal(signal.SIGKILL)
