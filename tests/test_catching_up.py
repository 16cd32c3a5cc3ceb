"""What the verbs that read show after a kill: everything that was acknowledged, without any service up."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from bus_on import note, notes, on, opened
from command import SMALL, assert_none_left, log, read, sia, start
from store_owner import owner, statement

from sia_events import log_here
from sia_events.app import Node
from sia_events.infra import nats_disk
from sia_events.infra.chdb_engine import UPGRADING
from sia_events.infra.child import ChildFailed
from sia_events.infra.clickhouse import LogUnavailable
from sia_events.infra.memory import MemoryLog
from sia_events.infra.nats_server import running
from sia_events.log_here import COPIED
from sia_events.reading import look
from sia_events.shared.ports import Log
from sia_events.shared.record import Record, broken_link
from sia_events.shared.settings import Settings

NO_SERVER = {"SIA_NATS_SERVER": "/nowhere"}
pytestmark = pytest.mark.usefixtures("children")


@pytest.fixture
def killed(task: Path, tmp_path: Path, children: Callable[[], list[psutil.Process]]) -> Path:
    """A home whose run died the moment it had appended a record, before anybody could copy that."""
    point = "evaluator after publishing on ExecutionLogged"
    died = sia(tmp_path, "run", task, *SMALL, SIA_FAIL_AT=point)
    assert died.returncode == -9, died.stderr
    assert_none_left(children)
    return tmp_path


async def on_the_stream(home: Path) -> Sequence[Record]:
    async with running(home / "nats") as url, on(url) as bus:
        return await bus.history("r1")


def test_behind_a_kill_every_acknowledged_record_is_shown_and_the_next_look_starts_nothing(
    killed: Path, children: Callable[[], list[psutil.Process]]
):
    first = sia(killed, "show", "r1")
    assert first.returncode == 0 and "bringing the log up to date" in first.stderr
    assert_none_left(children)
    shown = log(killed)
    assert (shown[-1].producer, shown[-1].type) == ("evaluator", "Scored") and broken_link(shown) is None
    assert shown == list(asyncio.run(on_the_stream(killed)))
    (row,) = read(killed, "runs")
    assert (row["status"], row["records"]) == ("interrupted", len(shown))
    again = sia(killed, "replay", "r1", **NO_SERVER)
    assert again.returncode == 0 and again.stderr == ""


def test_two_who_look_at_once_see_the_same(killed: Path):
    looks = [start(killed, "log", "r1", "--json") for _ in range(2)]
    (one, _), (other, _) = [look.communicate(timeout=60) for look in looks]
    assert [look.returncode for look in looks] == [0, 0]
    assert one == other and one.count("\n") == len(log(killed))


def test_streams_that_cannot_be_read_are_told_of_and_what_the_log_has_is_shown(killed: Path):
    blind = sia(killed, "runs", **NO_SERVER)
    assert blind.returncode == 0 and "no runs yet" in blind.stdout
    assert f"more may stand in {killed / 'nats'} than the log shows: nats-server is missing" in blind.stderr
    assert [row["run"] for row in read(killed, "runs")] == ["r1"]


@pytest.mark.parametrize("died_over_the_tables", [False, True])
def test_nobody_who_reads_is_in_the_way_of_a_run(killed: Path, died_over_the_tables: bool):
    if died_over_the_tables:
        shutil.rmtree(killed / "log")
        with owner(killed / "log") as running:
            statement(running.dsn, f"CREATE TABLE {UPGRADING} (nothing UInt8) ENGINE = Null")
    looking = start(killed, "runs")
    resumed = sia(killed, "run", "--resume", "r1")
    assert resumed.returncode == 0, resumed.stderr
    looking.communicate(timeout=60)
    assert looking.returncode == 0


def test_a_log_that_was_filled_anew_is_marked_as_whole_again(killed: Path):
    whole = log(killed)
    assert (killed / COPIED).exists()
    before = (killed / COPIED).stat().st_mtime_ns
    filled = sia(killed, "rebuild", "--json")
    assert filled.returncode == 0 and log(killed) == whole
    assert (killed / COPIED).stat().st_mtime_ns > before, "the mark is of the filling, not of before"


async def test_news_shows_on_the_disk_once_acknowledged_and_a_server_that_only_starts_and_ends_makes_none(
    tmp_path: Path,
):
    store, mark = tmp_path / "nats", tmp_path / "mark"
    assert not nats_disk.has_news(store, mark), "no server was ever here"
    async with running(store) as url, on(url) as bus:
        first, *_ = await opened(bus, "r1")
        assert nats_disk.has_news(store, mark), "there is no mark yet"
        nats_disk.keep(nats_disk.sizes(store), mark)
        assert not nats_disk.has_news(store, mark)
        await bus.append("r1", notes("r1", first, "more"))
        assert nats_disk.has_news(store, mark)
        nats_disk.keep(nats_disk.sizes(store), mark)
    for _ in range(2):
        async with running(store) as url, on(url) as bus:
            assert len(await bus.history("r1")) == 2
        assert not nats_disk.has_news(store, mark)
    async with running(store) as url, on(url) as bus:
        await opened(bus, "r2", note("other"))
    assert nats_disk.has_news(store, mark)


async def test_a_look_that_meets_the_logs_owner_on_its_way_out_is_taken_again(tmp_path: Path):
    looks: list[Settings] = []

    @asynccontextmanager
    async def opened(settings: Settings) -> AsyncIterator[Log]:
        looks.append(settings)
        if len(looks) < 3:
            raise LogUnavailable("its door is closed")
        yield MemoryLog()

    assert await look(Settings(home=tmp_path), lambda log: log.runs(), opened) == []
    assert len(looks) == 3
    looks.clear()
    with pytest.raises(LogUnavailable):
        await look(Settings(home=tmp_path, log_dsn="clickhouse://nowhere"), lambda log: log.runs(), opened)
    assert len(looks) == 1, "a server that is away is told of at once"


async def test_a_recorder_that_ends_once_the_run_is_over_is_not_waited_for(tmp_path: Path):
    async def failing() -> None:
        raise ChildFailed("the store is held")

    absent: Any = None
    node = Node(Settings(home=tmp_path), absent, absent, absent, absent)
    node.tasks.append(asyncio.create_task(asyncio.Event().wait(), name="evaluator"))  # pyright: ignore
    await node.stop(but=log_here.NAME)
    assert node.tasks == [], "who was stopped is not taken for one who ended"
    node.tasks.append(asyncio.create_task(failing(), name=log_here.NAME))
    with pytest.raises(ChildFailed, match="the store is held"):
        await node.guard(asyncio.Event().wait())


async def test_a_run_that_nobody_answers_says_so_and_which_command_does(task: Path, tmp_path: Path):
    async with running(tmp_path / "elsewhere") as url:
        process = start(tmp_path / "home", "run", task, *SMALL, SIA_NATS_URL=url)
        said = await asyncio.to_thread(_talk_until, process, "no service has answered")
        assert "record 2 (RunStarted)" in said and "meta_svc" in said and "`sia serve`" in said
        process.terminate()
        await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == 130


def _talk_until(process: "subprocess.Popen[str]", words: str) -> str:
    assert process.stderr
    for line in process.stderr:
        if words in line:
            return line
    raise AssertionError(f"it ended with {process.wait()} and never said {words!r}")
