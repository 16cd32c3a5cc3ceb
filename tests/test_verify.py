"""`sia verify` on the real stream, the real tables and real blobs: real bits are flipped in their files."""

import asyncio
import gc
import json
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import nats
import pytest
from bus_on import forged_branch, note, notes, opened
from command import SMALL, read, sia, start, told
from story import logged

from sia_events import app, verifying
from sia_events.event_log import recorder
from sia_events.home import hold
from sia_events.infra.nats_server import running
from sia_events.infra.tail import RunIncomplete
from sia_events.log_here import open_log
from sia_events.rebuilding import rebuild
from sia_events.shared.events import RunBranched, RunSettings, RunSteered, ServiceFailed
from sia_events.shared.ports import Envelope
from sia_events.shared.record import Record, answers, broken_link, opening
from sia_events.shared.settings import Settings
from sia_events.verifying import verify

NOTES = 12


async def on_home(
    home: Path, work: Callable[[app.Node], Awaitable[Any]], copy: bool = True, partitions: int = 1
) -> Any:
    """Do something to the home's stores, as whoever holds it, and have it copied into the tables."""
    settings = Settings(home=home, partitions=partitions)
    async with hold(settings, "test"), app.stores(settings) as node:
        done = await work(node)
        if copy:
            async with open_log(settings) as log:
                await recorder.catch_up(node.bus, log)
        return done


async def filled(node: app.Node) -> None:
    """Two runs of notes and traces, a branch of the first, and blobs that a record names."""
    for run in ("r1", "r2"):
        first, *_ = await opened(node.bus, run)
        for number in range(NOTES):
            await node.bus.append(run, notes(run, first, f"note {number} of {run}", producer=f"tester {number}"))
        lines = tuple(f'{{"text":"line {line} of {run}"}}'.encode() for line in range(3))
        await node.bus.trace(Envelope(run, "log", "a", lines))
        await node.bus.trace(Envelope(run, "log", "b", lines[:1]))
    branched = RunBranched(parent="r1", at=5, generation=0, overrides={}, settings=RunSettings(), code="test")
    await node.bus.append("b1", opening("b1", [branched, note("on the branch")]))
    history = await node.bus.history("r1")
    letter = ServiceFailed(
        service="tester",
        failed=str(history[2].id),
        sequence=3,
        error="Error: none",
        payload=await node.blobs.put(history[2].wire),
        tries=5,
    )
    await node.bus.append("r1", answers("r1", history[2], "another", [letter]))


@pytest.fixture
async def home(tmp_path: Path) -> Path:
    await on_home(tmp_path, filled)
    return tmp_path


async def test_whoever_has_the_stores_may_end_while_they_are_looked_at(home: Path, monkeypatch: pytest.MonkeyPatch):
    server, names, asked = start(home, "serve", "recorder", "--json"), verifying._names, 0

    async def ended_meanwhile(*given: Any) -> list[str]:
        nonlocal asked
        asked += 1
        if asked == 1:
            server.terminate()
            await asyncio.to_thread(server.communicate)
        return await names(*given)

    try:
        assert server.stdout and await asyncio.to_thread(server.stdout.readline)
        monkeypatch.setattr(verifying, "_names", ended_meanwhile)
        found = await looked(home)
    finally:
        server.kill()
        server.communicate()
    assert asked == 2 and found["findings"] == [] and found["records"] > 2 * NOTES


async def test_of_runs_that_are_sound_one_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def many(node: app.Node) -> None:
        for run in range(8):
            first, *_ = await opened(node.bus, f"r{run}")
            await node.bus.append(f"r{run}", notes(f"r{run}", first, *("a note" for _ in range(50))))

    await on_home(tmp_path, many)
    held: list[int] = []

    async def counted(*given: Any) -> None:
        held.append(sum(isinstance(each, Record) for each in gc.get_objects()))
        await of_blobs(*given)

    of_blobs = verifying._look_at_blobs
    monkeypatch.setattr(verifying, "_look_at_blobs", counted)
    before = sum(isinstance(each, Record) for each in gc.get_objects())
    found = await looked(tmp_path)
    assert found["findings"] == [] and found["records"] >= 8 * 50 and len(held) == 8
    assert max(held) - before < 2 * found["records"] / 8


async def looked(
    home: Path, run: str | None = None, repair: bool = False, source: str | None = None, partitions: int = 1
) -> dict[str, Any]:
    return await verify(Settings(home=home, partitions=partitions), run, repair, source)


def flip(file: Path, text: bytes | None = None) -> None:
    """Turn one bit, of `text` where it stands in the file, else in its middle."""
    body = bytearray(file.read_bytes())
    body[body.index(text) if text else len(body) // 2] ^= 1
    file.write_bytes(body)


def block(home: Path, stream: str = "SIA") -> Path:
    (file,) = (home / "nats/jetstream/$G/streams" / stream / "msgs").glob("*.blk")
    return file


def parts(home: Path, name: str) -> list[Path]:
    """The files of that name in the parts of what was recorded, the biggest first."""
    found = (home / "log/store").rglob(name)
    # The table of migrations is none of those: nothing that it says was recorded.
    ours = [file for file in found if "`applied`" not in (file.parent / "columns.txt").read_text()]
    return sorted(ours, key=lambda file: -file.stat().st_size)


def places(found: dict[str, Any], which: str = "left") -> set[tuple[str, str, str, str]]:
    return {(f["kind"], f["store"], f["run"], f["place"]) for f in found[which]}


async def histories(home: Path, partitions: int = 1) -> dict[str, list[Record]]:
    async def read(node: app.Node) -> dict[str, list[Record]]:
        return {run: list(await node.bus.history(run)) for run in ("r1", "r2", "b1")}

    return await on_home(home, read, copy=False, partitions=partitions)


async def test_what_is_whole_is_found_whole(home: Path):
    found = await looked(home)
    assert found["findings"] == [] and found["left"] == []
    assert (found["runs"], found["records"], found["lines"], found["blobs"]) == (3, 2 * (NOTES + 1) + 3, 8, 1)


async def test_a_branch_of_a_branch_is_whole_though_the_first_run_went_on_behind_its_fork(home: Path):
    branched = RunBranched(parent="b1", at=7, generation=0, overrides={}, settings=RunSettings(), code="test")
    await on_home(home, lambda node: node.bus.append("b2", opening("b2", [branched, note("further on")])))
    assert len((await histories(home))["r1"]) > branched.at
    found = await looked(home)
    assert found["findings"] == [] and found["runs"] == 4


async def test_one_flipped_bit_in_the_stream_is_found_and_mended_from_the_tables(home: Path):
    before = await histories(home)
    flip(block(home), b"note 7 of r1")
    found = await looked(home, "r1")
    assert places(found) == {("missing", "stream", "r1", "position 9")}
    assert len((await histories(home))["r1"]) == 8, "readers of the stream stop before it"
    with pytest.raises(RunIncomplete, match=r"behind record 8 .* up to 14.*sia verify r1 --repair"):
        await on_home(home, lambda node: node.streams.check_whole("r1"))
    await on_home(home, lambda node: node.streams.check_whole("r2"))
    mended = await looked(home, repair=True)
    assert mended["left"] == [] and ("missing", "stream", "r1", "position 9") in places(mended, "mended")
    after = await histories(home)
    assert after == before and broken_link(after["r1"]) is None
    again = await looked(home)
    assert again["left"] == [] and {f["kind"] for f in again["findings"]} == {"doubled", "missing"}
    await on_home(home, lambda node: node.streams.check_whole("r1"))


async def test_a_branch_whose_parent_lost_what_they_share_is_not_gone_on_with(home: Path):
    flip(block(home), b"note 1 of r1")
    with pytest.raises(RunIncomplete, match=r"what it branched from.*sia verify b1 --repair"):
        await on_home(home, lambda node: node.streams.check_whole("b1"))
    assert (await looked(home, "b1", repair=True))["left"] == []
    await on_home(home, lambda node: node.streams.check_whole("b1"))


async def test_the_streams_end_cut_off_is_found_and_mended_from_the_tables(home: Path):
    before = await histories(home)
    file = block(home)
    body = file.read_bytes()
    file.write_bytes(body[: body.index(b"note 9 of r2")])
    for index in file.parent.glob("index.db"):
        index.unlink()
    found = await looked(home)
    assert ("missing", "stream", "r2", "position 12") in places(found)
    assert (await looked(home, repair=True))["left"] == []
    assert await histories(home) == before
    assert (await looked(home))["left"] == []


async def test_one_flipped_bit_in_a_trace_is_found_and_mended_from_the_tables(home: Path):
    body = block(home, "SIA_TRACE").read_bytes()
    flip(block(home, "SIA_TRACE"), body[body.index(b"sia.trace.r1.log.a") + 25 :][:8])
    found = await looked(home)
    assert places(found) == {("missing", "stream", "r1", "trace sequence 1")}
    assert (await looked(home, repair=True))["left"] == []

    async def traced(node: app.Node) -> list[Envelope]:
        return list(await node.bus.traces("r1", "log", "a"))

    (envelope,) = await on_home(home, traced)
    assert len(envelope.lines) == 3
    again = await looked(home)
    assert again["left"] == [] and again["lines"] == 8


async def test_a_repair_that_was_killed_between_stream_and_tables_is_gone_on_with_and_doubles_nothing(home: Path):
    body = block(home, "SIA_TRACE").read_bytes()
    flip(block(home, "SIA_TRACE"), body[body.index(b"sia.trace.r1.log.a") + 25 :][:8])

    async def half(node: app.Node) -> None:
        async with open_log(Settings(home=home)) as log:
            lost = await log.envelopes("r1", [1])
            assert [sequence for sequence, _ in lost] == [1]
            await node.streams.put_back(lost)

    await on_home(home, half)
    assert places(await looked(home)) == {("missing", "stream", "r1", "trace sequence 1")}
    assert (await looked(home, repair=True))["left"] == []
    again = await looked(home)
    assert again["left"] == [] and again["lines"] == 8

    async def traced(node: app.Node) -> list[Envelope]:
        return list(await node.bus.traces("r1", "log", "a"))

    assert len(await on_home(home, traced)) == 1


@pytest.mark.parametrize("file", ["data.bin", "primary.cidx", "count.txt", "data.cmrk4", "checksums.txt"])
async def test_one_flipped_bit_in_any_file_of_a_part_is_found_and_the_tables_are_filled_anew(home: Path, file: str):
    flip(parts(home, file)[0])
    found = await looked(home)
    assert found["left"] and {f["store"] for f in found["left"]} == {"tables"}
    mended = await looked(home, repair=True)
    assert mended["left"] == [] and mended["mended"]
    assert (await looked(home))["findings"] == []


async def test_rows_that_are_missing_doubled_and_altered_are_named_and_mended_from_the_stream(home: Path):
    settings = Settings(home=home)
    record = (await histories(home))["r1"][4]
    async with open_log(settings) as log:
        await log._remove("events", "position", "r1", [3, 5])
        other = record.wire.replace(b"note 3", b"note X")
        await log._insert("events", {"record": "String"}, [(other,)], "altered")
        await log.append([(await log.records("r2"))[1]], "doubled")
        await log.remove_lines("r2", [3])
    found = await looked(home, "r1")
    assert places(found) == {("missing", "tables", "r1", "position 3"), ("altered", "tables", "r1", "position 5")}
    found = await looked(home)
    assert ("doubled", "tables", "r2", "position 2") in places(found, "findings")
    assert ("missing", "tables", "r2", "trace sequence 3") in places(found)
    assert (await looked(home, repair=True))["left"] == []
    async with open_log(settings) as log:
        assert list(await log.records("r1")) == (await histories(home))["r1"]


async def test_mending_cut_short_has_written_rows_anew_before_any_is_taken_out(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    record = (await histories(home))["r1"][4]
    async with open_log(Settings(home=home)) as log:
        lines = await log.envelopes("r1", [1])
        await log._remove("events", "position", "r1", [5])
        await log.remove_lines("r1", [1])

        async def cut(*what: object) -> None:
            raise OSError("cut short")

        with monkeypatch.context() as patch:
            patch.setattr(log, "_remove", cut)
            for records, envelopes in (([record], []), ([], lines)):
                with pytest.raises(OSError, match="cut short"):
                    await log.mend("r1", records, envelopes)
        assert (5, record.wire) in await log.rows("r1") and await log.envelopes("r1", [1]) == lines
        call = Envelope("r1", "model_call", "a", (b'{"n":1}', b'{"n":2}', b'{"n":3}', b'{"n":4}'))
        await log.append_traces([(1, call)], "in the other table")
        await log.mend("r1", [record], lines)
        assert {wire for position, wire in await log.rows("r1") if position == 5} == {record.wire}
        assert await log.envelopes("r1", [1]) == lines
    assert (await looked(home, "r1"))["left"] == []


async def test_a_repair_saves_what_is_not_copied_yet_before_it_writes_to_a_damaged_stream(home: Path):
    async def more(node: app.Node) -> None:
        history = await node.bus.history("r2")
        await node.bus.append("r2", notes("r2", history[-1], "news"))
        await node.bus.trace(Envelope("r2", "log", "news", (b'{"n":1}',)))

    await on_home(home, more, copy=False)
    flip(block(home), b"note 7 of r1")
    point = {"SIA_FAIL_AT": "sia verify after mending the tables"}
    assert sia(home, "verify", "r2", "--repair", **point).returncode == 0, "it is whole"
    assert sia(home, "verify", "--all", "--repair", **point).returncode == -signal.SIGKILL
    async with open_log(Settings(home=home)) as log:
        assert (await log.records("r2"))[-1].event == note("news")
        rows = await log.query("SELECT body FROM trace FINAL WHERE run = 'r2' AND key = 'news'")
        assert [row["body"] for row in rows] == ['{"n":1}']
    assert (await looked(home, repair=True))["left"] == (await looked(home))["left"] == []


async def test_one_flipped_bit_in_a_blob_is_found_and_mended_from_the_stream_or_another_store(home: Path):
    (blob,) = (home / "blobs").rglob("*/*")
    digest = blob.parent.name + blob.name
    flip(blob)
    assert places(await looked(home, "r1")) == {("altered", "blobs", "r1", digest)}
    assert (await looked(home, "r1", repair=True))["left"] == [], "a dead letter's payload stands on the stream"
    blob.unlink()
    assert places(await looked(home)) == {("missing", "blobs", "r1", digest)}
    assert (await looked(home, repair=True))["left"] == []


async def test_a_blob_comes_back_from_another_store_that_has_it_and_not_from_one_whose_bytes_are_others(home: Path):
    digest = await on_home(home, named_blob)
    file, source = home / "blobs" / digest[:2] / digest[2:], home / "source"
    good = source / digest[:2] / digest[2:]
    good.parent.mkdir(parents=True)
    good.write_bytes(file.read_bytes())
    flip(good)
    for damage, kind in ((flip, "altered"), (Path.unlink, "missing")):
        damage(file)
        found = await looked(home, "r2", repair=True, source=str(source))
        assert places(found) == {(kind, "blobs", "r2", digest)}, "a corrupt source mends nothing"
    flip(good)
    assert (await looked(home, "r2", repair=True, source=str(source)))["left"] == []
    assert file.read_bytes() == good.read_bytes() and (await looked(home))["left"] == []


async def named_blob(node: app.Node) -> str:
    """The digest of a blob that a record of r2 names and that stands nowhere on the stream."""
    history = await node.bus.history("r2")
    digest = await node.blobs.put(b"what no record is" * 10)
    letter = ServiceFailed(service="t", failed=str(history[2].id), sequence=3, error="E", payload=digest, tries=5)
    await node.bus.append("r2", answers("r2", history[2], "another", [letter]))
    return digest


async def test_what_an_agent_or_a_person_wrote_names_no_blob_however_it_looks(home: Path):
    async def written(node: app.Node) -> None:
        missing = "ab" * 32
        notes = await node.blobs.put(json.dumps({"sha": missing}).encode())
        outputs = await node.blobs.put(json.dumps({"notes.json": notes}).encode())
        trajectory = await node.blobs.put(b"")
        history = await node.bus.history("r2")
        facts = [
            RunSteered(text="cd" * 32),
            logged("g0a", "dev").model_copy(update={"outputs": outputs, "trajectory": trajectory}),
        ]
        await node.bus.append("r2", answers("r2", history[2], "an agent", facts))

    await on_home(home, written)
    found = await looked(home)
    assert found["findings"] == []
    assert not (await looked(home, "r2"))["findings"]


async def test_what_no_place_has_any_more_is_told_and_not_mended(home: Path):
    flip(block(home), b"note 7 of r1")
    async with open_log(Settings(home=home)) as log:
        await log._remove("events", "position", "r1", [9])
    found = await looked(home, "r1", repair=True)
    assert ("missing", "stream", "r1", "position 9") in places(found)
    assert "no good copy" in found["left"][0]["detail"]


async def test_what_somebody_else_put_on_the_stream_is_named_and_no_damage_once_its_dead_letter_is_written(home: Path):
    settings = Settings(home=home)
    async with hold(settings, "test"), running(home / "nats") as url:
        client = await nats.connect(url)
        await client.jetstream().publish("sia.events.r2.RunResumed", b"junk")
        await client.close()
    found = await looked(home, "r2")
    ((kind, store, _, _),) = places(found)
    assert (kind, store) == ("unreadable", "stream")

    async def nothing(node: app.Node) -> None: ...

    await on_home(home, nothing)
    found = await looked(home, "r2")
    assert found["left"] == [] and "record" in found["findings"][0]["harmless"]


async def test_what_was_forged_to_descend_from_itself_keeps_nobody_looking_for_ever(home: Path):
    settings = Settings(home=home)
    async with hold(settings, "test"), running(home / "nats") as url:
        client = await nats.connect(url)
        for run, parent in (("x", "x"), ("y", "z"), ("z", "y"), ("v", "x")):
            await client.jetstream().publish(f"sia.events.{run}.RunBranched", forged_branch(run, parent))
        await client.close()
    found = await looked(home)
    assert found["runs"] == 7 and {each["run"] for each in found["findings"]} <= {None, *"vxyz"}


async def test_no_reader_takes_what_is_left_of_a_run_for_the_run(home: Path):
    async with open_log(Settings(home=home)) as log:
        await log._remove("events", "position", "r1", [4, 9])
    why = "behind record 3 the log has record 5, and none between"
    for run, first in (("r1", 3), ("b1", 3)):
        for words in (("show", run), ("replay", run), ("state", run), ("log", run)):
            status, out, talk = await asyncio.to_thread(told, home, *words)
            assert status == 2 and why in talk and f"sia verify {run} --repair" in talk
            assert len(out.splitlines()) == (first if words[0] == "log" else 0)
    rows = {row["run"]: row for row in await asyncio.to_thread(read, home, "runs")}
    assert [rows[run]["status"] for run in ("r1", "b1", "r2")] == ["unreadable", "unreadable", "interrupted"]
    assert why in rows["r1"]["reason"] and rows["r2"].keys() < rows["r1"].keys()
    assert [root["run"] for root in await asyncio.to_thread(read, home, "tree")] == ["r1", "r2", "b1"]
    for words in (("runs",), ("tree",)):
        assert (await asyncio.to_thread(told, home, *words))[1].count(why) == 2
    assert (await looked(home, "b1", repair=True))["left"] == []
    assert [root["run"] for root in await asyncio.to_thread(read, home, "tree")] == ["r1", "r2"]


async def test_a_parent_of_which_the_tables_have_nothing_is_told_in_the_tree(home: Path):
    async with open_log(Settings(home=home)) as log:
        await log._remove("events", "position", "r1", range(1, NOTES + 3))
    out = (await asyncio.to_thread(told, home, "tree"))[1]
    assert [line.split()[0] for line in out.splitlines()] == ["r2", "b1"]
    assert "run b1 cannot be read: behind record 0 the log has record 6" in out and "sia verify b1 --repair" in out


async def test_what_the_stream_lost_before_it_was_copied_is_a_gap_to_readers_and_can_be_branched_before(home: Path):
    async def more(node: app.Node) -> None:
        first, *_ = await node.bus.history("r2")
        for number in range(4):
            await node.bus.append("r2", notes("r2", first, f"late {number}", producer=f"late {number}"))

    await on_home(home, more, copy=False)
    flip(block(home), b"late 1")
    for _ in range(2):
        status, _, talk = await asyncio.to_thread(told, home, "show", "r2")
        assert status == 2 and "behind record 14 the log has record 16" in talk and "--at-position 14" in talk
    found = await looked(home, "r2")
    assert places(found) == {("missing", "stream", "r2", "position 15")}


async def later(home: Path, run: str = "r2") -> None:
    """Two more records and an envelope of the run, which are not copied."""

    async def more(node: app.Node) -> None:
        first, *_ = await node.bus.history(run)
        for number in range(2):
            await node.bus.append(run, notes(run, first, f"late {number}", producer=f"late {number}"))
        await node.bus.trace(Envelope(run, "log", "late", (b'{"text":"late"}',)))

    await on_home(home, more, copy=False)


@pytest.mark.parametrize(
    ("lost", "place"), [((b"late 1",), "position 15"), ((b"late 0", b"late 1"), "positions 14 to 15")]
)
async def test_the_last_records_of_a_run_that_were_lost_before_they_were_copied_are_missed(
    lost: tuple[bytes, ...], place: str, home: Path
):
    await later(home)
    for each in lost:
        flip(block(home), each)
    gone = ("missing", "stream", "r2", place)
    assert places(await looked(home, "r2")) == {gone} and (await looked(home, "r1"))["findings"] == []
    assert (await asyncio.to_thread(told, home, "verify", "r2"))[0] == 1
    mended = await looked(home, repair=True)
    assert gone in places(mended) and "no good copy" in mended["left"][0]["detail"]
    await on_home(home, filled_on)
    assert places(await looked(home, "r2")) == {gone}, "that later messages were copied makes nothing of it good"


async def test_a_run_that_was_put_back_is_not_missed_again_for_what_another_loses_later(home: Path):
    for each in (b"note 10 of r2", b"note 11 of r2"):
        flip(block(home), each)
    mended = await looked(home, repair=True)
    assert mended["left"] == [] and len(mended["mended"]) == 2
    await later(home, "r1")
    flip(block(home), b"late 1")
    assert places(await looked(home)) >= {("missing", "stream", "r1", "position 16")}
    assert (await looked(home, "r2"))["left"] == []


async def filled_on(node: app.Node) -> None:
    """What others go on to write."""
    first, *_ = await node.bus.history("r1")
    await node.bus.append("r1", notes("r1", first, "meanwhile", producer="meanwhile"))


async def test_the_last_records_come_back_from_the_tables_only_where_these_have_them_all(home: Path):
    first, *_ = (await histories(home))["r2"]
    await on_home(home, lambda node: node.bus.append("r2", notes("r2", first, "late 0", producer="late 0")))
    before = await histories(home)
    await on_home(home, lambda node: node.bus.append("r2", notes("r2", first, "late 1", producer="late 1")), copy=False)
    whole = await histories(home)
    for lost in (b"late 1", b"late 0"):
        flip(block(home), lost)
    gone = {("missing", "stream", "r2", f"position {position}") for position in (14, 15)}
    assert places(await looked(home, "r2", repair=True)) == gone
    assert len((await histories(home))["r2"]) == 13, "what is put back would hide that one behind it is lost"

    async def from_elsewhere(node: app.Node) -> int:
        return await node.streams.restore("r2", whole["r2"])

    assert await on_home(home, from_elsewhere) == 2
    assert (await looked(home))["left"] == [] and len(before["r2"]) == 14 and await histories(home) == whole


async def test_an_envelope_that_was_lost_before_it_was_copied_is_missed(home: Path):
    await later(home)
    body = bytearray(block(home, "SIA_TRACE").read_bytes())
    body[body.index(b"sia.trace.r2.log.late") + 100] ^= 1
    block(home, "SIA_TRACE").write_bytes(body)
    gone = ("missing", "stream", "r2", "a trace envelope")
    assert places(await looked(home, "r2")) == {gone} and (await looked(home, "r1"))["findings"] == []
    assert places(await looked(home, "r2", repair=True)) == {gone}


async def test_what_is_no_envelope_and_rows_that_are_there_twice_are_named_and_are_no_damage(home: Path):
    settings = Settings(home=home)
    async with hold(settings, "test"), running(home / "nats") as url:
        client = await nats.connect(url)
        await client.jetstream().publish("sia.trace.r2.log.x", b"junk")
        await client.close()
    async with open_log(settings) as log:
        await log.append_traces(await log.envelopes("r1", [1]), "twice")
    found = await looked(home)
    assert found["left"] == [] and {f["harmless"] for f in found["findings"]} == {
        "no reader takes it for a trace",
        "readers take it once",
    }
    assert places(found, "findings") == {
        ("unreadable", "stream", "r2", "trace sequence 5"),
        ("doubled", "tables", "r1", "trace sequence 1"),
    }


async def test_while_records_come_in_it_answers_for_what_has_been_copied(home: Path):
    async def more(node: app.Node) -> None:
        history = await node.bus.history("r2")
        await node.bus.append("r2", notes("r2", history[-1], "news"))

    await on_home(home, more, copy=False)
    assert (await looked(home))["findings"] == []


def test_a_whole_run_is_verified_by_the_command_and_a_damaged_blob_makes_it_exit_1(task: Path, tmp_path: Path):
    ran = sia(tmp_path, "run", task, *SMALL)
    assert ran.returncode == 0, ran.stderr
    done = sia(tmp_path, "verify", "--all", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["findings"] == [] and told["blobs"] > 10 and told["lines"] > 10, told
    flip(max((file for file in (tmp_path / "blobs").rglob("*/*")), key=lambda file: file.stat().st_size))
    done = sia(tmp_path, "verify", "r1")
    assert done.returncode == 1 and "altered in the blobs" in done.stdout
    assert sia(tmp_path, "verify").returncode == 2


async def test_a_trace_that_is_put_back_is_read_where_it_stood(tmp_path: Path):
    said = [f'{{"text":"line {number}"}}'.encode() for number in range(4)]

    async def told(node: app.Node) -> list[tuple[bytes, ...]]:
        return [envelope.lines for envelope in await node.bus.traces("r1", "log", "a")]

    async def written(node: app.Node) -> None:
        await opened(node.bus, "r1")
        for line in said:
            await node.bus.trace(Envelope("r1", "log", "a", (line,)))

    await on_home(tmp_path, written)
    body = block(tmp_path, "SIA_TRACE").read_bytes()
    flip(block(tmp_path, "SIA_TRACE"), body[body.index(b"sia.trace.r1.log.a") + 25 :][:8])
    assert await on_home(tmp_path, told) == [(line,) for line in said[1:]]
    assert (await looked(tmp_path, repair=True))["left"] == []
    assert await on_home(tmp_path, told) == [(line,) for line in said]


async def test_runs_in_eight_partitions_are_verified_mended_and_filled_anew(tmp_path: Path):
    await on_home(tmp_path, filled, partitions=8)
    whole = await histories(tmp_path, 8)
    for text, stream in ((b"note 7 of r1", "SIA_[0-9]"), (b"sia.trace.r1.log.a", "SIA_TRACE_*")):
        blocks = (tmp_path / "nats/jetstream/$G/streams").glob(f"{stream}/msgs/*.blk")
        block = next(each for each in blocks if text in each.read_bytes())
        flip(block, block.read_bytes().partition(text)[2][8:16] if b"." in text else text)
    found = await looked(tmp_path, partitions=8)
    assert [each["place"].split()[0] for each in found["left"] if each["run"]] == ["position", "trace"]
    assert (await looked(tmp_path, repair=True, partitions=8))["left"] == []
    assert await rebuild(Settings(home=tmp_path, partitions=8)) == 3
    again = await looked(tmp_path, partitions=8)
    assert again["left"] == [] and again["lines"] == 8
    assert await histories(tmp_path, 8) == whole
