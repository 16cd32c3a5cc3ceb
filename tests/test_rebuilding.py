"""The tables filled anew: by nobody while they alone have something, and unasked where they are gone."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_verify import block, flip, home, looked, on_home, parts

from sia_events import app, log_here
from sia_events.errors import Unusable
from sia_events.event_log import recorder
from sia_events.home import hold
from sia_events.infra.blobs import BlobsUnavailable
from sia_events.infra.clickhouse import ClickHouseLog, QueryRefused
from sia_events.log_here import open_log
from sia_events.reading import all_runs
from sia_events.rebuilding import rebuild
from sia_events.shared.ports import Envelope
from sia_events.shared.settings import Settings

__all__ = ["home"]


def lose_a_trace(home: Path) -> None:
    body = block(home, "SIA_TRACE").read_bytes()
    flip(block(home, "SIA_TRACE"), body[body.index(b"sia.trace.r1.log.a") + 25 :][:8])


def lose_a_record(home: Path) -> None:
    flip(block(home), b"note 7 of r1")


def torn(home: Path, column: bytes) -> Path:
    """A file, damaged, of the biggest part of the table that has such a column."""
    file = next(f for f in parts(home, "data.bin") if column in (f.parent / "columns.txt").read_bytes())
    flip(file)
    return file


@pytest.mark.parametrize("lose", [lose_a_trace, lose_a_record])
async def test_tables_that_alone_have_what_a_stream_lost_are_not_emptied_until_it_is_put_back(home: Path, lose: Any):
    settings = Settings(home=home)
    lose(home)
    with pytest.raises(Unusable, match=r"streams lost of r1, and would be lost; nothing was removed.*--repair"):
        await rebuild(settings)
    assert (await looked(home, repair=True))["left"] == [] and await rebuild(settings) == 3
    assert (await looked(home))["left"] == []


async def test_what_torn_tables_alone_have_is_put_back_before_they_are_filled_anew(home: Path):
    lose_a_trace(home)
    torn(home, b"`producer`")
    assert (await looked(home, repair=True))["left"] == []
    again = await looked(home)
    assert again["left"] == [] and again["lines"] == 8


async def test_tables_that_are_torn_where_they_alone_may_have_something_are_emptied_by_nobody_unasked(home: Path):
    settings = Settings(home=home)
    lose_a_trace(home)
    file = torn(home, b"`kind`")
    damaged = file.read_bytes()
    found = await looked(home, repair=True)
    assert any("sia rebuild --lose-old-traces" in each["detail"] for each in found["left"])
    assert file.read_bytes() == damaged
    with pytest.raises(Unusable, match="nothing was removed"):
        await rebuild(settings)
    assert await rebuild(settings, lose_old=True) == 3
    assert (await looked(home))["lines"] == 8 - 3


async def test_tables_that_are_not_told_of_for_want_of_memory_are_taken_for_torn_by_nobody(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    async def refused(self: ClickHouseLog, run: str) -> None:
        raise QueryRefused("Code: 241. MEMORY_LIMIT_EXCEEDED")

    with monkeypatch.context() as short:
        short.setattr(ClickHouseLog, "rows", refused)
        with pytest.raises(Unusable, match=r"do not tell of run b1, though no part is torn.*MEMORY_LIMIT"):
            await looked(home, repair=True)
    assert (await looked(home))["findings"] == []


@pytest.mark.parametrize("marked", [False, True])
async def test_a_log_that_is_gone_is_filled_at_the_next_look_whatever_was_copied_before(home: Path, marked: bool):
    before = await all_runs(Settings(home=home))
    shutil.rmtree(home / "log")
    if not marked:
        (home / log_here.COPIED).unlink(missing_ok=True)
    assert await all_runs(Settings(home=home)) == before and len(before) == 3
    assert (await looked(home))["findings"] == []


async def test_what_the_engine_refuses_costs_lag_and_no_run(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    taken, refusals = recorder.store, ["Code: 241. MEMORY_LIMIT_EXCEEDED", "Code: 252. TOO_MANY_PARTS"]

    async def store(*batch: Any) -> None:
        if refusals:
            raise QueryRefused(refusals.pop())
        await taken(*batch)

    monkeypatch.setattr(recorder, "store", store)
    monkeypatch.setattr(log_here, "ROOM_S", 0.01)
    settings = Settings(home=home)
    shutil.rmtree(home / "log")
    async with hold(settings, "test"), app.stores(settings) as node:
        keeping = asyncio.create_task(log_here.keep_log(settings, node.bus, node.streams))
        async with asyncio.timeout(60):
            while refusals or await recorder.lag(node.bus):
                assert not keeping.done()
                await asyncio.sleep(0.05)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    assert "the log does not take what comes: Code: 252" in capsys.readouterr().err
    assert (await looked(home))["findings"] == []


@pytest.mark.parametrize("place", ["nowhere", "file", "odd://bucket"])
async def test_blobs_to_repair_from_that_are_none_are_refused_before_anything_is_written(home: Path, place: str):
    (home / "file").touch()
    where = place if "://" in place else str(home / place)
    lose_a_record(home)
    before = block(home).read_bytes()
    with pytest.raises((Unusable, BlobsUnavailable), match=place):
        await looked(home, repair=True, source=where)
    assert block(home).read_bytes() == before and not (home / "nowhere").exists()


async def test_lines_that_are_no_text_are_put_back_byte_for_byte(tmp_path: Path):
    sent = Envelope("r1", "log", "a", (b"\xff\x00{}", b'{"text":"a"}'))
    await on_home(tmp_path, lambda node: node.bus.trace(sent))
    async with open_log(Settings(home=tmp_path)) as log:
        assert list(await log.envelopes("r1", [1])) == [(1, sent)]
