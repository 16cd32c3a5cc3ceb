"""Control groups are gone with their job; those of a run that was killed go when the next job begins."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import command
import psutil
import pytest
from bus_on import until
from test_sandbox import BOTH, daemon, pytestmark, python, rung

from sia_events.infra.box import PYTHON, RELAY
from sia_events.infra.limits import Tree, children, find_controllers, new_groups, remove
from sia_events.shared.ports import Limits, Sandbox

__all__ = ["pytestmark"]

CONTROLLERS = find_controllers()
GROUPS = pytest.mark.skipif(not CONTROLLERS, reason="this machine has no control group that can be written")
PLATFORM = """
import asyncio
from pathlib import Path, PosixPath
from sia_events.infra.sandbox import Bubblewrap, UnsafeProcess
from sia_events.shared.ports import Job, Limits
asyncio.run({box}().run({job!r}))
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (folder := tmp_path / "work").mkdir()
    return folder


def holds_a_process(group: Path) -> bool:
    # Whoever begins a job on this machine may have removed it meanwhile.
    with suppress(OSError):
        return bool((group / "cgroup.procs").read_text())
    return False


def groups_of(pid: int) -> list[Path]:
    return [group for parent in set(CONTROLLERS.values()) for group in parent.glob(f"sia-{pid}-*")]


@GROUPS
@BOTH
async def test_what_a_killed_run_leaves_of_its_groups_is_gone_when_the_next_job_begins(
    box: Sandbox, work: Path, bell: socket.socket, tmp_path: Path
):
    job = daemon(work, bell, box, "time.sleep(1000)")
    code = PLATFORM.format(box=type(box).__name__, job=job)
    platform = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    with await rung(bell) as connection:
        left = groups_of(platform.pid)
        assert left, "a job runs in groups of its own"
        platform.kill()
        assert await asyncio.to_thread(connection.recv, 1) == b""
    await platform.wait()
    await until(lambda: not any(map(holds_a_process, left)))
    (other := tmp_path / "other/work").mkdir(parents=True)
    assert (await box.run(python(other, "pass"))).status == "ok"
    assert not groups_of(platform.pid)


@GROUPS
@BOTH
async def test_a_jobs_processes_and_those_the_platform_adds_are_in_its_groups(
    box: Sandbox, work: Path, bell: socket.socket
):
    running = asyncio.create_task(box.run(daemon(work, bell, box, "time.sleep(1000)")))
    with await rung(bell):
        groups = [group for group in groups_of(os.getpid()) if holds_a_process(group)]
        assert len(groups) == len(set(CONTROLLERS.values()))
        for group in groups:
            commands = [psutil.Process(int(pid)).cmdline() for pid in (group / "cgroup.procs").read_text().split()]
            assert any("gate=" in word for command in commands for word in command), "the relay"
            assert any(command[1:2] and command[1].endswith("target_agent.py") for command in commands), "the job"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@GROUPS
async def test_a_child_that_is_there_before_its_tree_is_bound_is_bound_with_it(work: Path):
    root = await asyncio.create_subprocess_exec("sh", "-c", "sleep 1000 & echo; wait", stdout=subprocess.PIPE)
    assert root.stdout and await root.stdout.readline() == b"\n"
    (child,) = children(root.pid)
    tree = Tree(root.pid, Limits(), work, new_groups(CONTROLLERS), spare=2)
    tree.bind()
    for group in set(tree.groups.values()):
        assert {int(pid) for pid in (group / "cgroup.procs").read_text().split()} == {root.pid, child}
    tree.kill()
    await root.wait()
    tree.close()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert not any(group.exists() for group in tree.groups.values())


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[bytes], int]]]:
    """Starts a relay for a shell's line, and gives its gate."""
    gate, ours = os.pipe()
    lost, told = os.pipe()

    def start(line: str) -> tuple[subprocess.Popen[bytes], int]:
        words = (f"gate={gate}", f"lost={told}", "--", "sh", "-c", line)
        relay = subprocess.Popen((PYTHON, "-I", "-S", RELAY, *words), pass_fds=(gate, told), cwd=tmp_path)
        return relay, ours

    yield start
    for descriptor in (gate, lost, told):
        os.close(descriptor)


def test_a_job_starts_when_its_gate_is_opened(started: Callable[[str], tuple[subprocess.Popen[bytes], int]]):
    relay, gate = started("exit 3")
    os.write(gate, b"1")
    assert relay.wait(20) == 3
    os.close(gate)


def test_a_job_whose_gate_closes_is_not_started(
    tmp_path: Path, started: Callable[[str], tuple[subprocess.Popen[bytes], int]]
):
    relay, gate = started("touch started")
    os.close(gate)
    assert relay.wait(20) == 1 and not (tmp_path / "started").exists()


def test_a_job_whose_gate_closes_behind_its_start_is_ended(
    tmp_path: Path, started: Callable[[str], tuple[subprocess.Popen[bytes], int]]
):
    relay, gate = started("mkfifo there; echo > there; sleep 1000")
    os.write(gate, b"1")
    command.until((tmp_path / "there").exists)
    (tmp_path / "there").read_bytes()
    os.close(gate)
    assert relay.wait(20) == 128 + signal.SIGKILL


@GROUPS
def test_a_command_that_ends_has_waited_for_its_groups_to_be_removed(work: Path):
    job = python(work, "pass")
    code = PLATFORM.format(box="UnsafeProcess", job=job) + "import os; print(os.getpid())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not groups_of(int(done.stdout))


@GROUPS
def test_a_group_that_still_holds_a_process_is_tried_until_it_is_empty():
    group = next(iter(new_groups(CONTROLLERS).values()))
    group.mkdir()
    with subprocess.Popen(["sleep", "1000"]) as holder:
        (group / "cgroup.procs").write_text(str(holder.pid))
        with pytest.raises(OSError):
            group.rmdir()
        removing = threading.Thread(target=remove, args=(group,))
        removing.start()
        holder.kill()
    removing.join(20)
    assert not group.exists()


# --- on folders that stand in for control groups, wherever this runs --------------------------------------------------


async def test_the_groups_of_a_tree_are_made_with_its_limits_and_removed_behind_it(tmp_path: Path):
    dead = tmp_path / "sia-999999999-0"
    dead.mkdir()
    groups = new_groups({"memory": tmp_path, "pids": tmp_path})
    root = await asyncio.create_subprocess_exec("sleep", "1000")
    tree = Tree(root.pid, Limits(), tmp_path, groups, spare=1)
    tree.bind()
    root.kill()
    await root.wait()
    (group,) = set(groups.values())
    assert not dead.exists() and (group / "cgroup.procs").read_text() == str(root.pid)
    # The kernel's files go with their group; those of a folder do not.
    (group / "cgroup.procs").unlink()
    tree.close()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert not group.exists()
