"""A home's log belongs to the streams that it was filled from: those of another server are refused, nothing mixes."""

import asyncio
import shutil
from pathlib import Path

import pytest
from bus_on import until
from test_verify import block, flip, home, looked, on_home

from sia_events import app
from sia_events.catching_up import current_log
from sia_events.driver import open_stores
from sia_events.home import hold
from sia_events.infra.nats_server import running
from sia_events.log_here import keep_log, open_log
from sia_events.reading import all_runs, records
from sia_events.same_streams import WITNESS, OtherStreams
from sia_events.shared.events import RunSettings, RunStarted
from sia_events.shared.record import opening
from sia_events.shared.settings import Settings

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
