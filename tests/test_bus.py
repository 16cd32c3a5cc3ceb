"""The Bus port's contract, in memory and on a real server; then what only a server can: die, fill up, be set wrong."""

import asyncio
import errno
import json
import os
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from pathlib import Path

import nats
import psutil
import pytest
from bus_on import (
    FOREIGN,
    STARTED,
    Bench,
    branch,
    forged_branch,
    in_memory,
    kill_server,
    note,
    notes,
    of_a_later_release,
    on,
    on_a_server,
    opened,
    serving,
    until,
)
from nats.js import api
from small_disk import fill, small_disk

from sia_events.infra import nats as nats_bus
from sia_events.infra import nats_runs, nats_serve, nats_server
from sia_events.infra.blobs import BlobsUnavailable
from sia_events.infra.delivery import LONGEST_S, TRIES, delay
from sia_events.infra.memory import MemoryBlobs, SystemTime
from sia_events.infra.nats import NatsBus, connect
from sia_events.infra.nats_server import running
from sia_events.infra.nats_streams import StreamUnfit
from sia_events.infra.tail import RunIncomplete, RunTooNew, Tail, following
from sia_events.shared.events import RunFinished, ServiceFailed
from sia_events.shared.ports import BusFull, BusUnreachable, Envelope, NoSuchPosition, ProviderAway, RunExists
from sia_events.shared.record import (
    SCHEMA,
    Draft,
    Record,
    answers,
    broken_link,
    derived_id,
    opening,
    parse_record,
    place,
    to_wire,
)
from sia_events.shared.service import gave_up

MEMORY_ONLY = "memory"
REAL = "nats-server"
CUT = "nats-server, 8 partitions"


@pytest.fixture(params=[MEMORY_ONLY, REAL, pytest.param(CUT, marks=pytest.mark.slow)])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    partitions = 8 if request.param == CUT else 1
    made = in_memory() if request.param == MEMORY_ONLY else on_a_server(tmp_path / "nats", partitions)
    async with made as bench:
        yield bench


def texts(records: Sequence[Record]) -> list[str]:
    return [getattr(record.event, "reason", record.type) for record in records]


async def test_records_stand_at_positions_without_gaps_and_in_one_chain(bench: Bench):
    first, *_ = await opened(bench.bus, "r", note("a"))
    await bench.bus.append("r", notes("r", first, "b"))
    await bench.other.append("r", notes("r", first, "c", "d", producer="another"))
    history = await bench.bus.history("r")
    assert [record.position for record in history] == [1, 2, 3, 4, 5]
    assert texts(history) == ["RunStarted", "a", "b", "c", "d"]
    assert broken_link(history) is None
    assert await bench.other.history("r") == history


async def test_what_append_returns_is_what_history_reads(bench: Bench):
    stored = await opened(bench.bus, "r", note("a"))
    assert list(await bench.other.history("r")) == list(stored)


async def test_no_drafts_are_no_records(bench: Bench):
    assert list(await bench.bus.append("r", [])) == []
    assert list(await bench.bus.history("r")) == []


async def test_a_second_append_of_the_same_drafts_writes_nothing(bench: Bench):
    first, *_ = await opened(bench.bus, "r")
    drafts = notes("r", first, "a", "b")
    stored = await bench.bus.append("r", drafts)
    await bench.bus.append("r", notes("r", first, "c", producer="another"))
    assert list(await bench.bus.append("r", drafts)) == list(stored)
    assert list(await bench.other.append("r", drafts)) == list(stored)
    assert len(await bench.bus.history("r")) == 4


async def test_ten_writers_at_once_lose_nothing_and_break_nothing(bench: Bench):
    first, *_ = await opened(bench.bus, "r")
    await asyncio.gather(
        *(
            bus.append("r", notes("r", first, *("ab"[: 1 + i % 2]), producer=f"writer{i}"))
            for i in range(10)
            for bus in (bench.bus, bench.other)
        )
    )
    history = await bench.bus.history("r")
    assert len(history) == 1 + 5 * 1 + 5 * 2
    assert [record.position for record in history] == list(range(1, len(history) + 1))
    assert broken_link(history) is None
    pairs = [record.producer for record in history if record.producer != "cli"]
    assert all(pairs.count(p) == 1 or pairs[pairs.index(p) + 1] == p for p in pairs), "an atomic append was torn apart"


async def test_a_run_is_opened_once(bench: Bench):
    await opened(bench.bus, "r")
    with pytest.raises(RunExists, match="'r' exists"):
        await bench.other.append("r", opening("r", [STARTED], producer="somebody else"))
    assert len(await bench.bus.history("r")) == 1


async def test_runs_are_apart_and_listed(bench: Bench):
    await opened(bench.bus, "one", note("a"))
    await opened(bench.bus, "two")
    assert texts(await bench.bus.history("two")) == ["RunStarted"]
    assert sorted(await bench.other.runs()) == ["one", "two"]


@pytest.mark.parametrize("name", ["", "a.b", "*", ">", "a b", "../x", "é", "a" * 65, "-x"])
async def test_a_name_that_would_be_more_than_a_name_is_refused(bench: Bench, name: str):
    with pytest.raises(ValueError, match="cannot name a run"):
        await bench.bus.append(name, opening(name, [STARTED]))


async def test_a_branch_goes_on_from_its_parent_and_copies_nothing(bench: Bench):
    await opened(bench.bus, "parent", note("a"), note("b"))
    (fork,) = await bench.bus.append("child", opening("child", [branch("parent", 2)]))
    await bench.bus.append("child", notes("child", fork, "c"))
    (deeper,) = await bench.other.append("grandchild", opening("grandchild", [branch("child", 3)]))
    history = await bench.other.history("grandchild")
    assert texts(history) == ["RunStarted", "a", "RunBranched", "RunBranched"]
    assert [record.position for record in history] == [1, 2, 3, 4]
    assert deeper.position == 4
    assert broken_link(history) is None
    assert texts(await bench.bus.history("child")) == ["RunStarted", "a", "RunBranched", "c"]
    assert texts(await bench.bus.history("parent")) == ["RunStarted", "a", "b"]


async def test_what_was_forged_to_descend_from_itself_is_read_and_stops_nobody(bench: Bench):
    for run, parent in (("r", "r"), ("a", "b"), ("b", "a")):
        await bench.inject(run, "RunBranched", forged_branch(run, parent))
    for run in "rab":
        assert {record.position for record in await bench.other.history(run)} == {2}
        with pytest.raises(NoSuchPosition):
            await bench.bus.append("c", opening("c", [branch(run, 1)]))
    await opened(bench.bus, "well")
    assert texts(await bench.other.history("well")) == ["RunStarted"]


@pytest.mark.parametrize(("parent", "at"), [("parent", 0), ("parent", 3), ("nobody", 1), ("child", 1)])
async def test_a_branch_from_nowhere_is_refused(bench: Bench, parent: str, at: int):
    await opened(bench.bus, "parent", note("a"))
    with pytest.raises(
        NoSuchPosition, match=f"(no position {at}; nothing was written.*sia verify {parent} --repair|itself)"
    ):
        await bench.bus.append("child", opening("child", [branch(parent, at)]))
    assert list(await bench.bus.history("child")) == []


async def test_a_service_gets_its_types_in_order_before_and_after_it_begins(bench: Bench):
    first, *_ = await opened(bench.bus, "r", note("a"))
    await opened(bench.bus, "another", note("x"))
    got: list[str] = []

    async def answer(record: Record) -> None:
        got.append(texts([record])[0])

    async with serving(bench.bus, "svc", ["RunResumed"], answer, "r"):
        for text in "bcd":
            await bench.bus.append("r", notes("r", first, text, producer=text))
        await until(lambda: len(got) == 4)
    assert got == ["a", "b", "c", "d"]


async def test_a_service_of_all_runs_takes_new_ones_too_and_goes_on_where_it_was(bench: Bench):
    first, *_ = await opened(bench.bus, "one", note("a"))
    got: list[str] = []

    async def answer(record: Record) -> None:
        got.append(f"{record.run} {texts([record])[0]}")

    async with serving(bench.bus, "svc", ["RunResumed"], answer):
        await until(lambda: got == ["one a"])
        await opened(bench.bus, "two", note("b"))
        await until(lambda: got == ["one a", "two b"])
    await bench.bus.append("one", notes("one", first, "c"))
    async with serving(bench.other, "svc", ["RunResumed"], answer):
        await until(lambda: got == ["one a", "two b", "one c"])


async def test_a_raise_brings_the_record_again_and_nothing_overtakes_it(bench: Bench):
    await opened(bench.bus, "r", note("a"), note("b"))
    got: list[str] = []

    async def answer(record: Record) -> None:
        got.append(texts([record])[0])
        if len(got) < 3:
            raise OSError("not now")

    async with serving(bench.bus, "svc", ["RunResumed"], answer, "r"):
        await until(lambda: len(got) == 4)
    assert got == ["a", "a", "a", "b"]
    assert len(await bench.bus.history("r")) == 3


async def test_after_the_last_try_there_is_a_dead_letter_and_the_service_goes_on(bench: Bench):
    _, second, _ = await opened(bench.bus, "r", note("a"), note("b"))
    got: list[str] = []

    async def answer(record: Record) -> None:
        got.append(texts([record])[0])
        if record.id == second.id:
            raise OSError("never")

    async with serving(bench.bus, "svc", ["RunResumed"], answer, "r"):
        await until(lambda: "b" in got)
    assert got == ["a"] * TRIES + ["b"]
    letter = (await bench.bus.history("r"))[-1]
    assert isinstance(letter.event, ServiceFailed)
    assert (letter.cause, letter.producer) == (second.id, "svc")
    assert (letter.event.service, letter.event.failed, letter.event.tries) == ("svc", str(second.id), TRIES)
    assert "never" in letter.event.error
    assert parse_record(await bench.blobs.get(letter.event.payload)) == second


@pytest.mark.parametrize("error", [BlobsUnavailable("no connection"), OSError(errno.ENOSPC, "no space left")])
async def test_a_full_disk_or_blobs_that_are_away_cost_a_record_none_of_its_tries(bench: Bench, error: Exception):
    await opened(bench.bus, "r", note("a"), note("b"))
    got: list[str] = []

    async def answer(record: Record) -> None:
        got.append(texts([record])[0])
        if len(got) <= TRIES + 2:
            raise error
        if len(got) < 2 * TRIES + 2:
            raise OSError("and then its own failures")

    async with serving(bench.bus, "svc", ["RunResumed"], answer, "r"):
        await until(lambda: "b" in got)
    assert got == ["a"] * (2 * TRIES + 2) + ["b"]
    assert len(await bench.bus.history("r")) == 3, "no dead letter"


def test_however_long_a_record_has_waited_it_is_tried_again_soon():
    assert 1.0 <= delay(1, 1.0) <= 1.25 and 16.0 <= delay(5, 1.0) <= 20.0
    assert all(LONGEST_S <= delay(tries, 1.0) <= 1.25 * LONGEST_S for tries in (6, 100, 10**6))


async def test_who_has_waited_for_a_provider_in_vain_is_not_asked_to_wait_again(bench: Bench):
    _, second, _ = await opened(bench.bus, "r", note("a"), note("b"))
    got: list[str] = []

    async def answer(record: Record) -> None:
        got.append(texts([record])[0])
        if record.id == second.id:
            raise ProviderAway("gone")

    async with serving(bench.bus, "svc", ["RunResumed"], answer, "r"):
        await until(lambda: "b" in got)
    assert got == ["a", "b"]
    letter = (await bench.bus.history("r"))[-1].event
    assert isinstance(letter, ServiceFailed) and letter.tries == 1 and letter.error == "ProviderAway: gone"


async def test_what_was_given_up_is_offered_again_on_request_and_each_giving_up_has_a_letter(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(nats_serve, "WATCH_S", 0.2)
    _, second, _ = await opened(bench.bus, "r", note("a"), note("b"))
    got: list[str] = []
    mended = False

    async def answer(record: Record) -> None:
        got.append(texts([record])[0])
        if record.id == second.id and not mended:
            raise OSError("not mended")

    async with serving(bench.bus, "svc", ["RunResumed"], answer):
        await until(lambda: got == ["a"] * TRIES + ["b"])
        assert gave_up(await bench.bus.history("r")) == {"svc"}
        await bench.other.again("r", "svc")
        await until(lambda: got == (["a"] * TRIES + ["b"]) * 2)
        got.clear()
        mended = True
        await bench.other.again("r", "svc")
        await until(lambda: got == ["a", "b"])
    letters = (await bench.bus.history("r"))[3:]
    assert [type(each.event) for each in letters] == [ServiceFailed, ServiceFailed]
    await bench.bus.append("r", answers("r", second, "svc", [note("answered")]))
    assert gave_up(await bench.bus.history("r")) == set()


async def test_a_run_that_nobody_serves_can_be_offered_again(bench: Bench):
    await opened(bench.bus, "r", note("a"))
    await bench.bus.again("r", "svc")
    got: list[str] = []

    async def answer(record: Record) -> None:
        got.append(texts([record])[0])

    async with serving(bench.bus, "svc", ["RunResumed"], answer):
        await until(lambda: got == ["a"])


async def test_a_handler_that_outlasts_the_ack_wait_runs_once(bench: Bench):
    await opened(bench.bus, "r", note("slow"), note("next"))
    got: list[str] = []

    async def answer(record: Record) -> None:
        got.append(texts([record])[0])
        if got == ["slow"]:
            await asyncio.sleep(2.5)  # the wait is one second here

    async with serving(bench.bus, "svc", ["RunResumed"], answer, "r"):
        await until(lambda: "next" in got)
    assert got == ["slow", "next"]


async def test_a_cancelled_service_leaves_its_record_to_the_next(bench: Bench):
    await opened(bench.bus, "r", note("a"))
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hang(record: Record) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def answer(record: Record) -> None:
        got.append(texts([record])[0])

    got: list[str] = []
    async with serving(bench.bus, "svc", ["RunResumed"], hang):
        await begun.wait()
    assert ended.is_set()
    async with serving(bench.other, "svc", ["RunResumed"], answer):
        await until(lambda: got == ["a"])
    assert len(await bench.bus.history("r")) == 2


async def test_a_service_that_is_cancelled_just_as_it_is_answered_ends(bench: Bench):
    await opened(bench.bus, "r", note("a"))

    async def answer(record: Record) -> None:
        """Nothing to do."""

    for answers_before in range(6):
        task = asyncio.create_task(bench.bus.serve("svc", ["RunResumed"], answer, "r", at_once=3))
        for _ in range(answers_before):
            await answered(task)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=20)
        assert done, f"cancelled at answer {answers_before} it goes on"


async def answered(task: asyncio.Task[None]) -> None:
    """Return when what the task waits for is there and the task has not gone on yet, or when it waits in earnest."""
    was, end = task._fut_waiter, time.monotonic() + 0.1  # type: ignore[attr-defined]
    while time.monotonic() < end:
        await asyncio.sleep(0)
        waits = task._fut_waiter  # type: ignore[attr-defined]
        if waits is not was and waits is not None and waits.done():
            return


@pytest.mark.parametrize("wire", [b"", b"\xff\x00", b"{}", b'{"schema": 999}'])
async def test_poison_is_a_dead_letter_once_and_no_part_of_the_run(bench: Bench, wire: bytes):
    first, *_ = await opened(bench.bus, "r")
    await bench.inject("r", "RunResumed", wire)
    await bench.bus.append("r", notes("r", first, "a"))
    got: list[str] = []

    async def answer(record: Record) -> None:
        got.append(texts([record])[0])

    for service in ("one", "two"):
        got.clear()
        async with serving(bench.bus, service, ["RunResumed"], answer, "r"):
            await until(lambda: got == ["a"])
    history = await bench.bus.history("r")
    assert texts(history) == ["RunStarted", "a", "ServiceFailed"]
    assert broken_link(history) is None
    letter = history[-1].event
    assert isinstance(letter, ServiceFailed)
    assert (letter.service, letter.failed, letter.sequence) == ("one", None, 2)
    assert await bench.blobs.get(letter.payload) == wire


async def test_a_record_published_again_by_hand_is_no_second_record(bench: Bench):
    first, second = await opened(bench.bus, "r", note("a"))
    await bench.inject("r", "RunResumed", to_wire(second))
    await bench.bus.append("r", notes("r", first, "b"))
    assert texts(await bench.other.history("r")) == ["RunStarted", "a", "b"]


@pytest.mark.parametrize("forge", ["its position is taken", "its id is taken"])
async def test_what_looks_like_a_record_and_is_none_of_the_run_is_answered_by_nobody(bench: Bench, forge: str):
    first, second = await opened(bench.bus, "r", note("a"))
    own_id = second.id if forge == "its id is taken" else derived_id("r", first.id, "forger", 0)
    draft = Draft(note("forged"), "forger", first.id, first.correlation, own_id)
    await bench.inject("r", "RunResumed", to_wire(place(draft, "r", 2, first.chain, first.time)))
    await bench.bus.append("r", notes("r", first, "b"))
    got: list[str] = []

    async def answer(record: Record) -> None:
        got.append(texts([record])[0])

    for service in ("one", "two"):
        got.clear()
        async with serving(bench.bus, service, ["RunResumed"], answer, "r"):
            await until(lambda: "b" in got)
        assert got == ["a", "b"]
    history = await bench.bus.history("r")
    assert texts(history) == ["RunStarted", "a", "b", "ServiceFailed"]
    letter = history[-1].event
    assert isinstance(letter, ServiceFailed)
    assert letter.failed is None and "no part of run r" in letter.error


async def foreign(bench: Bench, run: str, kind: str, linked: bool = True) -> Record:
    """Put what other code writes behind a run's two first records; returns the first."""
    first, second = await opened(bench.bus, run, note("a"))
    draft = answers(run, first, "later", [note("b")])[0]
    wire = of_a_later_release(draft, 3, second.chain if linked else "0" * 64, second.time, run, kind)
    await bench.inject(run, json.loads(wire)["type"], wire)
    return first


async def test_a_run_that_other_code_wrote_to_is_refused_and_nothing_is_written_behind_it(bench: Bench):
    await opened(bench.bus, "another")
    for run, (kind, why) in {
        "r1": ("a later schema", rf"is of schema {SCHEMA + 1}; this release reads up to {SCHEMA}"),
        "r2": ("an unknown type", "is of the unknown event type 'NotYetInvented'"),
        "r3": ("a field more", "has data that no RunResumed has here.*unheard"),
    }.items():
        first = await foreign(bench, run, kind)
        said = rf"(?s)record 3 of run {run} {why}.*Nothing was changed. Use the release that wrote it \(sia-events 0"
        for bus in (bench.bus, bench.other):
            with pytest.raises(RunTooNew, match=said):
                await bus.append(run, notes(run, first, "c"))
            with pytest.raises(RunTooNew):
                await bus.history(run)
    assert texts(await bench.other.history("another")) == ["RunStarted"]
    assert await bench.bus.lag("f") == 10, "one of another, and three a run"


@pytest.mark.parametrize("kind", ["a later schema", "an unknown type"])
async def test_the_feed_stops_at_a_record_of_other_code_and_keeps_its_place(bench: Bench, kind: str):
    await foreign(bench, "r", kind)
    for _ in range(2):
        with pytest.raises(RunTooNew):
            await anext(bench.other.feed("f"))
    assert await bench.bus.lag("f") == 3


async def test_one_record_of_other_code_under_a_name_without_records_stops_no_feed_and_two_that_are_linked_do(
    bench: Bench,
):
    first, *_ = await opened(bench.bus, "r")
    chain = "0" * 64
    for position in (7, 8):
        draft = answers("unused", first, f"later {position}", [note("b")])[0]
        wire = of_a_later_release(draft, position, chain, first.time, "unused", "an unknown type")
        chain = json.loads(wire)["chain"]
        await bench.inject("unused", "NotYetInvented", wire)
        with pytest.raises(RunTooNew, match="record 7 of run unused"):
            await opened(bench.bus, "unused")  # it may be a branch of theirs
        copied: list[str] = []
        while position == 7 and await bench.bus.lag("f"):
            batch = await anext(bench.other.feed("f"))
            copied += [record.run for record in batch.records]
            await batch.ack()
        assert copied == (["r"] if position == 7 else [])
    with pytest.raises(RunTooNew, match="record 7 of run unused"):
        await anext(bench.other.feed("f"))
    assert await bench.bus.lag("f") == 1


async def test_a_number_a_name_or_a_field_alone_stops_no_run(bench: Bench):
    firsts = {f"r{i}": await foreign(bench, f"r{i}", kind, linked=False) for i, kind in enumerate(FOREIGN)}
    for run, first in firsts.items():
        await bench.bus.append(run, notes(run, first, "c"))
    seen: list[Record] = []
    async for batch in bench.other.feed("f"):
        seen.extend(batch.records)
        await batch.ack()
        if not await bench.bus.lag("f"):
            break
    for run in firsts:
        told = [record for record in seen if record.run == run]
        assert texts(told) == texts(await bench.bus.history(run)) == ["RunStarted", "a", "c", "ServiceFailed"]


async def test_records_that_only_other_code_can_read_are_not_written_over_where_one_before_them_is_lost(bench: Bench):
    records = following(Tail("r"), opening("r", [STARTED, note("lost")]), None, datetime.now(UTC))
    await bench.inject("r", records[0].type, to_wire(records[0]))
    chain = records[1].chain
    for position in (3, 4):
        draft = answers("r", records[0], f"later {position}", [note("b")])[0]
        wire = of_a_later_release(draft, position, chain, records[0].time, kind="an unknown type")
        chain = json.loads(wire)["chain"]
        await bench.inject("r", "NotYetInvented", wire)
    with pytest.raises(RunIncomplete, match=r"behind record 1 some are lost, and others stand up to 4"):
        await bench.bus.append("r", notes("r", records[0], "c"))


async def test_a_run_that_lost_records_and_has_later_ones_is_read_up_to_there_copied_and_not_written_to(bench: Bench):
    drafts = opening("r", [STARTED, note("lost"), note("a"), note("b")])
    records = following(Tail("r"), drafts, None, datetime.now(UTC))
    for record in (records[0], *records[2:]):
        await bench.inject("r", record.type, to_wire(record))
    for bus in (bench.bus, bench.other):
        with pytest.raises(RunIncomplete, match="sia verify r --repair"):
            await bus.append("r", notes("r", records[0], "c"))
    async for batch in bench.other.feed("f"):
        assert texts(batch.records) == ["RunStarted", "a", "b"], "who reads the copy has to see the gap"
        await batch.ack()
        break
    assert await bench.bus.lag("f") == 0, "no letter is written either"
    assert texts(await bench.bus.history("r")) == ["RunStarted"]


async def test_one_record_that_says_it_stands_further_on_stops_no_run(bench: Bench):
    drafts = opening("r", [STARTED, note("a"), note("b")])
    first, _, further = following(Tail("r"), drafts, None, datetime.now(UTC))
    for record in (first, further):
        await bench.inject("r", record.type, to_wire(record))
    await bench.bus.append("r", notes("r", first, "c"))
    assert texts(await bench.other.history("r")) == ["RunStarted", "c"]


async def test_as_many_records_as_wanted_are_answered_at_once(bench: Bench):
    await opened(bench.bus, "r", *map(note, "abcdef"))
    together = asyncio.Barrier(3)
    got: list[str] = []
    out, most = 0, 0

    async def answer(record: Record) -> None:
        nonlocal out, most
        out, most = out + 1, max(most, out + 1)
        # Passed by three at a time only: served one after another this would never end.
        await together.wait()
        out -= 1
        got.append(texts([record])[0])

    async with serving(bench.bus, "svc", ["RunResumed"], answer, "r", at_once=3):
        await until(lambda: len(got) == 6)
    assert sorted(got) == list("abcdef") and most == 3


async def test_what_fails_beside_others_is_tried_again_and_holds_up_none_of_them(bench: Bench):
    await opened(bench.bus, "r", *map(note, "abc"))
    got: list[str] = []

    async def answer(record: Record) -> None:
        if texts([record]) == ["a"] and len(got) < 2:
            raise RuntimeError("not before the others")
        got.append(texts([record])[0])

    async with serving(bench.bus, "svc", ["RunResumed"], answer, "r", at_once=3):
        await until(lambda: len(got) == 3)
    assert sorted(got[:2]) == ["b", "c"] and got[2] == "a"


async def test_traces_come_back_by_key_in_order(bench: Bench):
    for number in range(3):
        await bench.bus.trace(Envelope("r", "model_call", "v1/dev.0 *", (b'{"n":%d}' % number, b"{}")))
    await bench.bus.trace(Envelope("r", "model_call", "another", (b"{}",)))
    await bench.bus.trace(Envelope("r", "step", "v1/dev.0 *", (b"{}",)))
    found = await bench.other.traces("r", "model_call", "v1/dev.0 *")
    assert [each.lines for each in found] == [(b'{"n":%d}' % number, b"{}") for number in range(3)]
    assert found[0] == Envelope("r", "model_call", "v1/dev.0 *", (b'{"n":0}', b"{}"))
    every = await bench.other.traces("r", "model_call", None)
    assert [each.key for each in every] == ["v1/dev.0 *"] * 3 + ["another"]


async def test_who_follows_a_trace_is_told_what_is_there_and_then_what_comes_each_once(bench: Bench):
    async def put(number: int) -> None:
        for key in ("k", "another"):
            await bench.bus.trace(Envelope("r", "training", key, (b'{"n":%d}' % number,)))

    for number in range(3):
        await put(number)
    told: list[bytes] = []
    async with aclosing(bench.other.traced("r", "training", "k")) as news:
        async for envelopes in news:
            told += [body for envelope in envelopes for body in envelope.lines]
            if len(told) >= 5:
                break
            await put(len(told))
    assert told == [b'{"n":%d}' % number for number in range(5)]


async def test_the_feed_hands_out_everything_once_and_the_same_batch_until_it_is_acked(bench: Bench):
    await opened(bench.bus, "r", note("a"), note("b"))
    await bench.bus.trace(Envelope("r", "log", "k", (b"{}",)))
    feed = bench.bus.feed("f", batch=2)
    offered = await anext(feed)
    await feed.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    await bench.bus.append("r", notes("r", (await bench.bus.history("r"))[0], "c"))
    assert await bench.bus.lag("f") == 5
    batches: list[tuple[str, int, int]] = []
    records: list[Record] = []
    async for batch in bench.other.feed("f", batch=500):
        batches.append((batch.stream.rstrip("_0123456789"), batch.first, batch.last))
        records.extend(batch.records)
        await batch.ack()
        if not await bench.bus.lag("f"):
            break
    assert (offered.first, offered.last) == (1, 2) and batches[0] == ("SIA", 1, 2)
    assert sorted(batches) == [("SIA", 1, 2), ("SIA", 3, 4), ("SIA_TRACE", 1, 1)]
    assert records == list(await bench.bus.history("r"))


async def test_on_a_server_what_comes_a_moment_later_is_handed_out_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(nats_bus, "FEED_S", 3.0)
    async with on_a_server(tmp_path / "nats") as bench:
        first, *_ = await opened(bench.bus, "r")
        feed = bench.bus.feed("f")
        await (await anext(feed)).ack()
        await bench.bus.append("r", notes("r", first, "a", producer="one"))
        coming = asyncio.ensure_future(anext(feed))
        await bench.bus.lag("f")  # one read or more has been answered since
        await bench.bus.append("r", notes("r", first, "b", producer="another"))
        assert texts((await coming).records) == ["a", "b"]


async def test_on_a_server_a_full_batch_is_followed_by_the_next_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(nats_bus, "FEED_S", 3600.0)
    async with on_a_server(tmp_path / "nats") as bench, asyncio.timeout(60):
        await opened(bench.bus, "r", note("a"), note("b"))
        feed = bench.bus.feed("f", batch=1)
        for text in ("RunStarted", "a", "b"):
            batch = await anext(feed)
            assert texts(batch.records) == [text]
            await batch.ack()


async def test_the_feed_makes_a_dead_letter_of_an_unknown_type_and_goes_on(bench: Bench):
    first, *_ = await opened(bench.bus, "r")
    wire = to_wire(first).replace(b'"RunStarted"', b'"NobodyKnows"')
    await bench.inject("r", "NobodyKnows", wire)
    await bench.bus.append("r", notes("r", first, "a"))
    for _ in range(2):
        await bench.bus.rewind("f")
        seen: list[Record] = []
        async for batch in bench.bus.feed("f"):
            seen.extend(batch.records)
            await batch.ack()
            if not await bench.bus.lag("f"):
                break
        assert texts(seen) == ["RunStarted", "a", "ServiceFailed"]
    letter = (await bench.bus.history("r"))[-1].event
    assert isinstance(letter, ServiceFailed)
    assert "NobodyKnows" in letter.error and await bench.blobs.get(letter.payload) == wire


# ---- what only a server can do


async def test_nothing_acknowledged_is_lost_and_nothing_doubled_when_the_server_is_killed_again_and_again(
    tmp_path: Path,
):
    store = tmp_path / "nats"
    async with running(store) as url, on(url) as one, on(url) as two:
        first, *_ = await opened(one, "r")
        stop = asyncio.Event()
        acknowledged: list[Record] = []

        async def write(bus: NatsBus, writer: str) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                drafts = notes("r", first, *"ab"[: 1 + number % 2], producer=f"{writer}{number}")
                acknowledged.extend(await bus.append("r", drafts))

        writers = [asyncio.create_task(write(bus, f"w{i}-")) for i, bus in enumerate((one, two, one))]
        for _ in range(4):
            count = len(acknowledged)
            await until(lambda count=count: len(acknowledged) > count + 20)
            kill_server(store)
        count = len(acknowledged)
        await until(lambda: len(acknowledged) > count + 20)
        stop.set()
        await asyncio.gather(*writers)
        async with on(url) as fresh:
            history = await fresh.history("r")
    assert [record.position for record in history] == list(range(1, len(history) + 1))
    assert broken_link(history) is None
    assert len({record.id for record in history}) == len(history)
    assert sorted(record.position for record in acknowledged) == list(range(2, len(history) + 1))


async def test_a_service_goes_on_after_the_server_was_killed(tmp_path: Path):
    store = tmp_path / "nats"
    got: list[str] = []

    async def answer(record: Record) -> None:
        got.append(texts([record])[0])

    async with running(store) as url, on(url) as bus:
        first, *_ = await opened(bus, "r", note("a"))
        async with serving(bus, "svc", ["RunResumed"], answer, "r"):
            await until(lambda: "a" in got)
            kill_server(store)
            await bus.append("r", notes("r", first, "b"))
            await until(lambda: "b" in got)
    assert [got[0], got[-1]] == ["a", "b"]


async def test_a_server_that_is_killed_again_and_again_does_not_wait_for_what_was_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(nats_serve, "WATCH_S", 0.2)
    store = tmp_path / "nats"
    got: list[str] = []

    async def answer(record: Record) -> None:
        got.append(texts([record])[0])

    async with running(store) as url, connect(url, MemoryBlobs(), SystemTime(), ack_wait=600) as bus:
        first, *_ = await opened(bus, "r")
        async with serving(bus, "svc", ["RunResumed"], answer, "r"):
            for text in "abcd":
                await bus.append("r", notes("r", first, text, producer=text))
                await until(lambda text=text: text in got)
                kill_server(store)
            await bus.append("r", notes("r", first, "e", producer="e"))
            await until(lambda: "e" in got)
    assert sorted(set(got)) == list("abcde")


async def test_a_second_append_finds_its_records_after_a_restart_and_beyond_the_dedup_window(tmp_path: Path):
    store = tmp_path / "nats"
    async with running(store) as url, on(url) as bus:
        client = await nats.connect(url)
        stream = await client.jetstream().stream_info("SIA")
        await client.jetstream().update_stream(stream.config.evolve(duplicate_window=0.1))
        await client.close()
        first, *_ = await opened(bus, "r")
        drafts = notes("r", first, "a", "b")
        stored = await bus.append("r", drafts)
    async with running(store) as url, on(url) as bus:
        assert list(await bus.append("r", drafts)) == list(stored)
        assert len(await bus.history("r")) == 3


async def test_a_run_whose_last_message_is_damaged_is_not_written_to_until_it_is_put_back(tmp_path: Path):
    store = tmp_path / "nats"
    async with running(store) as url, on(url) as bus:
        records = await opened(bus, "r", note("a"), note("to be damaged"))
        await opened(bus, "another")
    (block,) = (store / "jetstream/$G/streams/SIA/msgs").glob("*.blk")
    block.write_bytes(block.read_bytes().replace(b"to be damaged", b"to be dbmaged"))
    async with running(store) as url, on(url) as bus:
        assert len(await bus.history("r")) == 2
        async with asyncio.timeout(20):
            with pytest.raises(RunIncomplete, match="cannot read what it has there; nothing was written"):
                await bus.append("r", notes("r", records[0], "b"))
        assert await bus.streams.restore("r", records) == 1
        await bus.append("r", notes("r", records[0], "b"))
        async with on(url) as fresh:
            assert texts(await fresh.history("r")) == ["RunStarted", "a", "to be damaged", "b"]


async def test_only_the_runs_asked_about_last_are_kept_and_the_others_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(nats_runs, "KEPT_RUNS", 2)
    async with running(tmp_path / "nats") as url, on(url) as bus:
        for run in ("one", "two", "three"):
            first, *_ = await opened(bus, run, note("a"))
            await bus.append(run, notes(run, first, "b"))
        assert list(bus._runs._tails) == ["two", "three"]
        first = (await bus.history("one"))[0]
        await bus.append("one", notes("one", first, "c", producer="another"))
        assert texts(await bus.history("one")) == ["RunStarted", "a", "b", "c"]
        assert list(bus._runs._tails) == ["three", "one"]


async def test_an_old_process_number_that_is_another_users_now_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def denied(process: psutil.Process) -> list[str]:
        raise psutil.AccessDenied(process.pid)

    (tmp_path / "nats").mkdir()
    (tmp_path / "nats" / "server.json").write_text(json.dumps({"pid": os.getpid(), "name": "before"}))
    monkeypatch.setattr(psutil.Process, "cmdline", denied)
    async with running(tmp_path / "nats") as url, on(url) as bus:
        await opened(bus, "r")


async def test_serving_leaves_the_streams_as_they_were_made(tmp_path: Path):
    async with running(tmp_path / "nats") as url, on(url) as bus:
        client = await nats.connect(url)
        before = (await client.jetstream().stream_info("SIA")).config
        await opened(bus, "r", note("a"))
        got = asyncio.Event()

        async def answer(record: Record) -> None:
            got.set()

        async with serving(bus, "svc", ["RunResumed"], answer, "r"):
            await got.wait()
        after = (await client.jetstream().stream_info("SIA")).config
        consumers = await client.jetstream().consumers_info("SIA")
        await client.close()
    assert after == before
    assert (before.allow_atomic, before.deny_delete, before.deny_purge) == (True, True, True)
    assert (before.discard, before.storage, before.duplicate_window) == ("new", "file", 600)
    assert consumers == [], "a service of one run leaves no consumer behind"


async def test_a_stream_set_otherwise_is_put_right_or_refused(tmp_path: Path):
    async with running(tmp_path / "nats") as url:
        client = await nats.connect(url)
        jetstream = client.jetstream()
        loose = api.StreamConfig(name="SIA", subjects=["sia.events.>"], max_bytes=5 * 2**30, max_age=60)
        await jetstream.add_stream(loose)
        async with on(url) as bus:
            config = (await jetstream.stream_info("SIA")).config
            assert (config.discard, config.max_age, config.deny_delete, config.allow_atomic) == ("new", 0, True, True)
            assert config.max_bytes == 5 * 2**30, "an operator's larger limit stays"
            await opened(bus, "r")
        await jetstream.add_stream(api.StreamConfig(name="foreign", subjects=["sia.more.>"]))
        await jetstream.delete_stream("SIA_TRACE")
        memory = api.StreamConfig(
            name="SIA_TRACE", subjects=["sia.trace.>"], storage=api.StorageType.MEMORY, max_bytes=1000
        )
        await jetstream.add_stream(memory)
        with pytest.raises(StreamUnfit, match="SIA_TRACE"):
            async with on(url):
                pass
        await client.close()


async def test_a_full_stream_refuses_and_drops_nothing(tmp_path: Path):
    async with running(tmp_path / "nats") as url, on(url) as bus:
        first, *_ = await opened(bus, "r")
        client = await nats.connect(url)
        config = (await client.jetstream().stream_info("SIA")).config
        await client.jetstream().update_stream(config.evolve(max_bytes=20_000))
        for drafts in ([0], [0, 1]):
            with pytest.raises(BusFull, match="takes no more"):
                for number in range(100):
                    await bus.append(
                        "r", notes("r", first, *("x" * 500 for _ in drafts), producer=f"{len(drafts)} {number}")
                    )
        full = await bus.history("r")
        await client.jetstream().update_stream(config)
        await client.close()
        await bus.append("r", notes("r", first, "room again"))
        history = await bus.history("r")
    assert history[: len(full)] == full and len(history) == len(full) + 1 > 10


async def test_a_full_disk_stops_appends_and_room_starts_them_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nats_server, "HEALTH_S", 0.2)
    with small_disk(tmp_path, megabytes=100):
        async with running(tmp_path / "nats") as url, connect(url, MemoryBlobs(), SystemTime(), patience=3.0) as bus:
            first, *_ = await opened(bus, "r", note("a"))
            filler = fill(tmp_path)
            drafts = notes("r", first, "x" * 50_000)
            with pytest.raises(BusUnreachable, match="What it acknowledged is kept"):
                await bus.append("r", drafts)
            filler.unlink()
            async with asyncio.timeout(20):
                while len(await bus.history("r")) < 3:
                    with suppress(BusUnreachable):
                        await bus.append("r", drafts)
            assert texts(await bus.history("r"))[:2] == ["RunStarted", "a"]


async def test_a_large_envelope_is_split_and_a_larger_line_or_event_refused(tmp_path: Path):
    noise = random.Random(0)
    lines = tuple(noise.randbytes(1_000_000).replace(b"\n", b" ") for _ in range(12))
    async with running(tmp_path / "nats") as url, on(url) as bus:
        await bus.trace(Envelope("r", "log", "k", lines))
        found = await bus.traces("r", "log", "k")
        assert len(found) > 1 and tuple(line for each in found for line in each.lines) == lines
        with pytest.raises(ValueError, match="blob"):
            await bus.trace(Envelope("r", "log", "k", (noise.randbytes(9_000_000),)))
        for size in (2_000_000, 9_000_000):
            with pytest.raises(ValueError, match="blob"):
                await opened(bus, "r", note("x" * size))


async def test_a_stranger_among_the_traces_is_left_out(tmp_path: Path):
    async with running(tmp_path / "nats") as url, on(url) as bus:
        client = await nats.connect(url)
        for subject in ("sia.trace.r.log.k", "sia.trace.x"):
            await client.jetstream().publish(subject, b"not compressed")
        await client.close()
        envelope = Envelope("r", "log", "k", (b"{}",))
        await bus.trace(envelope)
        assert await bus.traces("r", "log", "k") == [envelope]
        batch = await anext(bus.feed("f"))
        assert (batch.first, batch.last, batch.envelopes) == (1, 3, ((3, envelope),))


async def test_a_finished_run_is_served_no_more(tmp_path: Path):
    async with running(tmp_path / "nats") as url, on(url) as bus:
        first, *_ = await opened(bus, "r", note("a"))
        await bus.append("r", notes("r", first, "b"))
        finished = RunFinished(outcome="no proven gain", best=None, sealed=None, reason="end")
        await bus.append("r", answers("r", first, "feedback_svc", [finished]))
        got: list[str] = []

        async def answer(record: Record) -> None:
            got.append(texts([record])[0])

        await opened(bus, "next", note("c"))
        async with serving(bus, "svc", ["RunResumed"], answer):
            await until(lambda: got == ["c"])


async def test_two_processes_share_a_service_and_keep_each_run_in_order(tmp_path: Path):
    async with running(tmp_path / "nats") as url, on(url) as one, on(url) as two:
        got: dict[str, list[str]] = {run: [] for run in ("r", "s", "t")}

        async def answer(record: Record) -> None:
            await asyncio.sleep(0.005)
            got[record.run].extend(texts([record]))

        async with serving(one, "svc", ["RunResumed"], answer), serving(two, "svc", ["RunResumed"], answer):
            for run in got:
                await opened(one, run, *(note(str(number)) for number in range(20)))
            await until(lambda: sum(map(len, got.values())) >= 60)
    assert all(texts == [str(number) for number in range(20)] for texts in got.values())


async def test_no_server_is_said_at_once():
    with pytest.raises(BusUnreachable, match=r"no NATS server answers at 127\.0\.0\.1:9") as said:
        async with connect("nats://secret@127.0.0.1:9", MemoryBlobs(), SystemTime()):
            pass
    assert "secret" not in str(said.value)


async def test_an_old_server_is_named():
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"version":"2.9.10","jetstream":true}\r\n')
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(BusUnreachable, match=r"nats-server 2\.9\.10; 2\.12 or later"):
            async with connect(f"nats://127.0.0.1:{port}", MemoryBlobs(), SystemTime()):
                pass
