"""A service's answers: on the state up to the cause, once, and with no more memory than a long run needs."""

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from bus_on import note, notes, opened, until
from given import recorded
from story import asked, proposed, registered, started

from sia_events.infra.memory import MemoryBus
from sia_events.shared import service as service_module
from sia_events.shared.events import Event, RunBranched, RunResumed, RunSettings, RunSteered
from sia_events.shared.run import Run, fold
from sia_events.shared.service import KEPT_EVERY, Lineage, Service, gave_up, serve


def long_run(attempts: int) -> list[Event]:
    return [registered(), started(), proposed(), *(asked("g0a", "dev", repeat) for repeat in range(attempts))]


@pytest.mark.parametrize("order", ["forwards", "backwards", "to and fro"])
def test_the_state_at_every_record_is_the_fold_up_to_it_in_whatever_order_it_is_asked_for(order: str):
    records = recorded(*long_run(3 * KEPT_EVERY))
    lineage = Lineage(records[: KEPT_EVERY + 5])
    lineage.extend(records)
    at = {
        "forwards": records,
        "backwards": records[::-1],
        "to and fro": [records[7 * i % len(records)] for i in range(len(records))],
    }[order]
    for record in at:
        assert lineage.state(record, "r1") == fold(records[: record.position])
    assert lineage.latest == fold(records)


def test_a_branch_answers_what_its_parent_left_under_its_own_settings():
    forked = RunBranched(
        parent="r1", at=4, generation=0, overrides={}, settings=RunSettings(generations=9), code="test"
    )
    records = recorded(*long_run(1), forked)
    lineage = Lineage(records)
    assert lineage.state(records[2], records[-1].run).settings.generations == 9
    assert lineage.state(records[2], "another run").settings == fold(records[:3]).settings


def test_a_long_run_takes_little_more_memory_than_its_records():
    records = recorded(*long_run(4000))
    tracemalloc.start()
    lineage = Lineage(records)
    for record in records[::500]:
        lineage.state(record, "r1")
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 40e6, f"{used / 1e6:.0f} MB for {len(records)} records"


async def test_only_the_runs_answered_last_are_kept_and_the_others_folded_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(service_module, "KEPT_RUNS", 2)
    seen: list[tuple[str, int]] = []

    def decide(run: Run, event: RunResumed) -> list[Event]:
        seen.append((run.name, run.records))
        return []

    def lineages() -> int:
        gc.collect()
        return sum(isinstance(each, Lineage) for each in gc.get_objects())

    bus, before = MemoryBus(), lineages()
    service = Service("svc", decides={RunResumed: decide})
    async with running(service, bus):
        for run in ("one", "two", "three", "four"):
            await opened(bus, run, note("a"))
        await until(lambda: len(seen) == 4)
        assert lineages() - before == 2
        first = (await bus.history("one"))[0]
        await bus.append("one", notes("one", first, "b"))
        await until(lambda: len(seen) == 5)
    assert seen == [("one", 2), ("two", 2), ("three", 2), ("four", 2), ("one", 3)]


@asynccontextmanager
async def running(service: Service, bus: MemoryBus) -> AsyncIterator[None]:
    ports = SimpleNamespace(bus=bus)
    task = asyncio.create_task(serve(service, bus, ports))  # type: ignore[arg-type]
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_service_that_gave_up_and_is_offered_its_record_again_answers_it():
    mended = False

    def decide(run: Run, event: RunResumed) -> list[Event]:
        if not mended:
            raise OSError("not mended")
        return [RunSteered(text="answered")]

    bus = MemoryBus()
    await opened(bus, "r", note("a"))
    async with running(Service("svc", decides={RunResumed: decide}), bus):
        await until(lambda: len(bus._tail("r").records) == 3)
        assert gave_up(await bus.history("r")) == {"svc"}
        mended = True
        await bus.again("r", "svc")
        await until(lambda: len(bus._tail("r").records) == 4)
    assert gave_up(await bus.history("r")) == set()
    assert [record.type for record in await bus.history("r")][2:] == ["ServiceFailed", "RunSteered"]
