"""`sia status`: what it tells of a home without services, of one that serves, and of ClickHouse's own tables."""

from pathlib import Path

from bus_on import notes, opened
from command import answered, sia

from sia_events import app
from sia_events.event_log import recorder
from sia_events.home import hold, only_one
from sia_events.log_here import NAME, open_log
from sia_events.shared.events import RunFinished, ServiceFailed
from sia_events.shared.record import answers, place
from sia_events.shared.settings import Settings
from sia_events.status import status

LETTER = ServiceFailed(service="tester", failed=None, sequence=9, error="E: no", payload="0" * 64, tries=1)


async def test_a_home_that_nothing_was_done_in_is_told_of(tmp_path: Path):
    found = await status(Settings(home=tmp_path))
    assert (found["process"], found["up"], found["lag"], found["letters"], found["runs"]) == (None, [], 0, 0, {})
    assert [each["stream"] for each in found["streams"]] == ["SIA", "SIA_TRACE", "SIA_PLACES", "SIA_ADVISORIES"]
    assert all(each["limit"] for each in found["streams"])


async def test_the_lag_is_what_the_recorder_has_not_copied_and_letters_are_counted(tmp_path: Path):
    settings = Settings(home=tmp_path)
    async with hold(settings, "test"), app.stores(settings) as node:
        first, *_ = await opened(node.bus, "r1", LETTER)
        async with open_log(settings) as log:
            await recorder.catch_up(node.bus, log)
        await node.bus.append("r1", notes("r1", first, "a", "b"))
    found = await status(settings)
    assert found["lag"] == 2 and found["streams"][0]["lag"] == 2 and found["streams"][0]["messages"] == 4
    assert found["letters"] == 1 and found["runs"] == {"interrupted": 1}
    assert {each["table"]: each["rows"] for each in found["tables"]}["events"] == 2
    with only_one(NAME, settings):
        assert (await status(settings))["up"] == [NAME]


async def test_runs_that_are_over_are_told_by_the_tables_and_not_read_again(tmp_path: Path):
    settings = Settings(home=tmp_path)
    async with hold(settings, "test"), app.stores(settings) as node, open_log(settings) as log:
        first, *_ = await opened(node.bus, "r1")
        await recorder.catch_up(node.bus, log)
        # Only the tables have it: whoever reads the run on the stream finds it running.
        (end,) = answers(
            "r1", first, "feedback_svc", [RunFinished(outcome="failed", best=None, sealed=None, reason="")]
        )
        await log.append([place(end, "r1", 2, first.chain, first.time)], "end")
    assert (await status(settings))["runs"] == {"finished": 1}


async def test_a_log_that_lies_in_torn_parts_is_told_of_and_everything_else_with_it(tmp_path: Path):
    settings = Settings(home=tmp_path)
    async with hold(settings, "test"), app.stores(settings) as node:
        await opened(node.bus, "r1")
        async with open_log(settings) as log:
            await recorder.catch_up(node.bus, log)
    for file in (tmp_path / "log/store").rglob("data.bin"):
        if "`record`" in (file.parent / "columns.txt").read_text():
            body = bytearray(file.read_bytes())
            body[len(body) // 2 :] = bytes(len(body) - len(body) // 2)
            file.write_bytes(body)
    found = await status(settings)
    assert found["log"] and found["tables"] == [] and found["runs"] == {"interrupted": 1} and found["lag"] == 0


def test_the_command_tells_people_and_programs(tmp_path: Path):
    assert answered(tmp_path, "status")["process"] is None
    done = sia(tmp_path, "status")
    assert done.returncode == 0 and "nobody runs services here" in done.stdout and "SIA_TRACE" in done.stdout


async def test_the_embedded_engine_writes_no_tables_of_its_own(tmp_path: Path):
    settings = Settings(home=tmp_path)
    async with open_log(settings) as log:
        for _ in range(3):
            await log.query("SELECT count() FROM events")
        found = await log.query("SELECT name FROM system.tables WHERE database = 'system' AND engine LIKE '%MergeTree'")
    assert found == [] and (await status(settings))["unbounded"] == []
