"""A branch finds the record that it leaves its parent behind, without reading the parent: or it reads, and says why."""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from bus_on import branch, note, notes, of_a_later_release, on, opened

from sia_events.infra.nats import NatsBus
from sia_events.infra.nats_partitions import WHOLE
from sia_events.infra.nats_seek import NEAR, seek
from sia_events.infra.nats_server import running
from sia_events.infra.nats_streams import publish
from sia_events.infra.tail import RunTooNew
from sia_events.shared.record import answers, broken_link, opening

LONG = 3 * NEAR


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[NatsBus]:
    async with running(tmp_path / "nats") as url, on(url) as bus:
        yield bus


async def test_every_record_is_found_wherever_those_of_others_stand_between(bus: NatsBus):
    dice = random.Random(7)
    first, *_ = await opened(bus, "r", *map(note, "ab"))
    other, *_ = await opened(bus, "s")
    for number in range(24):
        run, cause = ("r", first) if dice.random() < 0.5 else ("s", other)
        await bus.append(run, notes(run, cause, *"x" * dice.choice((1, 2, 40)), producer=f"p{number}"))
    for run in "rs":
        history = await bus.history(run)
        assert len(history) > LONG
        for record in (history[0], *dice.sample(history, 16), history[-1]):
            assert await seek(bus._nats.client, WHOLE, run, record.position) == record


async def test_a_branch_of_a_long_run_reads_next_to_nothing_of_it(tmp_path: Path):
    async with running(tmp_path / "nats") as url, on(url) as bus, on(url) as another:
        first, *_ = await opened(bus, "parent")
        for number in range(4):
            await bus.append("parent", notes("parent", first, *"x" * 1000, producer=f"p{number}"))
        client, parent = another._nats.client, await bus.history("parent")
        for name, at in (("early", 5), ("midway", 2500), ("late", len(parent))):
            before = client.stats["in_msgs"]
            (fork,) = await another.append(name, opening(name, [branch("parent", at)]))
            assert client.stats["in_msgs"] - before < 3 * NEAR
            assert fork.position == at + 1 and broken_link([fork], parent[at - 1].chain) is None


async def test_what_a_branch_inherits_is_found_in_the_run_that_has_it(bus: NatsBus):
    await opened(bus, "a", *map(note, "x" * LONG))
    (fork,) = await bus.append("b", opening("b", [branch("a", LONG)]))
    await bus.append("b", notes("b", fork, *"y" * LONG))
    await bus.append("c", opening("c", [branch("b", LONG + 9)]))
    for at in (1, LONG, LONG + 1, LONG + 9):
        assert await seek(bus._nats.client, WHOLE, "c", at) == (await bus.history("c"))[at - 1]


async def test_among_messages_that_are_no_records_of_the_run_reading_tells(bus: NatsBus):
    first, *_ = await opened(bus, "r", *map(note, "x" * LONG))
    client, wire = bus._nats.client, (await bus.history("r"))[1].wire
    for body in (b"junk", wire):
        await publish(client, [("sia.events.r.RunResumed", body, {})])
    await bus.append("r", notes("r", first, *"y" * LONG))
    history = await bus.history("r")
    assert await seek(client, WHOLE, "r", LONG + 50) is None
    (fork,) = await bus.append("b", opening("b", [branch("r", LONG + 50)]))
    assert fork.position == LONG + 51 and broken_link([fork], history[LONG + 49].chain) is None


async def test_a_run_that_a_later_release_writes_to_is_not_branched(bus: NatsBus):
    first, *_ = await opened(bus, "r", *map(note, "x" * LONG))
    last = (await bus.history("r"))[-1]
    draft = answers("r", first, "later", [note("z")])[0]
    wire = of_a_later_release(draft, last.position + 1, last.chain, last.time)
    await publish(bus._nats.client, [("sia.events.r.RunResumed", wire, {})])
    with pytest.raises(RunTooNew):
        await bus.append("b", opening("b", [branch("r", 5)]))
