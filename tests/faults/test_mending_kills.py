"""What mends, carries and clears is killed at each step: given again it ends well, and nothing is there twice."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from chains import KILLED
from command import answered, assert_none_left, read, sia
from points import OF_A_DROP, OF_A_REPAIR, OF_A_RESTORE, OF_A_SWEEP
from test_verify import block, filled, flip, on_home

from sia_events import app
from sia_events.log_here import open_log
from sia_events.shared.settings import Settings

RUNS = ("r1", "r2", "b1")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    asyncio.run(on_home(tmp_path / "home", filled))
    return tmp_path / "home"


@pytest.fixture
def killed(children: Callable[[], list[psutil.Process]]) -> Callable[..., None]:
    """Has a command killed at a point of it; behind it nothing runs any more."""

    def kill(home: Path, point: str, *words: object) -> None:
        done = sia(home, *words, SIA_FAIL_AT=point)
        assert done.returncode == KILLED, f"{point}: {done.returncode} {done.stdout}{done.stderr}"
        assert_none_left(children)

    return kill


def kept(home: Path) -> dict[str, Any]:
    """All that stands of the runs: records, envelopes in no order, and blobs."""

    async def ask(node: app.Node) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for run in RUNS:
            found[run] = [record.wire for record in await node.bus.history(run)]
            envelopes = [(each.kind, each.key, each.lines) async for _, each in node.streams.envelopes(run)]
            found[f"traces of {run}"] = sorted(envelopes)
        found["blobs"] = {each.digest: await node.blobs.get(each.digest) async for each in node.blobs.listed()}
        return found

    return asyncio.run(on_home(home, ask))


def test_a_repair_that_is_killed_at_each_of_its_steps_is_given_again_and_puts_nothing_back_twice(
    home: Path, killed: Callable[..., None]
):
    before = kept(home)
    flip(block(home), b"note 7 of r1")
    traces = block(home, "SIA_TRACE")
    body = traces.read_bytes()
    flip(traces, body[body.index(b"sia.trace.r1.log.a") + 25 :][:8])
    (blob,) = (home / "blobs").rglob("*/*")
    flip(blob)

    async def lose_rows() -> None:
        async with open_log(Settings(home=home)) as log:
            await log._remove("events", "position", "r2", [3, 4])

    asyncio.run(lose_rows())
    for point in OF_A_REPAIR:
        killed(home, point, "verify", "--all", "--repair")
    mended = sia(home, "verify", "--all", "--repair")
    assert mended.returncode == 0, mended.stdout
    assert answered(home, "verify", "--all")["left"] == [] and kept(home) == before


def test_a_restore_that_is_killed_at_each_of_its_steps_is_given_again_and_puts_nothing_back_twice(
    home: Path, tmp_path: Path, killed: Callable[..., None]
):
    file, there = tmp_path / "b1.sia.tar.zst", tmp_path / "there"
    answered(home, "archive", "b1", file)
    for point in OF_A_RESTORE:
        killed(there, point, "restore", file)
        runs = [row["run"] for row in read(there, "runs")]
        assert runs == (["r1"] if point == OF_A_RESTORE[-1] else []), "a run is there when it is whole"
    assert answered(there, "restore", file)["runs"] == ["r1", "b1"]
    here, now = kept(home), kept(there)
    assert all(now[each] == here[each] for each in ("r1", "b1", "traces of r1", "traces of b1", "blobs"))
    assert answered(there, "verify", "--all")["findings"] == []


def test_a_sweep_and_a_drop_that_are_killed_before_and_behind_their_step_have_done_all_of_it_or_nothing(
    home: Path, killed: Callable[..., None]
):
    dropping = ("dlq", "drop", "r1", "14", "--reason", "no use")
    for point, state in zip(OF_A_DROP, ("open", "dropped"), strict=True):
        killed(home, point, *dropping)
        assert [row["state"] for row in read(home, "dlq", "list", "--all")] == [state]
    assert sia(home, *dropping).returncode == 2, "it is not dropped twice"

    named = {file for file in (home / "blobs").rglob("*/*")}
    asyncio.run(on_home(home, unnamed))
    alone, old = {*(home / "blobs").rglob("*/*")} - named, time.time() - 2 * 86_400
    for file in alone:
        os.utime(file, (old, old))
    for number, point in enumerate(OF_A_SWEEP):
        killed(home, point, "gc", "--yes")
        assert sum(file.exists() for file in alone) == 3 - number
    assert answered(home, "gc", "--yes")["removed"] == 2
    assert {*(home / "blobs").rglob("*/*")} == named and answered(home, "verify", "--all")["left"] == []


async def unnamed(node: app.Node) -> None:
    for number in range(3):
        await node.blobs.put(b"of nobody %d" % number)
