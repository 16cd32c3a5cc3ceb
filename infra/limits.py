"""Holds one tree of processes to its limits: by control groups where they can be written, by watching where not."""

import asyncio
import contextlib
import itertools
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from sia_events.shared.ports import Limits

Hit = Literal["timeout", "cpu", "memory", "processes", "disk"]

CGROUPS = Path("/sys/fs/cgroup")
CONTROLLERS = ("memory", "pids", "cpuacct")
TICK_S = 0.05
# What the kernel spends on an entry whatever its size, so that empty files count too.
ENTRY_BYTES = 4096

serial = itertools.count()


@dataclass
class Tree:
    """The processes of one job and what bounds them; `root` is the ancestor of them all.

    `groups` is a control group for each of CONTROLLERS that can be used; what is missing there is read from procfs
    every TICK_S. `spare` is how many processes of the tree are the box's own.
    """

    root: int
    limits: Limits
    work: Path
    groups: Mapping[str, Path]
    spare: int
    next_scan: float = 0.0

    def bind(self) -> None:
        """Put the root and its child, if it has one, under the limits, and so all they will start.

        They must have started nothing else yet. A child that comes as we look for it is born under the limits; who
        died meanwhile needs none.
        """
        ceiling = str(self.limits.memory_mb << 20)
        settings = {
            "memory.limit_in_bytes": ceiling,
            "memory.memsw.limit_in_bytes": ceiling,
            "memory.max": ceiling,
            "memory.swap.max": "0",
            "memory.oom.group": "1",
            "pids.max": str(self.limits.processes + self.spare),
        }
        groups = set(self.groups.values())
        for group in groups:
            sweep(group.parent)
            group.mkdir()
            for file, value in settings.items():
                if (group / file).exists():
                    (group / file).write_text(value)
        with contextlib.suppress(ProcessLookupError):
            enter(groups, self.root)
            for child in children(self.root) if groups else ():
                enter(groups, child)

    async def watch(self, done: asyncio.Future[int]) -> Hit | None:
        """Wait until `done` or until a limit is passed, and name the limit; kills nothing."""
        deadline = time.monotonic() + self.limits.wall_s
        while True:
            left = deadline - time.monotonic()
            await asyncio.wait({done}, timeout=max(0.0, min(TICK_S, left)))
            hit = self.group_hit() or self.watched_hit() or await self.disk_hit(final=done.done())
            if hit or done.done():
                return hit
            if left <= 0:
                return "timeout"

    def group_hit(self) -> Hit | None:
        """What the control groups' own counters report."""
        if (memory := self.groups.get("memory")) and counter(memory, "memory.oom_control", "memory.events", "oom_kill"):
            return "memory"
        if (pids := self.groups.get("pids")) and counter(pids, "pids.events", "pids.events", "max"):
            return "processes"
        if (cpu := self.groups.get("cpuacct")) and cpu_seconds(cpu) >= self.limits.cpu_s:
            return "cpu"
        return None

    def watched_hit(self) -> Hit | None:
        """What a look at the processes tells about limits that no control group holds."""
        if len(self.groups) == len(CONTROLLERS):
            return None
        memory, tasks, cpu = 0, 0, 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.Error), process.oneshot():
                # Not resident size, which charges a page that forks share to each of them.
                memory += process.memory_full_info().pss
                tasks += process.num_threads()
                cpu += sum(process.cpu_times()[:4])
        if "memory" not in self.groups and memory > self.limits.memory_mb << 20:
            return "memory"
        if "pids" not in self.groups and tasks > self.limits.processes + self.spare:
            return "processes"
        if "cpuacct" not in self.groups and cpu >= self.limits.cpu_s:
            return "cpu"
        return None

    async def disk_hit(self, final: bool) -> Hit | None:
        """Whether the writable folder, deleted files that are still open included, has reached its size."""
        before = time.monotonic()
        if before < self.next_scan and not final:
            return None
        limit = self.limits.file_mb << 20
        used = await asyncio.to_thread(lambda: self.deleted_bytes() + folder_bytes(self.work, limit))
        now = time.monotonic()
        # A folder of many files is read less often: scanning takes a twentieth of one core at most.
        self.next_scan = now + 20 * (now - before)
        return "disk" if used >= limit else None

    def deleted_bytes(self) -> int:
        """Bytes of files on the writable folder's device that have no name any more but are held open."""
        device, found = self.work.stat().st_dev, {}
        for pid in self.members():
            with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as descriptors:
                for descriptor in descriptors:
                    with contextlib.suppress(OSError):
                        info = os.stat(descriptor.path)
                        if info.st_nlink == 0 and info.st_dev == device:
                            found[info.st_ino] = max(info.st_size, info.st_blocks * 512)
        return sum(found.values())

    def members(self) -> list[int]:
        """The ids of the tree's processes, from a control group where it has one: all others are not looked at."""
        for group in self.groups.values():
            with contextlib.suppress(OSError):
                return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
        return [process.pid for process in self.processes()]

    def processes(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.root)
            return [root, *root.children(recursive=True)]
        except psutil.Error:
            return []

    def kill(self) -> None:
        """Kill every process that can be found, the root last: nobody is orphaned out of sight before."""
        for process in reversed(self.processes()):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def close(self) -> None:
        """Have the control groups removed. The kernel takes milliseconds over each, for which nobody waits."""
        for group in set(self.groups.values()):
            asyncio.get_running_loop().run_in_executor(None, remove, group)


def enter(groups: Iterable[Path], pid: int) -> None:
    """Put a process into control groups. Raises ProcessLookupError when it is gone."""
    for group in groups:
        (group / "cgroup.procs").write_text(str(pid))


def children(pid: int) -> list[int]:
    """The processes that it has started. Where the kernel keeps no list of them, all there are are looked through."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child.pid for child in psutil.Process(pid).children()]
        return []


def remove(group: Path) -> None:
    """Remove an empty control group. One that the kernel still counts a dying process in is tried again."""
    for _ in range(100):
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)
        else:
            return


def new_groups(controllers: Mapping[str, Path]) -> Mapping[str, Path]:
    """Names, never used before, for the groups of one tree."""
    name = f"sia-{os.getpid()}-{next(serial)}"
    return {controller: parent / name for controller, parent in controllers.items()}


def find_controllers() -> Mapping[str, Path]:
    """For each controller of CONTROLLERS that this process may use: the group under which it can make its own.

    Version 1: below our own group, so that whatever bounds us bounds the job. Version 2 allows no group beside
    processes, so it is the nearest ancestor that hands memory and pids on and that we may write
    (kernel documentation, cgroup-v2, "No Internal Process Constraint" and "Delegation Containment").
    """
    found: dict[str, Path] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        own = CGROUPS / path.lstrip("/")
        if not names and (CGROUPS / "cgroup.controllers").exists():
            for group in (own, *own.parents):
                if not group.is_relative_to(CGROUPS):
                    break
                control = group / "cgroup.subtree_control"
                handed_on = control.read_text().split() if control.exists() else []
                if {"memory", "pids"} <= set(handed_on) and writable(group) and writable(group / "cgroup.procs"):
                    return dict.fromkeys(CONTROLLERS, group)
        for controller in set(names.split(",")) & set(CONTROLLERS):
            group = CGROUPS / controller / path.lstrip("/")
            if writable(group):
                found[controller] = group
    return found


def describe(controllers: Mapping[str, Path]) -> Mapping[str, str]:
    """By which means each limit is held, for people."""
    watched = f"watched every {TICK_S * 1000:.0f} ms (no writable control group): may be passed for that long"
    return {
        "wall_s": "clock; the whole tree is killed",
        "cpu_s": "control group, whole tree" if "cpuacct" in controllers else f"rlimit a process; tree {watched}",
        "memory_mb": "control group, whole tree" if "memory" in controllers else f"rlimit a process; tree {watched}",
        "processes": "control group" if "pids" in controllers else watched,
        "file_mb": f"rlimit a file; the writable folder watched every {TICK_S * 1000:.0f} ms or, if large, less often",
        "open_files": "rlimit a process",
        "output_bytes": "reader: the rest is drained slowly and dropped",
    }


def folder_bytes(folder: Path, limit: int) -> int:
    """Size of everything below `folder`, following no link; at least `limit` where a part of it cannot be read."""
    total, folders = 0, [str(folder)]
    while folders and total < limit:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    info = entry.stat(follow_symlinks=False)
                    total += ENTRY_BYTES + max(info.st_size, info.st_blocks * 512)
                    if stat.S_ISDIR(info.st_mode):
                        folders.append(entry.path)
                    if total >= limit:
                        break
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            # Shut against us, or nested deeper than a path can say: a way to hide bytes, and no honest need.
            return limit
    return total


def sweep(parent: Path) -> None:
    """Remove groups that an earlier process of ours left when it was killed."""
    for group in parent.glob("sia-*-*"):
        ours = re.fullmatch(r"sia-(\d+)-\d+", group.name, re.ASCII)
        if ours and not psutil.pid_exists(int(ours[1])):
            with contextlib.suppress(OSError):
                group.rmdir()


def counter(group: Path, first: str, second: str, key: str) -> int:
    """Value of `key` in the group's version 1 file or else in its version 2 file; 0 where the kernel has neither."""
    for file in (group / first, group / second):
        with contextlib.suppress(FileNotFoundError):
            return int(dict(line.split() for line in file.read_text().splitlines()).get(key, 0))
    return 0


def cpu_seconds(group: Path) -> float:
    """CPU time that the group's processes used, the dead ones' too."""
    with contextlib.suppress(FileNotFoundError):
        return int((group / "cpuacct.usage").read_text()) / 1e9
    return counter(group, "cpu.stat", "cpu.stat", "usage_usec") / 1e6


def writable(path: Path) -> bool:
    return os.access(path, os.W_OK)
