"""`sia gc`: what nothing names goes, what anything names stays, and so does what may yet be named."""

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bus_on import note, notes, opened
from command import answered, sia

from sia_events import app
from sia_events.catching_up import current_log
from sia_events.errors import Unusable
from sia_events.home import hold
from sia_events.infra.blobs import open_blobs
from sia_events.shared.events import RunCancelled, RunFinished, ServiceFailed
from sia_events.shared.ports import Envelope
from sia_events.shared.record import answers
from sia_events.shared.settings import Settings
from sia_events.shared.tree import store_tree
from sia_events.sweeping import sweep

LATER = datetime.now(UTC) + timedelta(hours=2)


async def filled(home: Path, *ends: Any) -> dict[str, str]:
    """A run, ended if so, that names a tree; a trace that mentions a blob; and one that nothing names."""
    settings = Settings(home=home)
    async with hold(settings, "test"), app.stores(settings) as node:
        first, *_ = await opened(node.bus, "r1")
        made = {
            "tree": await store_tree(node.blobs, {"a.txt": b"in the tree"}),
            "traced": await node.blobs.put(b"of a trace"),
            "alone": await node.blobs.put(b"of nobody"),
            "secret": await node.private.put(b"of nobody, in private"),
        }
        letter = ServiceFailed(service="tester", failed=None, sequence=9, error="E: no", payload=made["tree"], tries=1)
        await node.bus.append("r1", answers("r1", first, "tester", [letter, *ends]))
        await node.bus.append("r1", notes("r1", first, "a note", producer="another"))
        await node.bus.trace(Envelope("r1", "log", "a", (msgspec.json.encode({"tree": made["traced"]}),)))
    return made


OVER = RunFinished(outcome="failed", best=None, sealed=None, reason="")


async def test_only_what_nothing_names_is_found_and_only_yes_removes_it(tmp_path: Path):
    made = await filled(tmp_path, OVER)
    settings = Settings(home=tmp_path)
    found = await sweep(settings, remove=False, now=LATER)
    assert set(found["blobs"]) == {made["alone"], made["secret"]} and found["removed"] == 0 and found["kept"] == 3
    assert len(list((tmp_path / "blobs").rglob("*/*"))) == 4
    done = await sweep(settings, remove=True, now=LATER)
    assert done["removed"] == 2 and (await sweep(settings, remove=True, now=LATER))["blobs"] == []
    blobs = open_blobs(str(tmp_path / "blobs"))
    for name in ("tree", "traced"):
        await blobs.get(made[name])


async def test_nothing_of_the_last_hour_is_touched(tmp_path: Path):
    await filled(tmp_path, RunCancelled(reason="over"))
    found = await sweep(Settings(home=tmp_path), remove=True)
    assert found["blobs"] == [] and found["kept"] == 5


async def test_nothing_that_was_written_since_an_open_run_began_is_touched(tmp_path: Path):
    await filled(tmp_path)
    found = await sweep(Settings(home=tmp_path), remove=True, now=LATER)
    assert found["blobs"] == [] and found["kept"] == 5


async def test_what_an_open_run_stored_again_soon_after_somebody_else_is_not_touched(tmp_path: Path):
    made = await filled(tmp_path)
    file = tmp_path / "blobs" / made["alone"][:2] / made["alone"][2:]
    before = time.time() - 1200
    os.utime(file, (before, before))
    assert await open_blobs(str(tmp_path / "blobs")).put(b"of nobody") == made["alone"]
    assert file.stat().st_mtime == pytest.approx(before), "it is young enough to keep its time"
    assert (await sweep(Settings(home=tmp_path), remove=True, now=LATER))["blobs"] == []


async def test_what_a_trace_mentions_that_only_the_tables_still_have_is_kept(tmp_path: Path):
    made = await filled(tmp_path, OVER)
    settings = Settings(home=tmp_path)
    async with current_log(settings):
        pass
    (block,) = (tmp_path / "nats/jetstream/$G/streams/SIA_TRACE/msgs").glob("*.blk")
    body = bytearray(block.read_bytes())
    body[body.index(b"sia.trace.r1.log.a") + 25] ^= 1
    block.write_bytes(body)
    found = await sweep(settings, remove=True, now=LATER)
    assert set(found["blobs"]) == {made["alone"], made["secret"]}


async def test_what_is_stored_again_is_young_again(tmp_path: Path):
    blobs = open_blobs(str(tmp_path / "blobs"))
    digest = await blobs.put(b"old")
    file = tmp_path / "blobs" / digest[:2] / digest[2:]
    old = time.time() - 7200
    os.utime(file, (old, old))
    assert await blobs.put(b"old") == digest
    assert time.time() - file.stat().st_mtime < 60
    assert not await blobs.remove(digest, datetime.now(UTC) - timedelta(hours=1))
    assert await blobs.remove(digest, datetime.now(UTC) + timedelta(hours=1)) and not file.exists()


async def test_nothing_is_removed_while_services_run_in_the_home(tmp_path: Path):
    await filled(tmp_path, OVER)
    settings = Settings(home=tmp_path)
    async with hold(settings, "serve"), app.stores(settings):
        with pytest.raises(Unusable, match="nothing was removed"):
            await sweep(settings, remove=True, now=LATER)


async def test_what_the_stream_has_lost_before_it_was_copied_stops_the_sweep(tmp_path: Path):
    await filled(tmp_path, OVER)
    (block,) = (tmp_path / "nats/jetstream/$G/streams/SIA/msgs").glob("*.blk")
    body = bytearray(block.read_bytes())
    body[body.index(b"a note")] ^= 1
    block.write_bytes(body)
    with pytest.raises(Unusable, match="has lost"):
        await sweep(Settings(home=tmp_path), remove=True, now=LATER)


async def test_the_command_counts_and_removes_nothing_by_itself(tmp_path: Path):
    await filled(tmp_path, OVER, note("more"))
    assert answered(tmp_path, "gc")["removed"] == 0
    done = sia(tmp_path, "gc")
    assert done.returncode == 0 and "named nowhere" in done.stdout
