"""Whatever is killed, wherever: the same command goes on to the same end, and nothing is lost, doubled or left over."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from command import SMALL, assert_none_left, log, read, sia, start

from sia_events.infra.blobs import open_blobs
from sia_events.shared.calls import decode_call
from sia_events.shared.events import ExecutionLogged, RunFinished
from sia_events.shared.record import Record, broken_link

pytestmark = pytest.mark.usefixtures("children")


@pytest.fixture(scope="module")
def undisturbed(task: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    home = tmp_path_factory.mktemp("undisturbed")
    assert sia(home, *command(task)).returncode == 0
    return log(home)


def command(task: Path) -> tuple[object, ...]:
    return ("run", task, "--run", "r1", *SMALL, "--set", "rollout_items=4")


def told(records: Sequence[Record]) -> list[str]:
    """What a run amounts to, without what differs from one run to the next: times, and who answered first."""
    timed = {"type", "seconds", "trajectory"}
    return sorted(f"{r.producer} {r.type} {r.event.model_dump_json(exclude=timed)}" for r in records)


def assert_whole(home: Path, records: Sequence[Record], undisturbed: Sequence[Record]) -> None:
    """Same facts as undisturbed, no gap, no double, no call made twice; and replay agrees."""
    assert [r.position for r in records] == list(range(1, len(records) + 1))
    assert len({r.id for r in records}) == len(records) and broken_link(records) is None
    # Among the facts is how many calls are recorded of each attempt: a call recorded twice would be one more.
    assert told(records) == told(undisturbed)
    for logged in (r.event for r in records if isinstance(r.event, ExecutionLogged)):
        body = asyncio.run(open_blobs(str(home / "blobs")).get(logged.trajectory))
        calls = [decode_call(line) for line in body.splitlines()]
        assert len({(call.digest, call.n) for call in calls}) == len(calls) == logged.calls
    replayed = read(home, "replay", "r1")
    assert not replayed["diverged"] and replayed["records"] == len(records)


def going(task: Path, home: Path, changes: int) -> subprocess.Popen[str]:
    """A run under way that has told of so many changes."""
    process = start(home, *command(task))
    assert process.stderr
    told = [process.stderr.readline() for _ in range(changes)]
    assert all(told), f"it ended with {process.wait()} behind {told}"
    return process


def child_of(process: subprocess.Popen[str], word: str) -> psutil.Process:
    """The child whose command line has `word` in it."""
    for child in psutil.Process(process.pid).children():
        if any(word in part for part in child.cmdline()):
            return child
    raise AssertionError(f"{word} does not run")


def a_moment(seed: int) -> int:
    """After how many of the changes that a run tells of something is to happen; it tells of fourteen."""
    return random.Random(seed).randint(3, 12)


@pytest.mark.parametrize("word", ["nats-server", "chdb_server"])
def test_a_server_that_is_killed_is_started_again_and_the_run_does_not_notice(
    word: str, task: Path, tmp_path: Path, undisturbed: list[Record], children: Callable[[], list[psutil.Process]]
):
    process = going(task, tmp_path, a_moment(len(word)))
    child_of(process, word).kill()
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 0, talk
    assert_whole(tmp_path, log(tmp_path), undisturbed)
    assert_none_left(children)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_whose_whole_process_group_is_killed_goes_on_where_it_was(
    seed: int, task: Path, tmp_path: Path, undisturbed: list[Record], children: Callable[[], list[psutil.Process]]
):
    process = going(task, tmp_path, a_moment(seed))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert_none_left(children)
    resumed = sia(tmp_path, "run", "--resume", "r1")
    assert resumed.returncode == 0, resumed.stderr
    assert_whole(tmp_path, log(tmp_path), undisturbed)


def test_all_of_its_processes_killed_at_once_a_run_goes_on_too(
    task: Path, tmp_path: Path, undisturbed: list[Record], children: Callable[[], list[psutil.Process]]
):
    process = going(task, tmp_path, a_moment(3))
    for each in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
        each.kill()
    process.communicate(timeout=60)
    assert_none_left(children)
    assert sia(tmp_path, *command(task)).returncode == 0
    assert_whole(tmp_path, log(tmp_path), undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_does(
    number: int, task: Path, tmp_path: Path, undisturbed: list[Record], children: Callable[[], list[psutil.Process]]
):
    process = going(task, tmp_path, a_moment(4))
    process.send_signal(number)
    out, talk = process.communicate(timeout=60)
    assert process.returncode == 130 and "sia run --resume r1" in talk and out == ""
    assert_none_left(children)
    assert read(tmp_path, "runs")[0]["status"] == "interrupted"
    assert read(tmp_path, "show", "r1")["status"] == read(tmp_path, "cost", "r1")["status"] == "interrupted"
    assert read(tmp_path, "status")["runs"] == {"interrupted": 1}
    resumed = sia(tmp_path, "run", "--resume", "r1", "--json")
    assert resumed.returncode == 0, resumed.stderr
    records = log(tmp_path)
    assert isinstance(records[-1].event, RunFinished)
    assert_whole(tmp_path, records, undisturbed)


def test_verify_beside_a_run_under_way_answers_for_what_it_saw_and_neither_disturbs_the_other(
    task: Path, tmp_path: Path, undisturbed: list[Record]
):
    process, seen = going(task, tmp_path, 3), []
    process.send_signal(signal.SIGSTOP)  # its servers answer, and the first look is beside a run for certain
    while process.poll() is None:
        done = sia(tmp_path, "verify", "r1", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        seen.append(json.loads(done.stdout))
        process.send_signal(signal.SIGCONT)
    _, talk = process.communicate()
    assert process.returncode == 0, talk
    records = log(tmp_path)
    assert_whole(tmp_path, records, undisturbed)
    assert [each["findings"] for each in seen] == [[]] * len(seen)
    counts = [each["records"] for each in seen]
    assert counts == sorted(counts) and 0 < counts[0] < len(records)


def test_a_log_owner_whose_parent_died_before_it_was_up_ends_at_once(tmp_path: Path):
    """Nobody reads what it says: it must not trip over that on its way out, into the engine's own teardown."""
    said, out = os.pipe()
    os.close(said)
    command = [sys.executable, "-m", "sia_events.infra.chdb_server", "--path", str(tmp_path / "log")]
    owner = subprocess.Popen([*command, "--die-with-parent"], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    os.close(out)
    assert owner.wait(timeout=20) == 2
