"""The recorder: from the streams to the log, once each, whatever breaks between; on memory and on the real pair."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bus_on import kill_server, note, notes, of_a_later_release, on, on_a_server, opened, until

from sia_events.event_log.recorder import lag, rebuild, record, store
from sia_events.infra import child, clickhouse
from sia_events.infra.memory import MemoryBus, MemoryLog
from sia_events.infra.nats import NatsBus
from sia_events.infra.nats_server import running
from sia_events.infra.store_lock import owner
from sia_events.log_here import keep_log
from sia_events.shared.ports import Bus, Envelope, Feed, Log
from sia_events.shared.record import Record, answers
from sia_events.shared.settings import Settings


@pytest.fixture(params=["memory", "nats-server and chDB"])
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Bus, Log]]:
    if request.param == "memory":
        yield MemoryBus(), MemoryLog()
        return
    async with running(tmp_path / "nats") as url, on(url) as bus:
        log = await asyncio.to_thread(clickhouse.connect, f"chdb://{tmp_path}/log")
        yield bus, log
        await log.close()


@asynccontextmanager
async def recording(bus: Bus, log: Log) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(record(bus, log))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def keeping(home: Path, bus: Bus) -> AsyncIterator["asyncio.Task[None]"]:
    assert isinstance(bus, NatsBus)
    task = asyncio.create_task(keep_log(Settings(home=home), bus, bus.streams))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def caught_up(bus: Bus) -> None:
    async with asyncio.timeout(20):
        while await lag(bus):  # noqa: ASYNC110 - the port announces nothing of other processes
            await asyncio.sleep(0.01)


async def test_what_is_appended_is_soon_in_the_log(pair: tuple[Bus, Log]):
    bus, log = pair
    first, *_ = await opened(bus, "r", note("before"))
    async with recording(bus, log):
        await bus.append("r", notes("r", first, "during"))
        await caught_up(bus)
        assert list(await log.records("r")) == list(await bus.history("r"))


async def test_a_recorder_goes_on_where_the_last_one_was(pair: tuple[Bus, Log]):
    bus, log = pair
    first, *_ = await opened(bus, "r")
    for text in "abc":
        async with recording(bus, log):
            await bus.append("r", notes("r", first, text, producer=text))
            await caught_up(bus)
    assert list(await log.records("r")) == list(await bus.history("r"))


@dataclass
class Failing:
    """A log that stores a batch and then fails, `times` over: the worst moment to be cut off."""

    inner: Log
    times: int
    tokens: list[str]

    async def append(self, records: Sequence[Record], token: str) -> None:
        self.tokens.append(token)
        await self.inner.append(records, token)
        if self.times:
            self.times -= 1
            raise OSError("cut off after the insert")

    def __getattr__(self, name: str):
        return getattr(self.inner, name)


async def test_a_batch_cut_off_between_insert_and_ack_comes_again_unchanged(pair: tuple[Bus, Log]):
    bus, log = pair
    first, *_ = await opened(bus, "r", note("a"))
    failing = Failing(log, 2, [])
    for text in "bc":
        with pytest.raises(OSError, match="cut off"):
            await record(bus, failing)  # pyright: ignore[reportArgumentType]
        await bus.append("r", notes("r", first, text, producer=text))
    async with recording(bus, log):
        await caught_up(bus)
    assert len(failing.tokens) == 2 and len(set(failing.tokens)) == 1 and failing.tokens[0].startswith("SIA 1-2 ")
    assert list(await log.records("r")) == list(await bus.history("r"))


@dataclass
class Slow:
    """A log whose inserts wait until it is told that they may go on, and which notes what traces it then took."""

    inner: Log
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    taken: list[tuple[int, Envelope]] = field(default_factory=list)

    async def append(self, records: Sequence[Record], token: str) -> None:
        self.asked.set()
        await self.open.wait()
        await self.inner.append(records, token)

    async def append_traces(self, envelopes: Sequence[tuple[int, Envelope]], token: str) -> None:
        self.asked.set()
        await self.open.wait()
        await self.inner.append_traces(envelopes, token)
        self.taken += envelopes

    def __getattr__(self, name: str):
        return getattr(self.inner, name)


async def test_a_burst_upon_a_slow_log_costs_lag_and_holds_up_no_writer_and_loses_nothing(pair: tuple[Bus, Log]):
    bus, log = pair
    runs, records, envelopes, lines = [f"r{n}" for n in range(5)], 40, 300, 10
    slow = Slow(log)
    started = {run: (await opened(bus, run))[0] for run in runs}

    async def burst(run: str) -> None:
        for number in range(records):
            await bus.append(run, notes(run, started[run], f"{number}", producer=f"tester {number}"))
        for number in range(envelopes):
            said = tuple(b'{"n":%d}' % (number * lines + line) for line in range(lines))
            await bus.trace(Envelope(run, "log", f"k{number % 7}", said))

    async with recording(bus, slow):  # pyright: ignore[reportArgumentType]
        await slow.asked.wait()
        async with asyncio.timeout(60):
            await asyncio.gather(*map(burst, runs))
        assert await lag(bus) == len(runs) * (1 + records + envelopes), "every message, as none is acked"
        assert list(await log.runs()) == []
        slow.open.set()
        await caught_up(bus)
    for run in runs:
        assert list(await log.records(run)) == list(await bus.history(run))
        taken = [envelope for _, envelope in slow.taken if envelope.run == run]
        assert len(taken) == envelopes and taken == list(await bus.traces(run, "log", None))
    assert [at for at, _ in slow.taken] == sorted({at for at, _ in slow.taken}), "in order, and none twice"
    if isinstance(log, clickhouse.ClickHouseLog):
        (rows,) = await log.query("SELECT count() AS rows, uniqExact(run, sequence, line) AS lines FROM trace")
        assert rows == dict.fromkeys(("rows", "lines"), len(runs) * envelopes * lines)


async def test_a_log_is_rebuilt_from_the_streams(pair: tuple[Bus, Log]):
    bus, log = pair
    await opened(bus, "one", note("a"))
    await opened(bus, "two")
    await bus.trace(Envelope("one", "log", "k", (b'{"a":1}',)))
    async with recording(bus, log):
        await caught_up(bus)
    await log.clear()
    assert list(await log.runs()) == []
    for _ in range(2):
        await rebuild(bus, log)
        assert sorted(await log.runs()) == ["one", "two"]
        assert list(await log.records("one")) == list(await bus.history("one"))
        assert await lag(bus) == 0


async def test_an_empty_stream_rebuilds_to_an_empty_log(pair: tuple[Bus, Log]):
    bus, log = pair
    await rebuild(bus, log)
    assert list(await log.runs()) == []


async def test_the_recorder_leaves_the_store_to_its_owner_also_while_that_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(child, "RESTARTS_S", 1.5)  # time enough for the recorder to try meanwhile
    store = tmp_path / "log"
    async with on_a_server(tmp_path / "nats") as bench, keeping(tmp_path, bench.bus) as task:
        bus = bench.bus
        first, *_ = await opened(bus, "r", note("before"))
        await caught_up(bus)
        killed = owner(store)
        assert killed and killed.pid != os.getpid()
        os.kill(killed.pid, signal.SIGKILL)
        await bus.append("r", notes("r", first, "meanwhile"))
        await until(lambda: (now := owner(store)) is not None and now.pid != killed.pid, 60)
        after = owner(store)
        assert after and after.pid != os.getpid()
        await caught_up(bus)
        assert not task.done()


async def test_a_run_that_other_code_wrote_to_holds_up_the_log_and_no_other_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    said = ""

    def told() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "the log waits there, other runs go on" in said

    async with on_a_server(tmp_path / "nats") as bench:
        first, *_ = await opened(bench.bus, "theirs")
        later = answers("theirs", first, "later", [note("b")])[0]
        wire = of_a_later_release(later, 2, first.chain, first.time, "theirs")
        await bench.inject("theirs", "RunResumed", wire)
        async with keeping(tmp_path, bench.bus) as task:
            await until(lambda: told() or task.done())
            assert not task.done() and "record 2 of run theirs is of schema" in said
            await opened(bench.bus, "ours")
            assert await lag(bench.bus) == 3


async def test_every_row_is_there_once_however_often_the_server_is_killed(tmp_path: Path):
    async with running(tmp_path / "nats") as url, on(url) as bus:
        log = await asyncio.to_thread(clickhouse.connect, f"chdb://{tmp_path}/log")
        first, *_ = await opened(bus, "r")
        async with recording(bus, log) as task:
            for round in range(3):
                for number in range(20):
                    await bus.append("r", notes("r", first, "x", producer=f"{round}.{number}"))
                kill_server(tmp_path / "nats")
            await caught_up(bus)
            assert not task.done()
        rows = await log.query("SELECT count() AS rows, uniqExact(position) AS positions FROM events")
        assert dict(rows[0]) == {"rows": 61, "positions": 61}
        await log.close()


async def test_sequences_that_come_a_second_time_with_something_else_are_not_taken_for_a_second_insert(
    pair: tuple[Bus, Log],
):
    """As they do on streams that were lost, and are put back or begun anew."""
    bus, log = pair
    first, *_ = await opened(bus, "r")
    again, *_ = await opened(bus, "s")

    async def acked() -> None:
        pass

    for each in (first, again):
        lines = Envelope(each.run, "log", "a", (b'{"text":"said"}',))
        await store(Feed("SIA", 1, 1, (each,), ((1, lines),), acked), log)
    assert sorted(await log.runs()) == ["r", "s"]
