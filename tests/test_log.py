"""The Log port's contract on memory, on chDB in this process and on its owner; then what only ClickHouse does."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from store_owner import owner, statement, tables
from urllib3.connectionpool import HTTPConnectionPool

from sia_events.infra import chdb_engine, clickhouse, room
from sia_events.infra.chdb_engine import UPGRADING
from sia_events.infra.clickhouse import (
    ClickHouseLog,
    LogFull,
    LogUnavailable,
    QueryRefused,
    StoreTooNew,
    StoreUnsafe,
    connect,
    migrations,
)
from sia_events.infra.memory import MemoryLog
from sia_events.infra.nats_server import free_port
from sia_events.infra.store_lock import StoreHeld
from sia_events.shared.calls import ModelCall, encode_call
from sia_events.shared.events import (
    AgentProposed,
    Budget,
    BudgetChanged,
    BudgetExhausted,
    Estimate,
    Event,
    HarnessPatched,
    RunBranched,
    RunCancelled,
    RunFinished,
    RunPaused,
    RunResumed,
    RunSettings,
    RunStarted,
    Scored,
    TaskRegistered,
    VersionAccepted,
    VersionRejected,
    Weights,
)
from sia_events.shared.ports import Envelope, Log
from sia_events.shared.record import GENESIS, Record, opening, place
from sia_events.shared.run import fold

START = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
HARNESS = "a" * 64
WEIGHTS = Weights(model="tiny")
VERSIONS = "CREATE TABLE schema_version (version UInt32) ENGINE = ReplacingMergeTree ORDER BY version"
VIEWS = ("lineage", "scores", "costs", "runs", "ancestors")


def records(run: str, events: Sequence[Event], start: datetime = START) -> list[Record]:
    """The events as the opening records of a run, a second apart."""
    placed: list[Record] = []
    for i, draft in enumerate(opening(run, events)):
        chain = placed[-1].chain if placed else GENESIS
        placed.append(place(draft, run, i + 1, chain, start + timedelta(seconds=i)))
    return placed


def branched(run: str, at: int, events: Sequence[Event]) -> list[Record]:
    """The events as the opening records of a branch that leaves its parent behind position `at`."""
    return [place(draft, run, at + i, GENESIS, START) for i, draft in enumerate(opening(run, events), start=1)]


def resumed(count: int) -> list[Event]:
    return [RunResumed(reason=f"{i}: 'quoted' \\ \t\n; é \U0001f642") for i in range(count)]


def call(name: str, **fields: object) -> bytes:
    known = {"call": name, "attempt": "a1", "version": "v1", "kind": "chat", "model": "tiny", "digest": "d", "n": 0}
    return encode_call(ModelCall(**{**known, "seed": 0, "request": {}, **fields}))  # pyright: ignore[reportArgumentType]


@contextmanager
def closing(log: ClickHouseLog) -> Iterator[ClickHouseLog]:
    try:
        yield log
    finally:
        asyncio.run(log.close())


def empty_files(folder: Path) -> None:
    for file in folder.iterdir():
        os.truncate(file, 0)


@pytest.fixture(params=["memory", "chdb", "chdb owner"])
async def log(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Log]:
    with ExitStack() as stack:
        if request.param == "memory":
            opened: Log = MemoryLog()
        elif request.param == "chdb":
            opened = connect(f"chdb://{tmp_path}/log")
        else:
            opened = connect(stack.enter_context(owner(tmp_path / "log")).dsn)
        yield opened
        await opened.close()


@pytest.fixture
async def embedded(tmp_path: Path) -> AsyncIterator[ClickHouseLog]:
    opened = connect(f"chdb://{tmp_path}/log")
    yield opened
    await opened.close()


async def test_records_come_back_as_they_were_whatever_order_they_arrive_in(log: Log):
    written = records("r1", resumed(30))
    await log.append(written[20:], "second")
    await log.append(written[:20], "first")
    assert list(await log.records("r1")) == written


async def test_a_batch_sent_again_adds_nothing(log: Log):
    written = records("r1", resumed(10))
    for token in ("t", "t", "another token for the same batch"):
        await log.append(written, token)
    assert list(await log.records("r1")) == written


async def test_a_run_has_its_own_records_only_and_an_unknown_one_has_none(log: Log):
    await log.append(records("r1", resumed(3)) + records("r2", resumed(2)), "t")
    assert [record.run for record in await log.records("r2")] == ["r2", "r2"]
    assert list(await log.records("r3")) == []


async def test_runs_are_listed_by_their_first_record(log: Log):
    await log.append(records("late", resumed(1), START + timedelta(days=1)), "1")
    await log.append(records("early", resumed(1)), "2")
    assert list(await log.runs()) == ["early", "late"]


async def test_a_cleared_log_takes_the_same_batches_again(log: Log):
    written = records("r1", resumed(5))
    traces = [(1, Envelope("r1", "log", "k", (b'{"a":1}',)))]
    await log.append(written, "t")
    await log.append_traces(traces, "t")
    await log.clear()
    assert list(await log.runs()) == []
    await log.append(written, "t")
    await log.append_traces(traces, "t")
    assert list(await log.records("r1")) == written


async def test_empty_batches_are_nothing(log: Log):
    await log.append([], "t")
    await log.append_traces([], "t")
    assert list(await log.runs()) == []


async def test_many_writers_and_readers_at_once_lose_nothing(log: Log):
    written = {f"r{i}": records(f"r{i}", resumed(20)) for i in range(8)}
    await asyncio.gather(*(log.append(batch, run) for run, batch in written.items()), *(log.runs() for _ in range(8)))
    for run, batch in written.items():
        assert list(await log.records(run)) == batch


async def test_the_columns_are_read_from_the_record(embedded: ClickHouseLog):
    first, second = records(
        "r1", [AgentProposed(version="v1", candidate=0, harness=HARNESS, weights=WEIGHTS, reason="x")] * 2
    )
    await embedded.append([first, second], "t")
    rows = await embedded.query("SELECT *, chain FROM events ORDER BY position")
    for row, record in zip(rows, (first, second), strict=True):
        for column in ("run", "position", "id", "type", "producer", "cause", "correlation", "time", "schema", "chain"):
            assert row[column] == getattr(record, column), column
        assert row["version"] == "v1"


async def test_model_calls_and_trace_lines_become_rows_once(embedded: ClickHouseLog):
    calls = Envelope(
        "r1", "model_call", "a1", (call("c1", prompt_tokens=5, usd=0.5, time="2026-01-02T03:04:05Z"), call("c2"))
    )
    steps = Envelope("r1", "step", "a1", (b'{"time":"not a time"}', b"not JSON at all \xff"))
    for token in ("t", "t", "u"):
        await embedded.append_traces([(7, calls), (8, steps)], token)
    rows = await embedded.query("SELECT *, call FROM model_calls FINAL ORDER BY sequence, line")
    assert [(r["sequence"], r["line"], r["call"], r["role"], r["attempt"]) for r in rows] == [
        (7, 0, "c1", "target", "a1"),
        (7, 1, "c2", "target", "a1"),
    ]
    assert rows[0]["time"] == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert (await embedded.query("SELECT count() AS n FROM trace FINAL"))[0]["n"] == 2
    costs = await embedded.query("SELECT calls, prompt_tokens, usd FROM costs WHERE run = {run:String}", {"run": "r1"})
    assert costs == [{"calls": 2, "prompt_tokens": 5, "usd": 0.5}]


async def test_the_views_tell_lineage_scores_and_state(embedded: ClickHouseLog):
    score = Estimate(value=0.5, low=0.4, high=0.6, n=100)
    events: list[Event] = [
        AgentProposed(version="v0", candidate=0, harness=HARNESS, weights=WEIGHTS, reason="first"),
        VersionAccepted(version="v0", over=None, comparison=None, reason="first"),
        HarnessPatched(
            version="v1",
            generation=1,
            candidate=0,
            parent="v0",
            harness=HARNESS,
            weights=WEIGHTS,
            edits=("votes",),
            reason="x",
        ),
        Scored(attempt="a", version="v1", split="dev", score=score, items=(0.5,), failures={}, skew=0.1),
        VersionRejected(version="v1", over="v0", comparison=None, reason="no gain"),
        RunFinished(outcome="no proven gain", best="v0", sealed=None, reason="done"),
    ]
    await embedded.append(records("r1", events), "t")
    lineage = await embedded.query("SELECT generation, version, parent, lever, verdict FROM lineage ORDER BY position")
    assert [tuple(row.values()) for row in lineage] == [
        (0, "v0", "", "first", "accepted"),
        (1, "v1", "v0", "harness", "rejected"),
    ]
    scores = await embedded.query("SELECT generation, version, lever, split, value, low, high, n FROM scores")
    assert [tuple(row.values()) for row in scores] == [(1, "v1", "harness", "dev", 0.5, 0.4, 0.6, 100)]
    runs = await embedded.query("SELECT run, status, generations, best, records FROM runs")
    assert [tuple(row.values()) for row in runs] == [("r1", "finished", 1, "v0", 6)]


async def test_the_views_tell_of_a_branch_with_what_its_parents_came_to(embedded: ClickHouseLog):
    score = Estimate(value=0.5, low=0.4, high=0.6, n=100)
    task = TaskRegistered(
        task="words",
        title="Words",
        metric="accuracy",
        maximize=True,
        spec=HARNESS,
        datasets={},
        answers=HARNESS,
        reference=HARNESS,
        sizes={},
        floor=None,
    )
    parents: list[Event] = [
        task,
        AgentProposed(version="g0a", candidate=0, harness=HARNESS, weights=WEIGHTS, reason="first"),
        VersionAccepted(version="g0a", over=None, comparison=None, reason="first"),
        HarnessPatched(
            version="g1a",
            generation=1,
            candidate=0,
            parent="g0a",
            harness=HARNESS,
            weights=WEIGHTS,
            edits=(),
            reason="x",
        ),
        VersionRejected(version="g1a", over="g0a", comparison=None, reason="behind the fork"),
    ]
    await embedded.append(records("r1", parents), "t")
    judged = [
        Scored(attempt="a", version=name, split="gate", score=score, items=(0.5,), failures={}, skew=0.1)
        for name in ("g0a", "g1a")
    ]
    accepted = VersionAccepted(version="g1a", over="g0a", comparison=None, reason="here")
    for run, parent, at, told in (
        ("b1", "r1", 4, judged),
        ("b2", "b1", 5, [*judged, accepted]),
        ("b3", "r1", 3, judged),
    ):
        fork = RunBranched(parent=parent, at=at, generation=0, overrides={}, settings=RunSettings(), code="test")
        await embedded.append(branched(run, at, [fork, *told]), run)
    scores = await embedded.query("SELECT run, version, generation, lever, verdict FROM scores ORDER BY run, version")
    assert [tuple(row.values()) for row in scores] == [
        ("b1", "g0a", 0, "first", "accepted"),
        ("b1", "g1a", 1, "harness", "open"),
        ("b2", "g0a", 0, "first", "accepted"),
        ("b2", "g1a", 1, "harness", "accepted"),
        ("b3", "g0a", 0, "first", "accepted"),
        ("b3", "g1a", 0, "", "open"),
    ]
    runs = await embedded.query("SELECT run, task, parent, status, generations, best FROM runs ORDER BY run")
    assert [tuple(row.values()) for row in runs] == [
        ("b1", "words", "r1", "running", 1, "g0a"),
        ("b2", "words", "b1", "running", 1, "g1a"),
        ("b3", "words", "r1", "running", 0, "g0a"),
        ("r1", "words", "", "running", 1, "g0a"),
    ]


async def test_the_views_put_up_with_runs_that_descend_from_themselves(embedded: ClickHouseLog):
    for run, parent in (("a", "b"), ("b", "a")):
        fork = RunBranched(parent=parent, at=1, generation=0, overrides={}, settings=RunSettings(), code="forged")
        await embedded.append(branched(run, 1, [fork]), run)
    assert [row["run"] for row in await embedded.query("SELECT run FROM runs ORDER BY run")] == ["a", "b"]


@pytest.mark.parametrize(
    "sql", ["DROP TABLE events", "INSERT INTO trace (run) VALUES ('x')", "SELEC", "SET readonly = 0"]
)
async def test_a_query_only_reads(embedded: ClickHouseLog, sql: str):
    with pytest.raises(QueryRefused):
        await embedded.query(sql)


async def test_what_was_appended_is_there_after_reopening(tmp_path: Path):
    written = records("r1", resumed(10))
    for _ in range(2):
        log = connect(f"chdb://{tmp_path}/log")
        await log.append(written, "t")
        await log.close()
    log = connect(f"chdb://{tmp_path}/log")
    assert (await log.query("SELECT count() AS n FROM events"))[0]["n"] == 10
    await log.close()


async def test_another_process_is_answered_through_the_owner(tmp_path: Path):
    with owner(tmp_path / "log") as running:
        log = connect(running.dsn)
        await log.append(records("r1", resumed(1)), "t")
        await log.close()
        code = f"import asyncio; from sia_events.infra.clickhouse import connect; print(asyncio.run(connect('chdb://{tmp_path}/log').runs()))"
        other = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True)
    assert other.stdout.strip() == "['r1']", other.stderr


async def test_a_store_held_by_a_process_that_takes_no_questions_names_it(embedded: ClickHouseLog, tmp_path: Path):
    code = f"from sia_events.infra.clickhouse import connect; connect('chdb://{tmp_path}/log')"
    other = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True)
    assert "StoreHeld" in other.stderr and f"process {os.getpid()}" in other.stderr
    with pytest.raises(StoreHeld):
        connect(f"chdb://{tmp_path}/log")


async def test_the_status_of_a_run_is_that_of_its_fold(embedded: ClickHouseLog):
    spent = BudgetExhausted(limit="calls", allowed=1, spent=1)
    more, held, on = BudgetChanged(budget=Budget()), RunPaused(reason="a person"), RunResumed(reason="a person")
    told: list[list[Event]] = [
        [],
        [spent],
        [spent, more],
        [spent, on],
        [held, more],
        [held, on],
        [spent, RunCancelled(reason="a person")],
    ]
    said = {"finished": "finished", "cancelled": "cancelled", "running": "running"}
    for number, events in enumerate(told):
        history = records(f"r{number}", [RunStarted(settings=RunSettings(), code="test"), *events])
        await embedded.append(history, f"t{number}")
        state = fold(history)
        held_by = "stopped by budget" if state.exhausted and not state.paused else "paused"
        sql = "SELECT status FROM runs WHERE run = {run:String}"
        (row,) = await embedded.query(sql, {"run": f"r{number}"})
        assert row["status"] == said.get(state.status, held_by), events


async def test_a_store_of_a_newer_schema_is_left_alone(tmp_path: Path):
    with owner(tmp_path / "log") as running:
        log = connect(running.dsn)
        await log.close()
        statement(running.dsn, "INSERT INTO schema_version (version) VALUES (99)")
        with pytest.raises(StoreTooNew, match=r"schema 99; this release knows schemas up to \d+"):
            connect(running.dsn)


@pytest.mark.parametrize("found", ["nothing", "the first schema"])
def test_several_may_open_a_store_at_once(tmp_path: Path, found: str):
    many = 6
    together = Barrier(many)

    def look(dsn: str) -> list[int]:
        together.wait(60)
        with closing(connect(dsn)) as log:
            return [asyncio.run(log.query(f"SELECT count() AS n FROM {view}"))[0]["n"] for view in VIEWS]

    with owner(tmp_path / "log") as running, ThreadPoolExecutor(many) as pool:
        for _ in range(3):
            if found == "the first schema":
                for sql in (*migrations()[0][1], VERSIONS, "INSERT INTO schema_version VALUES (1)"):
                    statement(running.dsn, sql)
            assert list(pool.map(look, [running.dsn] * many)) == [[0] * len(VIEWS)] * many
            with closing(connect(running.dsn)) as log:
                [last] = asyncio.run(log.query("SELECT max(version) AS version, count() AS n FROM schema_version"))
                [table] = asyncio.run(log.query("SHOW CREATE TABLE events"))
            assert last["version"] == last["n"] == len(migrations()), "each migration is applied by one of them"
            assert "old_parts_lifetime = 0" in table["statement"]
            for name in (*VIEWS, "events", "model_calls", "trace", "schema_version"):
                statement(running.dsn, f"DROP TABLE {name}")


def test_a_migration_that_was_begun_by_somebody_who_died_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clickhouse, "UPGRADE_S", 0.0)
    with owner(tmp_path / "log") as running:
        statement(running.dsn, "CREATE TABLE upgrading (nothing UInt8) ENGINE = Null")
        with closing(connect(running.dsn)) as log:
            assert asyncio.run(log.query("SELECT count() AS n FROM costs"))[0]["n"] == 0
            assert not asyncio.run(log.query("SHOW TABLES LIKE 'upgrading'"))


def test_a_migration_that_died_in_the_embedded_store_is_waited_for_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(clickhouse, "UPGRADE_S", 3600.0)

    def begun() -> None:
        with owner(tmp_path / "log") as running:
            statement(running.dsn, f"CREATE TABLE {UPGRADING} (nothing UInt8) ENGINE = Null")

    begun()
    with owner(tmp_path / "log") as running, closing(connect(running.dsn)) as log:
        assert asyncio.run(log.runs()) == []
    shutil.rmtree(tmp_path / "log")
    begun()
    with closing(connect(f"chdb://{tmp_path}/log")) as log:
        assert asyncio.run(log.runs()) == []


async def test_a_table_without_its_durability_is_refused(tmp_path: Path):
    with owner(tmp_path / "log") as running:
        log = connect(running.dsn)
        await log.close()
        statement(running.dsn, "ALTER TABLE events MODIFY SETTING fsync_after_insert = 0")
        with pytest.raises(StoreUnsafe, match="fsync_after_insert"):
            connect(running.dsn)


async def test_a_torn_part_is_set_aside_and_the_rest_is_there(tmp_path: Path):
    whole, torn = records("whole", resumed(3)), records("torn", resumed(3))
    log = connect(f"chdb://{tmp_path}/log")
    await log.append(whole, "1")
    await log.append(torn, "2")
    [part] = await log.query("SELECT path FROM system.parts WHERE table = 'events' AND active AND min_block_number = 2")
    await log.close()
    empty_files(Path(part["path"]))
    log = connect(f"chdb://{tmp_path}/log")
    assert list(await log.records("whole")) == whole
    assert list(await log.runs()) == ["whole"]
    await log.close()


async def test_a_log_whose_owner_goes_at_any_point_of_its_opening_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked, gone_at, ask = 0, -1, HTTPConnectionPool.urlopen

    def counted(pool: HTTPConnectionPool, *request: Any, **more: Any) -> Any:
        nonlocal asked
        asked += 1
        nobody = HTTPConnectionPool("127.0.0.1", free_port())
        return ask(nobody if asked > gone_at >= 0 else pool, *request, **more)

    with owner(tmp_path / "log") as running:
        await connect(running.dsn).close()
        monkeypatch.setattr(HTTPConnectionPool, "urlopen", counted)
        await connect(running.dsn).close()
        questions = asked
        assert questions > 5
        told = []
        for at in range(questions):
            asked, gone_at = 0, at
            with suppress(LogUnavailable):
                await connect(running.dsn).close()
                continue
            told.append(at)
        assert told == [*range(questions - 1)], "the driver can do without an answer to its last question"


async def test_a_log_whose_owner_was_killed_says_so_and_goes_on_with_the_next_owner(tmp_path: Path):
    first, second = records("r1", resumed(3)), records("r2", resumed(3))
    with owner(tmp_path / "log") as running:
        log = connect(running.dsn)
        await log.append(first, "1")
    with pytest.raises(LogUnavailable):
        await log.append(second, "2")
    with owner(tmp_path / "log"):
        await log.append(second, "2")
        assert [list(await log.records(run)) for run in ("r1", "r2")] == [first, second]
        await log.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


async def test_a_full_disk_is_named_and_what_was_acknowledged_stays(small_disk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "MIN_FREE", 1 << 20)
    log = connect(f"chdb://{small_disk}/log")
    acknowledged = 0
    with pytest.raises(LogFull, match="disk under the event log is full"):
        for batch in range(1000):
            noise = [RunResumed(reason=os.urandom(500).hex()) for _ in range(200)]
            await log.append(records(f"r{batch}", noise), f"t{batch}")
            acknowledged += 200
    assert (await log.query("SELECT count() AS n FROM events"))[0]["n"] == acknowledged > 0
    await log.close()


async def test_without_room_no_store_is_made_and_no_table_and_with_room_again_both_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An engine that runs out of room over a table leaves an empty definition, and opens the store no more."""
    path = tmp_path / "log"
    with monkeypatch.context() as full:
        full.setattr(room, "MIN_FREE", 1 << 60)
        with pytest.raises(LogFull, match=f"the disk of {path} is full"):
            connect(f"chdb://{path}")
        with pytest.raises(chdb_engine.Failure, match=f"the disk of {path} is full"):
            chdb_engine.Engine(path, tmp_path / "spool").open()
        assert not path.exists()
    with owner(path) as running:
        with monkeypatch.context() as full:
            full.setattr(room, "MIN_FREE", 1 << 60)
            with pytest.raises(LogFull, match="the disk of the event log is full"):
                connect(running.dsn)
            assert tables(running.dsn) == []
        log = connect(running.dsn)
        assert await log.is_empty()
        await log.close()


async def test_a_table_is_made_only_as_long_as_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    looks, require_room = [], clickhouse._require_room

    def soon_full(client: Any) -> None:
        looks.append(1)
        monkeypatch.setattr(room, "MIN_FREE", 1 << 60 if len(looks) == 5 else 0)
        require_room(client)

    with owner(tmp_path / "log") as running:
        monkeypatch.setattr(clickhouse, "_require_room", soon_full)
        with pytest.raises(LogFull):
            connect(running.dsn)
        made = tables(running.dsn)
        assert "events" in made and "scores" not in made
        log = connect(running.dsn)
        assert await log.is_empty() and not await log.query("SELECT * FROM scores")
        await log.close()


async def test_an_insert_is_on_disk_when_it_returns(embedded: ClickHouseLog):
    async def synced() -> dict[str, int]:
        rows = await embedded.query(
            "SELECT event, value FROM system.events WHERE event IN ('FileSync', 'DirectorySync')"
        )
        return {row["event"]: row["value"] for row in rows}

    before = await synced()
    await embedded.append(records("r1", resumed(1)), "t")
    after = await synced()
    assert after["FileSync"] > before.get("FileSync", 0) and after["DirectorySync"] > before.get("DirectorySync", 0)


def test_migrations_are_numbered_from_one_without_gaps():
    assert [number for number, _ in migrations()] == list(range(1, len(migrations()) + 1))
