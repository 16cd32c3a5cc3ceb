"""The time of day is set while a run is under way: nothing is ordered or decided by it."""

import random
import shutil
import struct
import subprocess
from pathlib import Path

import psutil
import pytest
from command import answered, sia, start_anew
from disturbed import assert_as_undisturbed, command, going, log

from sia_events import serving
from sia_events.shared.events import AttemptFailed, RunFinished, Scored
from sia_events.shared.record import Record

DAY = 86400

# What asks the C library for the time of day is told as many seconds more as stand in a file.
CLOCK = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long ahead(void) {
    static volatile long *told;
    if (!told) told = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, open(getenv("CLOCK_AHEAD"), O_RDONLY), 0);
    return *told;
}
int clock_gettime(clockid_t id, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, id, now);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec fine;
    clock_gettime(CLOCK_REALTIME, &fine);
    now->tv_sec = fine.tv_sec, now->tv_usec = fine.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec fine;
    clock_gettime(CLOCK_REALTIME, &fine);
    if (now) *now = fine.tv_sec;
    return fine.tv_sec;
}
"""


class Clock:
    """A clock that may be set; `environment` has a process go by it."""

    def __init__(self, folder: Path) -> None:
        (folder / "clock.c").write_text(CLOCK)
        build = ["cc", "-shared", "-fPIC", "-O1", "-o", str(folder / "clock.so"), str(folder / "clock.c")]
        subprocess.run(build, check=True, capture_output=True)
        self._file = folder / "ahead"
        self._file.write_bytes(struct.pack("l", 0))
        self.environment = {"LD_PRELOAD": str(folder / "clock.so"), "CLOCK_AHEAD": str(self._file)}

    def set(self, seconds: int) -> None:
        with self._file.open("r+b") as file:
            file.write(struct.pack("l", seconds))


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    if shutil.which("cc") is None:
        pytest.skip("a clock that may be set takes a C compiler")
    return Clock(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(task: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    home = tmp_path_factory.mktemp("undisturbed")
    assert sia(home, *command(task)).returncode == 0
    return log(home)


def test_set_back_again_and_again_it_changes_nothing(
    clock: Clock, task: Path, tmp_path: Path, undisturbed: list[Record]
):
    home = tmp_path / "home"
    process = going(task, home, 1, start_anew, **clock.environment)
    assert process.stderr
    for days in range(1, 6):
        assert process.stderr.readline()
        clock.set(-days * DAY)
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 0, talk
    times = [record.time for record in log(home)]
    assert (max(times) - min(times)).days >= 4
    assert_as_undisturbed(home, undisturbed)


@pytest.mark.slow  # a second run, with tries that are waited for
def test_set_forward_under_an_agent_it_costs_a_try_at_most(
    clock: Clock, task: Path, tmp_path: Path, undisturbed: list[Record]
):
    """Its token ends by the clock, as it does while a machine sleeps: that is nobody's verdict."""
    home, rng = tmp_path / "home", random.Random(1)
    process = going(task, home, 1, start_anew, **clock.environment)
    assert process.stderr
    for days in range(1, 4):
        for _ in range(rng.randint(1, 3)):
            assert process.stderr.readline()
        clock.set(days * DAY)
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 0, talk
    records = log(home)
    failed = [record.event for record in records if isinstance(record.event, AttemptFailed)]
    assert {event.kind for event in failed} <= {"infrastructure"} and len(failed) <= 3
    scores = [[(e.version, e.split, e.items) for e in sorted_scores(each)] for each in (records, undisturbed)]
    assert scores[0] == scores[1] and isinstance(records[-1].event, RunFinished)
    assert answered(home, "verify", "--all")["left"] == [] and not answered(home, "replay", "r1")["diverged"]


def sorted_scores(records: list[Record]) -> list[Scored]:
    found = [record.event for record in records if isinstance(record.event, Scored)]
    return sorted(found, key=lambda each: (each.version, each.split))


def test_services_in_the_background_are_found_by_down_whatever_the_time_of_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    process = psutil.Process()
    born, before = serving.born(process), process.create_time()
    # The kernel tells when the machine began by the time of day; when a process did, by how long after that.
    (tmp_path / str(process.pid)).symlink_to(f"/proc/{process.pid}")
    stat = Path("/proc/stat").read_text().splitlines()
    earlier = f"btime {psutil.boot_time() - DAY:.0f}"
    (tmp_path / "stat").write_text("\n".join(earlier if line.startswith("btime") else line for line in stat))
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    again = psutil.Process(process.pid)
    assert again.create_time() == before - DAY
    assert serving.born(again) == born
