"""`sia run` killed at random moments: by the provider's own count no recorded call is made a second time."""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from command import assert_none_left, calls, log, read, sia, start
from llm_author import SMALL, Author, assert_paid_once, reached
from loopback import Loopback

from sia_events.shared.events import RunFinished
from sia_events.shared.record import broken_link

KILLED = -signal.SIGKILL
KILLS = 50

pytestmark = pytest.mark.usefixtures("children")


def assert_whole(home: Path, run: str = "r1") -> None:
    """The run came to its end, with no gap and no double, and replay agrees."""
    records = log(home, run)
    assert [record.position for record in records] == list(range(1, len(records) + 1))
    assert len({record.id for record in records}) == len(records) and broken_link(records) is None
    assert isinstance(records[-1].event, RunFinished) and records[-1].event.outcome == "improved"
    assert not read(home, "replay", run)["diverged"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["direct", "agentic"])
def test_killed_at_random_moments_runs_pay_for_no_recorded_call_twice(
    backend: str, tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    draw, kills, number = random.Random(backend), 0, 0
    while kills < KILLS // 2:
        run, number, author = f"r{number + 1}", number + 1, Author()
        command = ("run", task, "--run", run, "--seed", number, *SMALL, "--backend", backend)
        before = kills
        with Loopback(author) as provider:
            while kills < KILLS // 2:
                process = start(tmp_path, *command, **reached(provider))
                if not killed(process, author, draw):
                    break
                kills += 1
                assert_none_left(children)
            else:
                end = sia(tmp_path, *command, **reached(provider))
                assert end.returncode == 0, end.stderr
        assert_whole(tmp_path, run)
        made = calls(tmp_path, run)
        assert_paid_once(author, made)
        # Two attempts, of the first and the last version on the test split, may run at once.
        assert 0 <= len(author.asked) - len(made) <= 2 * (kills - before)
    assert_none_left(children)


def killed(process: subprocess.Popen[str], author: Author, draw: random.Random) -> bool:
    """Kill the command, or all of its process group, at some moment behind some of its calls; False: it was over."""
    last, later, group = len(author.asked) + draw.randint(0, 9), draw.uniform(0, 0.3), draw.random() < 0.5
    while len(author.asked) < last and process.poll() is None:
        waited(process, 0.005)
    if not waited(process, later):
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
    out, talk = process.communicate(timeout=60)
    assert process.returncode in (0, KILLED), talk + out
    return process.returncode == KILLED


def waited(process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether the command ended within so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
