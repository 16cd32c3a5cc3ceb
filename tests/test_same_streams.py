"""A home's log belongs to the streams that it was filled from: those of another server are refused, nothing mixes."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from bus_on import opened, until
from test_verify import block, flip, home, looked, on_home

from sia_events import app, dead_letters, oversight, verifying
from sia_events.catching_up import current_log
from sia_events.driver import open_stores
from sia_events.event_log.recorder import lag
from sia_events.home import hold
from sia_events.infra.nats_server import running
from sia_events.infra.nats_stored import NatsStreams
from sia_events.log_here import keep_log, open_log
from sia_events.reading import all_runs, records
from sia_events.rebuilding import rebuild
from sia_events.same_streams import WITNESS, OtherStreams
from sia_events.shared.events import RunSettings, RunStarted, RunSteered
from sia_events.shared.ports import BusUnreachable, Envelope
from sia_events.shared.record import opening
from sia_events.shared.settings import Settings
from sia_events.sweeping import sweep
from sia_events.verifying import verify

__all__ = ["home"]


async def other_server(place: Path, run: str = "r1") -> None:
    """Fill other streams, without a log, with another run of the same name."""
    async with app.stores(Settings(home=place)) as node:
        await node.bus.append(run, opening(run, [RunStarted(settings=RunSettings(seed=77), code="elsewhere")]))


async def test_another_server_under_the_same_home_is_refused_before_anything_is_written(home: Path, tmp_path: Path):
    """Both have a run r1: copied into one log they would be one run, with records of each."""
    async with current_log(Settings(home=home)):
        pass
    before = [record.wire for record in await records(Settings(home=home), "r1")]
    elsewhere = home / "elsewhere"
    await other_server(elsewhere)
    async with running(elsewhere / "nats") as url:
        there = Settings(home=home, nats_url=url)
        with pytest.raises(OtherStreams, match=r"from other streams.*Nothing was written.*another SIA_HOME"):
            async with open_stores(there, "run"):
                pass
        async with app.stores(there) as node:
            with pytest.raises(OtherStreams):
                async with asyncio.timeout(30):
                    await keep_log(there, node.bus, node.streams)
            assert len(await node.bus.history("r1")) == 1
    assert [record.wire for record in await records(Settings(home=home), "r1")] == before


async def test_a_log_that_never_told_what_it_was_filled_from_is_asked_itself(home: Path):
    """Earlier releases left no witness beside it."""
    (home / WITNESS).unlink(missing_ok=True)
    elsewhere = home / "elsewhere"
    await other_server(elsewhere, "r9")
    async with running(elsewhere / "nats") as url:
        there = Settings(home=home, nats_url=url)
        async with app.stores(there) as node:
            with pytest.raises(OtherStreams):
                async with asyncio.timeout(30):
                    await keep_log(there, node.bus, node.streams)


async def test_streams_that_were_lost_are_not_begun_anew_beside_their_log_until_it_has_put_them_back(
    home: Path, capsys: pytest.CaptureFixture[str]
):
    settings = Settings(home=home)
    async with current_log(settings):
        pass
    shutil.rmtree(home / "nats")
    with pytest.raises(OtherStreams, match="sia verify --all --repair"):
        async with open_stores(settings, "run"):
            pass
    # What the log has can still be read, and that it is a copy of nothing is told.
    assert {row["run"] for row in await all_runs(settings)} == {"r1", "r2", "b1"}
    assert capsys.readouterr().err.startswith(f"sia: the event log of {home} was filled from other streams")
    assert (await looked(home, repair=True))["left"] == []
    async with open_stores(settings, "run") as node:
        assert set(await node.bus.runs()) == {"r1", "r2", "b1"}


async def test_a_damaged_first_record_or_a_lost_run_makes_no_other_streams(home: Path):
    settings = Settings(home=home)
    async with open_log(settings) as log:
        run, first = await log.first_of_some_run() or ("", b"")
    flip(block(home), first[:40])
    (home / "copied.json").unlink(missing_ok=True)
    async with current_log(settings) as log:
        assert set(await log.runs()) == {"r1", "r2", "b1"}
    async with open_stores(settings, "run") as node:
        assert run in await node.streams.runs()


async def test_two_runs_of_one_name_are_told_apart_and_a_repair_replaces_neither(home: Path):
    async with current_log(Settings(home=home)):
        pass
    before = [record.wire for record in await records(Settings(home=home), "r1")]
    elsewhere = home / "elsewhere"
    await other_server(elsewhere)
    async with running(elsewhere / "nats") as url:
        there = Settings(home=home, nats_url=url)
        told = await verify(there, "r1", True, None)
        (first,) = [each for each in told["left"] if each["store"] == "tables" and each["place"] == "position 1"]
        assert first["kind"] == "altered" and "two histories of one name" in first["detail"]
        async with app.stores(there) as node:
            assert len(await node.bus.history("r1")) == 1
    assert [record.wire for record in await records(Settings(home=home), "r1")] == before


async def test_a_log_is_not_emptied_over_other_streams(home: Path):
    settings = Settings(home=home)
    shutil.move(home / "nats", home / "away")
    await other_server(home)
    with pytest.raises(OtherStreams):
        await rebuild(settings)
    async with open_log(settings) as log:
        assert len(await log.wires("r1")) > 10


async def test_what_people_say_to_a_run_is_not_said_to_another_servers(home: Path):
    elsewhere = home / "elsewhere"
    await other_server(elsewhere)
    async with running(elsewhere / "nats") as url:
        there = Settings(home=home, nats_url=url)
        with pytest.raises(OtherStreams):
            await oversight.say(there, "r1", lambda _: RunSteered(text="no more"))
        with pytest.raises(OtherStreams):
            await dead_letters.drop(there, "r1", 3, "tester", "no more")
        with pytest.raises(OtherStreams):
            await sweep(there, remove=True)
        async with app.stores(there) as node:
            assert len(await node.bus.history("r1")) == 1


async def test_a_witness_that_cannot_be_kept_or_read_costs_a_look_into_the_log(home: Path):
    (home / WITNESS).unlink(missing_ok=True)
    (home / WITNESS).mkdir()
    async with open_stores(Settings(home=home), "run") as node:
        assert "r1" in await node.bus.runs()
    (home / WITNESS).rmdir()
    (home / WITNESS).write_text('{"log": "')
    async with open_stores(Settings(home=home), "run"):
        assert json.loads((home / WITNESS).read_text())["run"] in ("r1", "r2", "b1")


@pytest.mark.parametrize("partitions", [1, 8])
async def test_a_repair_that_is_cut_short_over_streams_that_were_lost_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partitions: int
):
    """Sequences count from 1 on a new stream: what is put back must not stand where another still is in the tables."""
    said = {run: [f'{{"text":"{run} {number}"}}'.encode() for number in range(4)] for run in ("r1", "r2")}

    async def written(node: app.Node) -> None:
        for run in said:
            await opened(node.bus, run)
        for number in range(4):
            for run, lines in said.items():
                await node.bus.trace(Envelope(run, "log", "a", (lines[number],)))

    async def told(node: app.Node) -> dict[str, list[bytes]]:
        found = {run: await node.bus.traces(run, "log", "a") for run in said}
        return {run: [line for each in envelopes for line in each.lines] for run, envelopes in found.items()}

    await on_home(tmp_path, written, partitions=partitions)
    shutil.rmtree(tmp_path / "nats")
    put, left = NatsStreams.put_back, 6

    async def cut_short(self: NatsStreams, lost: Sequence[tuple[int, Envelope]]) -> None:
        nonlocal left
        for each in lost:
            if left == 0:
                raise BusUnreachable("cut off")
            await put(self, [each])
            left -= 1

    with monkeypatch.context() as patched:
        patched.setattr(NatsStreams, "put_back", cut_short)
        patched.setattr(verifying, "PATIENCE_S", 0.0)
        with pytest.raises(BusUnreachable):
            await looked(tmp_path, repair=True, partitions=partitions)
    await all_runs(Settings(home=tmp_path, partitions=partitions))
    assert (await looked(tmp_path, repair=True, partitions=partitions))["left"] == []
    assert await on_home(tmp_path, told, partitions=partitions) == said
    again = await looked(tmp_path, partitions=partitions)
    assert (again["left"], again["lines"]) == ([], 8)


async def test_a_home_without_its_log_and_streams_begins_anew(home: Path):
    settings = Settings(home=home)
    async with current_log(settings):
        pass
    assert (home / WITNESS).exists()
    shutil.rmtree(home / "nats")
    shutil.rmtree(home / "log")
    async with open_stores(settings, "run") as node:
        assert await node.bus.runs() == []


async def test_the_recorder_leaves_a_witness_that_opening_a_run_needs_no_log_for(home: Path):
    settings = Settings(home=home)
    (home / WITNESS).unlink(missing_ok=True)
    async with hold(settings, "test"), app.stores(settings) as node:
        keeping = asyncio.create_task(keep_log(settings, node.bus, node.streams))
        await until((home / WITNESS).exists, 30)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    shutil.move(home / "log", home / "away")
    async with open_stores(settings, "run"):
        assert not (home / "log").exists()
    assert await on_home(home, lambda node: node.bus.runs(), copy=False)


async def test_what_comes_behind_a_streams_lost_end_is_copied_and_no_lag_is_hidden(tmp_path: Path):
    """A server drops what stands behind damage: its next messages get sequences that were copied before."""

    async def one(node: app.Node, run: str = "a") -> None:
        await opened(node.bus, run)
        await node.bus.trace(Envelope(run, "log", "k", (f'{{"text":"{run}"}}'.encode(),)))

    await on_home(tmp_path, one)
    histories = tmp_path / "nats" / "jetstream" / "$G" / "streams"
    for stream in ("SIA", "SIA_TRACE"):
        shutil.copytree(histories / stream, tmp_path / "before" / stream)
    await on_home(tmp_path, lambda node: one(node, "b"))
    for stream in ("SIA", "SIA_TRACE"):
        shutil.rmtree(histories / stream)
        shutil.copytree(tmp_path / "before" / stream, histories / stream)
    async with hold(Settings(home=tmp_path), "test"), app.stores(Settings(home=tmp_path)) as node:
        await opened(node.bus, "c")
        assert await lag(node.bus) > 0
    assert {row["run"] for row in await all_runs(Settings(home=tmp_path))} == {"a", "b", "c"}
    found = await looked(tmp_path, repair=True)
    assert found["left"] == []
    assert {row["run"] for row in await all_runs(Settings(home=tmp_path))} == {"a", "b", "c"}
