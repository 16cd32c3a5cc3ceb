"""What history may take: sizes of streams, and traces that go by their age while everything that is left is whole."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bus_on import opened
from nats.js import api

from sia_events import app, archiving, sweeping, verifying
from sia_events.errors import Unusable
from sia_events.event_log import recorder
from sia_events.home import hold
from sia_events.infra.clickhouse import TRACES, ClickHouseLog, connect
from sia_events.infra.nats_streams import DAY_S
from sia_events.log_here import open_log
from sia_events.rebuilding import rebuild
from sia_events.shared.ports import BusFull, Envelope, Traced
from sia_events.shared.settings import Settings
from sia_events.verifying import verify


async def config_of(node: app.Node, stream: str) -> api.StreamConfig:
    return (await node.bus._nats.client.jetstream().stream_info(stream)).config  # type: ignore[attr-defined]


async def traced(node: app.Node, *texts: str) -> None:
    for text in texts:
        await node.bus.trace(Envelope("r1", "log", "k", (b'{"text":"%b"}' % text.encode(),)))


async def copied(settings: Settings, node: app.Node) -> None:
    async with open_log(settings) as log:
        await recorder.catch_up(node.bus, log)


async def aged(node: app.Node) -> None:
    """Let every trace there is grow too old: what a day does, a second does when the stream is told so."""
    jetstream = node.bus._nats.client.jetstream()  # type: ignore[attr-defined]
    found = await config_of(node, "SIA_TRACE")
    await jetstream.update_stream(found.evolve(max_age=1, duplicate_window=1))
    while (await jetstream.stream_info("SIA_TRACE")).state.messages:  # noqa: ASYNC110 - the server tells nobody
        await asyncio.sleep(0.1)


async def test_traces_that_went_by_their_age_are_not_missed_and_the_later_ones_are_whole(tmp_path: Path):
    settings = Settings(home=tmp_path, trace_days=1)
    async with hold(settings, "test"), app.stores(settings) as node:
        await opened(node.bus, "r1")
        await traced(node, "copied", "copied too")
        await copied(settings, node)
        await traced(node, "never copied")
        await aged(node)
        assert await recorder.lag(node.bus) == 0, "nobody can copy what is gone"
    async with hold(settings, "test"), app.stores(settings) as node:
        assert (await config_of(node, "SIA_TRACE")).max_age == DAY_S, "the setting is held up"
        await traced(node, "later")
        assert await node.streams.first("SIA_TRACE") == 4 and await node.streams.lost("SIA_TRACE") == (4, [])
        await copied(settings, node)
        assert await recorder.lag(node.bus) == 0
    for_ever = Settings(home=tmp_path)
    for each, run in ((settings, None), (settings, "r1"), (for_ever, None), (for_ever, "r1")):
        found = await verify(each, run, repair=False, source=None)
        assert (found["findings"], found["lines"]) == ([], 1)
    assert (await sweeping.sweep(settings, remove=False))["blobs"] == []
    assert (await archiving.archive_run(settings, "r1", tmp_path / "r1.sia.tar.zst", answers=False))["runs"] == ["r1"]


async def test_an_archive_is_restored_where_the_oldest_of_its_traces_went_by_their_age(tmp_path: Path):
    settings, file = Settings(home=tmp_path / "home", trace_days=1), tmp_path / "r1.sia.tar.zst"

    async def left(node: app.Node) -> list[bytes]:
        return [line async for _, envelope in node.streams.envelopes("r1") for line in envelope.lines]

    async with hold(settings, "test"), app.stores(settings) as node:
        await opened(node.bus, "r1")
        await traced(node, "old", "young", "lost when it was put back")
    await archiving.archive_run(settings, "r1", file, answers=False)
    async with hold(settings, "test"), app.stores(settings) as node:
        await aged(node)
    async with hold(settings, "test"), app.stores(settings) as node:
        await traced(node, "young")
    await archiving.restore(settings, file)
    async with hold(settings, "test"), app.stores(settings) as node:
        assert await left(node) == [b'{"text":"young"}', b'{"text":"lost when it was put back"}']
        await aged(node)
    async with hold(settings, "test"), app.stores(settings) as node:
        await traced(node, "another")
    with pytest.raises(Unusable, match="other traces"):
        await archiving.restore(settings, file)


async def test_tables_may_keep_traces_for_longer_than_streams_and_an_archive_has_them_still(tmp_path: Path):
    settings, file = Settings(home=tmp_path / "home", trace_days=1, trace_table_days=0), tmp_path / "r1.sia.tar.zst"
    async with hold(settings, "test"), app.stores(settings) as node:
        await opened(node.bus, "r1")
        await traced(node, "first", "second")
        await copied(settings, node)
        await aged(node)
    async with hold(settings, "test"), app.stores(settings) as node:
        await traced(node, "third")
        await copied(settings, node)
    assert (await verify(settings, "r1", repair=False, source=None))["findings"] == []
    with pytest.raises(Unusable, match="traces of run r1 stand in the tables alone"):
        await rebuild(settings)
    await archiving.archive_run(settings, "r1", file, answers=False)
    elsewhere = Settings(home=tmp_path / "elsewhere")
    for home, left in ((elsewhere, ["first", "second", "third"]), (settings, ["third"])):
        await archiving.restore(home, file)
        async with hold(home, "test"), app.stores(home) as node:
            there = [json.loads(line)["text"] async for _, e in node.streams.envelopes("r1") for line in e.lines]
        assert there == left, "what went by its age stays gone from the stream that has an age"
    assert await rebuild(settings, lose_old=True) == 1
    async with open_log(settings) as log:
        assert [sequence for sequence, _, _ in await log.lines("r1")] == [3]


async def test_what_was_put_back_before_the_rest_went_by_its_age_is_not_in_an_archive_twice(tmp_path: Path):
    settings, file = Settings(home=tmp_path / "home", trace_days=1, trace_table_days=0), tmp_path / "r1.sia.tar.zst"
    async with hold(settings, "test"), app.stores(settings) as node:
        await opened(node.bus, "r1")
        await traced(node, "first", "second")
        await copied(settings, node)
        await aged(node)
    async with hold(settings, "test"), app.stores(settings) as node:
        # A message of the repair stands behind what it is in place of, and so is there when that is gone.
        await node.streams.put_back([(1, Envelope("r1", "log", "k", (b'{"text":"first"}',)))])
    told = await archiving.archive_run(settings, "r1", file, answers=False)
    assert told["left_out"] == []
    elsewhere = Settings(home=tmp_path / "elsewhere")
    await archiving.restore(elsewhere, file)
    async with hold(elsewhere, "test"), app.stores(elsewhere) as node:
        there = [json.loads(line)["text"] async for _, e in node.streams.envelopes("r1") for line in e.lines]
    assert there == ["first", "second"]


async def test_torn_tables_that_alone_may_have_old_traces_are_emptied_by_nobody_unasked(tmp_path: Path):
    settings = Settings(home=tmp_path, trace_days=1, trace_table_days=0)
    async with hold(settings, "test"), app.stores(settings) as node:
        await opened(node.bus, "r1")
        await traced(node, "old")
        await copied(settings, node)
        await aged(node)
    (file,) = [
        f for f in (tmp_path / "log/store").rglob("data.bin") if b"`kind`" in (f.parent / "columns.txt").read_bytes()
    ]
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)
    mended = await verify(settings, None, repair=True, source=None)
    assert mended["left"] and all("sia rebuild --lose-old-traces" in each["detail"] for each in mended["left"])
    assert file.read_bytes() == body
    with pytest.raises(Unusable, match="nothing was removed"):
        await rebuild(settings)
    assert await rebuild(settings, lose_old=True) == 1
    assert (await verify(settings, None, repair=False, source=None))["findings"] == []


class AgedMeanwhile:
    """Streams whose traces go by their age between the moment they are counted and the moment they are read."""

    def __init__(self, node: app.Node) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node.streams, name)

    async def traced(self, run: str) -> AsyncIterator[Traced]:
        await aged(self._node)
        async for message in self._node.streams.traced(run):
            yield message


async def test_traces_that_go_by_their_age_while_they_are_read_are_not_taken_for_lost(tmp_path: Path):
    settings = Settings(home=tmp_path, trace_days=1)
    async with hold(settings, "test"), app.stores(settings) as node, open_log(settings) as log:
        await opened(node.bus, "r1")
        await traced(node, "copied", "copied too")
        await recorder.catch_up(node.bus, log)
        await traced(node, "never copied")
        looked = await verifying._look(settings, replace(node, streams=AgedMeanwhile(node)), log, ["r1"], False)
        assert looked.findings == []
        await node.bus._nats.client.jetstream().update_stream(  # type: ignore[attr-defined]
            (await config_of(node, "SIA_TRACE")).evolve(max_age=DAY_S)
        )
        await traced(node, "one more", "another")
        left_out: list[str] = []
        aging = replace(node, streams=AgedMeanwhile(node))
        archived = [each.lines async for each in archiving._traces(aging, log, "r1", left_out)]
        assert archived == [(b'{"text":"copied"}',), (b'{"text":"copied too"}',)] and left_out == []


async def test_a_trace_that_the_tables_lack_is_still_found_behind_those_that_went_by_their_age(tmp_path: Path):
    settings = Settings(home=tmp_path, trace_days=1)
    async with hold(settings, "test"), app.stores(settings) as node:
        await opened(node.bus, "r1")
        await traced(node, "old")
        await aged(node)
    async with hold(settings, "test"), app.stores(settings) as node:
        await traced(node, "here", "lost", "here too")
        await copied(settings, node)
        async with open_log(settings) as log:
            await log.remove_lines("r1", [3])
    told = await verify(settings, "r1", repair=False, source=None)
    assert [(f["kind"], f["store"], f["place"]) for f in told["findings"]] == [
        ("missing", "tables", "trace sequence 3")
    ]


async def test_streams_are_of_the_size_that_is_set_and_refuse_beyond_it(tmp_path: Path):
    small = Settings(home=tmp_path, trace_gb=2**-16, events_gb=0.5)  # 16 KiB
    async with hold(small, "test"), app.stores(small) as node:
        assert (await config_of(node, "SIA")).max_bytes == 2**29
        with pytest.raises(BusFull, match="SIA_TRACE"):
            for number in range(100):
                await traced(node, "".join(map(str, range(number, 400 + number))))
        before = (await node.streams.sizes(recorder.NAME))[1]
    large = Settings(home=tmp_path, trace_gb=20)
    async with hold(large, "test"), app.stores(large) as node:
        assert (await config_of(node, "SIA_TRACE")).max_bytes == 20 * 2**30, "its server has the room for it"
        assert (await config_of(node, "SIA")).max_bytes == 2 * 2**30
        await traced(node, "goes on")
    async with hold(small, "test"), app.stores(small) as node:
        after = (await node.streams.sizes(recorder.NAME))[1]
        assert after.messages == before.messages + 1, "nothing is dropped to make a stream smaller"


async def test_rows_of_traces_go_so_many_days_after_they_came(tmp_path: Path):
    log: ClickHouseLog = await asyncio.to_thread(connect, f"chdb://{tmp_path / 'log'}")
    try:
        await log.append_traces([(1, Envelope("r", "log", "k", (b"{}", b"{}")))], "batch")
        old = "INSERT INTO trace (run, kind, key, sequence, line, body, stored) VALUES "
        log._writer.command(f"{old} ('r', 'log', 'k', 2, 0, '{{}}', now() - INTERVAL 50 HOUR)")
        for days, left in ((3, [1, 1, 2]), (None, [1, 1, 2]), (2, [1, 1])):
            await log.keep_traces(days)
            await log.keep_traces(days)
            log._writer.command("OPTIMIZE TABLE trace FINAL")
            rows = await log.query("SELECT sequence FROM trace ORDER BY sequence")
            assert [row["sequence"] for row in rows] == left
        told = await log.query("SELECT name FROM system.tables WHERE engine_full LIKE '% TTL %'")
        assert sorted(row["name"] for row in told) == sorted(TRACES), "records stay for ever"
    finally:
        await log.close()
