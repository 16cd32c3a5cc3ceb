"""A disk is full, or slow, under a run: what was acknowledged stays, and with room again the run goes on to its end."""

import shutil
import subprocess
from itertools import takewhile
from pathlib import Path

import pytest
from command import answered, sia
from disturbed import assert_as_undisturbed, child_of, command, going, log
from small_disk import fill, small_disk

from sia_events.shared.events import RunFinished, Scored, VersionAccepted, VersionRejected
from sia_events.shared.record import Record, broken_link


@pytest.fixture(scope="module")
def undisturbed(task: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    home = tmp_path_factory.mktemp("undisturbed")
    assert sia(home, *command(task)).returncode == 0
    return log(home)


def ends(records: list[Record]) -> list[str]:
    """Verdicts and scores, and how it ended: an attempt that met the full disk may be one more, and counts for none."""
    told = Scored | VersionAccepted | VersionRejected | RunFinished
    return sorted(
        record.event.model_dump_json(exclude={"attempt"}) for record in records if isinstance(record.event, told)
    )


@pytest.mark.slow  # the bus is waited for, a minute long
def test_a_run_whose_stream_has_no_room_says_so_and_goes_on_when_there_is(
    task: Path, tmp_path: Path, undisturbed: list[Record]
):
    (tmp_path / "nats").mkdir()
    with small_disk(tmp_path / "nats", megabytes=100):
        process = going(task, tmp_path, 3)
        filler = fill(tmp_path / "nats")
        _, talk = process.communicate(timeout=200)
        assert process.returncode == 2 and "What it acknowledged is kept" in talk, talk
        filler.unlink()
        again = sia(tmp_path, "run", "--resume", "r1")
        assert again.returncode == 0, again.stderr
        assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.slow  # a record waits for half a minute and more between two tries
def test_a_run_whose_home_has_no_room_at_all_waits_and_goes_on_when_there_is(
    task: Path, tmp_path: Path, undisturbed: list[Record]
):
    """Stream, tables and blobs lie on one disk, as they do unless somebody set it otherwise; it is full when the first
    tables are being made."""
    home = tmp_path / "home"
    home.mkdir()
    with small_disk(home, megabytes=200):
        process = going(task, home, 3)
        filler = fill(home)
        assert process.stderr
        said = iter(process.stderr.readline, "")
        waits, full = "a record waits: a disk is full", "the event log is full"
        seen = list(takewhile(lambda line: waits not in line, said))
        if not any(full in line for line in seen):
            seen += takewhile(lambda line: full not in line, said)
        assert process.poll() is None, seen
        filler.unlink()
        _, talk = process.communicate(timeout=200)
        assert process.returncode == 0, talk
        assert "Traceback" not in talk and "gave up" not in talk
        records = log(home)
        assert ends(records) == ends(undisturbed) and broken_link(records) is None
        assert answered(home, "verify", "--all", "--repair")["left"] == []
        assert not answered(home, "replay", "r1")["diverged"]


@pytest.mark.slow  # a whole run, and what it left is verified
def test_a_run_whose_log_has_no_room_says_so_and_goes_on_and_the_log_has_it_all_when_there_is(
    task: Path, tmp_path: Path, undisturbed: list[Record]
):
    """The tables are there before; what was merged just then may be damaged, and is filled anew from the stream."""
    (tmp_path / "log").mkdir()
    with small_disk(tmp_path / "log", megabytes=100):
        assert answered(tmp_path, "runs") == []
        process = going(task, tmp_path, 3)
        filler = fill(tmp_path / "log")
        assert process.stderr
        for line in process.stderr:
            if "the disk under the event log is full" in line:
                break
        assert process.poll() is None, "the run goes on"
        filler.unlink()
        _, talk = process.communicate(timeout=200)
        assert process.returncode == 0, talk
        assert answered(tmp_path, "verify", "--all", "--repair")["left"] == []
        assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.slow  # the disk is
@pytest.mark.skipif(shutil.which("strace") is None, reason="a slow disk takes strace")
def test_a_run_on_a_slow_disk_takes_longer_and_comes_to_the_same_end(
    task: Path, tmp_path: Path, undisturbed: list[Record]
):
    """Every sync of the stream's server takes 0.2 s more."""
    process = going(task, tmp_path, 1)
    slow = ("-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:delay_exit=200000")
    server = str(child_of(process.pid, "nats-server").pid)
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", tmp_path / "syncs", *slow, "-p", server])
    try:
        _, talk = process.communicate(timeout=200)
    finally:
        tracer.terminate()
        tracer.wait()
    assert process.returncode == 0, talk
    assert (tmp_path / "syncs").read_text().count("sync(") > 20
    assert_as_undisturbed(tmp_path, undisturbed)
