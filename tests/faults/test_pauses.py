"""A process that stands still for seconds and then goes on costs time, and nothing else."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from bus_on import notes, opened
from command import answered, sia
from disturbed import assert_as_undisturbed, child_of, command, going, log
from scraping import samples

from sia_events import app, log_here
from sia_events.event_log import recorder
from sia_events.home import hold
from sia_events.infra.store_lock import owner
from sia_events.shared.record import Record
from sia_events.shared.settings import Settings

# Longer than an answer of the server is waited for (2 s), shorter than it takes to call a server hung (8 s).
PAUSE_S = 5.0


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def undisturbed(task: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    home = tmp_path_factory.mktemp("undisturbed")
    assert sia(home, *command(task)).returncode == 0
    return log(home)


@pytest.mark.slow  # each stands still for seconds, which is the point of it
@pytest.mark.parametrize("who", ["nats-server", "chdb_server", "sia_events"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_goes_on_when_a_process_of_it_stood_still(
    who: str, seed: int, task: Path, tmp_path: Path, undisturbed: list[Record]
):
    process = going(task, tmp_path, random.Random(f"{who} {seed}").randint(1, 12))
    pid = process.pid if who == "sia_events" else child_of(process.pid, who).pid
    with standing_still(pid):
        time.sleep(PAUSE_S)
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 0, talk
    assert_as_undisturbed(tmp_path, undisturbed)


async def test_while_the_logs_owner_stands_still_records_are_taken_and_status_shows_the_lag(tmp_path: Path):
    settings = Settings(home=tmp_path)
    async with hold(settings, "serve"), app.stores(settings) as node:
        recording = asyncio.create_task(log_here.keep_log(settings, node.bus, node.streams))
        try:
            first, *_ = await opened(node.bus, "r1")
            await caught_up(node)
            held = owner(tmp_path / "log")
            assert held
            with standing_still(held.pid):
                for number in range(20):
                    await node.bus.append("r1", notes("r1", first, "x", producer=f"tester {number}"))
                found = samples((await asyncio.to_thread(sia, tmp_path, "status", "--metrics")).stdout)
                assert found["sia_stream_lag_messages", "SIA"] == 20 and found["sia_log_up", ""] == 0
                assert found["sia_runs", "running"] == 1, "the stream tells as long as the tables do not"
                told = await asyncio.to_thread(sia, tmp_path, "status")
                assert "20 messages behind" in told.stdout and "does not answer" in told.stdout
            await caught_up(node)
            found = await asyncio.to_thread(answered, tmp_path, "status")
            assert found["lag"] == 0 and found["log"] is None
            assert {each["table"]: each["rows"] for each in found["tables"]}["events"] == 21
        finally:
            recording.cancel()
            await asyncio.gather(recording, return_exceptions=True)


async def caught_up(node: app.Node) -> None:
    async with asyncio.timeout(60):
        while await recorder.lag(node.bus):  # noqa: ASYNC110 - what is waited for happens in other processes
            await asyncio.sleep(0.05)
