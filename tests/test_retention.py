"""What history may take: sizes of streams, and traces that go by their age while everything that is left is whole."""

import asyncio
from pathlib import Path

import pytest
from bus_on import opened
from nats.js import api

from sia_events import app, archiving, sweeping
from sia_events.event_log import recorder
from sia_events.home import hold
from sia_events.infra.clickhouse import TRACES, ClickHouseLog, connect
from sia_events.infra.nats_streams import DAY_S
from sia_events.log_here import open_log
from sia_events.shared.ports import BusFull, Envelope
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
    for run in (None, "r1"):
        found = await verify(settings, run, repair=False, source=None)
        assert (found["findings"], found["lines"]) == ([], 1)
    assert (await sweeping.sweep(settings, remove=False))["blobs"] == []
    assert (await archiving.archive_run(settings, "r1", tmp_path / "r1.sia.tar.zst", answers=False))["runs"] == ["r1"]


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
