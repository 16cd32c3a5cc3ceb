"""A run as one file, and back on another home: the same records, traces and blobs; and the files that are refused."""

import asyncio
import hashlib
import io
import json
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bus_on import note, opened
from command import SMALL, answered, calls, log, sia, tree

from sia_events import app
from sia_events.archiving import archive_run, restore
from sia_events.errors import Unusable
from sia_events.event_log import recorder
from sia_events.event_log.references import members
from sia_events.home import hold
from sia_events.infra.archive import ArchiveUnusable, read
from sia_events.infra.zstd import zstd
from sia_events.log_here import open_log
from sia_events.shared.events import AgentProposed
from sia_events.shared.ports import Envelope
from sia_events.shared.record import broken_link
from sia_events.shared.settings import Settings
from sia_events.views.integrity import archive_text

BRANCH = "r2"
NESTED = b"[" * 200_000  # deeper than any parser goes
Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def home(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a run that ended, and a branch of it."""
    home = tmp_path_factory.mktemp("archived")
    ran = sia(home, "run", task, *SMALL)
    assert ran.returncode == 0, ran.stderr
    branched = sia(home, "branch", "r1", "--at", "0")
    assert branched.returncode == 0, branched.stderr
    assert [row["run"] for row in answered(home, "runs")] == ["r1", BRANCH]
    return home


@pytest.fixture(scope="module")
def archive(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("archive") / "branch.sia.tar.zst"
    told = answered(home, "archive", BRANCH, file)
    assert told["runs"] == ["r1", BRANCH] and told["missing"] == [] and told["bytes"] == file.stat().st_size
    return file


def unpacked(file: Path) -> Members:
    with zstd.ZstdFile(file) as raw, tarfile.open(fileobj=raw, mode="r|") as tar:
        return [(entry.name, body.read()) for entry in tar if (body := tar.extractfile(entry))]


def packed(members: Members, file: Path) -> Path:
    """The members as a well-formed tar under Zstandard, whatever they say."""
    with zstd.ZstdFile(file, "wb") as raw, tarfile.open(fileobj=raw, mode="w|") as tar:
        for name, body in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    return file


async def histories(home: Path) -> dict[str, list[bytes]]:
    """The bytes of every record, by run, as the home's stream has them."""
    settings = Settings(home=home)
    async with hold(settings, "test"), app.stores(settings) as node:
        return {run: [record.wire for record in await node.bus.history(run)] for run in await node.bus.runs()}


def test_a_run_comes_back_on_another_home_with_the_same_ids_and_the_same_chain(
    home: Path, archive: Path, tmp_path: Path
):
    put = answered(tmp_path, "restore", archive)
    before = asyncio.run(histories(home))
    assert put["runs"] == ["r1", BRANCH] and put["records"] > len(before["r1"])
    assert asyncio.run(histories(tmp_path)) == before
    for run in ("r1", BRANCH):
        assert broken_link(log(tmp_path, run)) is None
        assert calls(tmp_path, run) == calls(home, run)
    replayed = sia(tmp_path, "replay", BRANCH)
    assert replayed.returncode == 0, replayed.stdout
    assert answered(tmp_path, "verify", "--all")["left"] == []


async def test_restoring_twice_changes_nothing(archive: Path, tmp_path: Path):
    settings = Settings(home=tmp_path)
    first = await restore(settings, archive)
    before = await histories(tmp_path)
    again = await restore(settings, archive)
    assert first["records"] > 0 and again["records"] == 0
    assert await histories(tmp_path) == before
    async with hold(settings, "test"), app.stores(settings) as node:
        traced = [envelope.lines async for _, envelope in node.streams.envelopes("r1")]
    assert len(traced) == len(set(traced))


async def test_envelopes_that_the_stream_has_lost_come_from_the_tables_and_others_are_told_of(tmp_path: Path):
    home, file = tmp_path / "home", tmp_path / "whole"
    settings = Settings(home=home)
    async with hold(settings, "test"), app.stores(settings) as node:
        await opened(node.bus, "r1")
        for number in range(4):
            await node.bus.trace(Envelope("r1", "log", f"key{number}", (f'{{"n":{number}}}'.encode(),)))
        async with open_log(settings) as log:
            await recorder.catch_up(node.bus, log)
            await log.remove_lines("r1", [3])
    assert (await archive_run(settings, "r1", file, answers=True))["left_out"] == []
    whole = sorted(traced(file))
    (block,) = (home / "nats/jetstream/$G/streams/SIA_TRACE/msgs").glob("*.blk")
    body = bytearray(block.read_bytes())
    for key in (b"key1", b"key2"):
        body[body.index(b"sia.trace.r1.log." + key) + 100] ^= 1
    block.write_bytes(body)
    told = await archive_run(settings, "r1", tmp_path / "damaged", answers=True)
    assert told["left_out"] == ["run r1: 1 of its trace envelopes are lost, on the stream and in the tables"]
    assert whole == sorted([*traced(tmp_path / "damaged"), ("key2", ('{"n":2}',))])
    assert traced(tmp_path / "damaged")[-1][0] == "key1", "it stands where a repair would put it back"
    assert "left out: run r1" in archive_text(told)
    away = settings.model_copy(update={"log_dsn": "clickhouse://127.0.0.1:1/default"})
    without = await archive_run(away, "r1", tmp_path / "without", answers=True)
    unread, lost = without["left_out"]
    assert unread.startswith("run r1: what only the log has of its traces, as that cannot be read: the event log")
    assert lost == "run r1: 2 of its trace envelopes are lost, on the stream"
    assert traced(tmp_path / "without") == traced(tmp_path / "damaged")[:-1]


async def test_a_lost_file_of_a_harness_is_told_as_missing(home: Path, tmp_path: Path):
    settings = Settings(home=tmp_path / "home")
    shutil.copytree(home, settings.home, ignore=shutil.ignore_patterns("*.lock", "*.sock"))
    proposed = next(record.event for record in log(home) if isinstance(record.event, AgentProposed))
    async with hold(settings, "test"), app.stores(settings) as node:
        member, *_ = members(await node.blobs.get(proposed.harness))
    (kept,) = [file for file in (settings.home / "blobs").rglob("*") if file.is_file() and member.endswith(file.name)]
    kept.unlink()
    assert (await archive_run(settings, "r1", tmp_path / "file", answers=True))["missing"] == [member]


@pytest.mark.parametrize("repaired", [False, True])
async def test_what_a_damaged_home_lost_comes_back_from_an_archive(tmp_path: Path, repaired: bool):
    home, file = tmp_path / "home", tmp_path / "file"
    settings = Settings(home=home)

    async def keys() -> list[str]:
        async with hold(settings, "test"), app.stores(settings) as node:
            return [envelope.key async for _, envelope in node.streams.envelopes("r1")]

    async with hold(settings, "test"), app.stores(settings) as node:
        await opened(node.bus, "r1", note("lost and nowhere else"), note("behind it"))
        for number in range(4):
            await node.bus.trace(Envelope("r1", "log", f"key{number}", (f'{{"n":{number}}}'.encode(),)))
        if repaired:
            async with open_log(settings) as log:
                await recorder.catch_up(node.bus, log)
    await archive_run(settings, "r1", file, answers=True)
    before = await histories(home)
    for stream, text, far in (("SIA_TRACE", b"sia.trace.r1.log.key1", 100), ("SIA", b"lost and nowhere else", 0)):
        (block,) = (home / f"nats/jetstream/$G/streams/{stream}/msgs").glob("*.blk")
        body = bytearray(block.read_bytes())
        body[body.index(text) + far] ^= 1
        block.write_bytes(body)
    if repaired:
        assert answered(home, "verify", "--all", "--repair")["left"] == []
        assert await keys() == ["key0", "key2", "key3", "key1"]
    await restore(settings, file)
    assert sorted(await keys()) == [f"key{number}" for number in range(4)]
    assert await histories(home) == before


async def test_trace_lines_that_are_no_text_come_back_as_they_were_with_the_blobs_they_mention(tmp_path: Path):
    home, back, file = Settings(home=tmp_path / "home"), Settings(home=tmp_path / "back"), tmp_path / "file"
    async with hold(home, "test"), app.stores(home) as node:
        await opened(node.bus, "r1")
        digest = await node.blobs.put(b"mentioned by no text")
        sent = [
            Envelope("r1", "log", "text", (b"{}",)),
            Envelope("r1", "log", "none", (b"\xff{}", digest.encode(), b"{}")),
            Envelope("r1", "log", "empty", ()),
        ]
        for envelope in sent:
            await node.bus.trace(envelope)
    told = await archive_run(home, "r1", file, answers=True)
    assert told["left_out"] == [] and told["missing"] == []
    assert await restore(back, file) == {"runs": ["r1"], "records": told["records"], "blobs": told["blobs"]}
    assert (await restore(back, file))["records"] == 0
    async with hold(back, "test"), app.stores(back) as node:
        assert [envelope async for _, envelope in node.streams.envelopes("r1")] == sent
        assert await node.blobs.get(digest) == b"mentioned by no text"


def traced(file: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Key and lines of every envelope in the archive."""
    bodies = [body for name, body in unpacked(file) if name.startswith("traces/")]
    envelopes = [json.loads(line) for body in bodies for line in body.splitlines()]
    return [(each["key"], tuple(each["lines"])) for each in envelopes]


def test_the_same_run_makes_the_same_file_and_only_its_owner_reads_it(home: Path, archive: Path, tmp_path: Path):
    again = tmp_path / "again"
    answered(home, "archive", BRANCH, again)
    assert again.read_bytes() == archive.read_bytes()
    assert again.stat().st_mode & 0o777 == 0o600
    refused = sia(home, "archive", BRANCH, again)
    assert refused.returncode == 2 and "is there already" in refused.stderr
    refused = sia(home, "archive", BRANCH, tmp_path / "nowhere" / "again")
    assert refused.returncode == 2 and "cannot be written: No such file" in refused.stderr


def test_without_the_answers_none_goes_in(home: Path, tmp_path: Path):
    answered(home, "archive", "r1", tmp_path / "open", "--no-answers")
    assert not [name for name, _ in unpacked(tmp_path / "open") if name.startswith("private/")]


async def test_another_run_of_that_name_is_not_written_over(archive: Path, tmp_path: Path):
    settings = Settings(home=tmp_path)
    async with hold(settings, "test"), app.stores(settings) as node:
        await opened(node.bus, "r1")
    before = await histories(tmp_path)
    with pytest.raises(Unusable, match="another run r1"):
        await restore(settings, archive)
    assert await histories(tmp_path) == before and not list((tmp_path / "blobs").rglob("*/*"))


def changed(change: Callable[[str, bytes], bytes]) -> Callable[[Path, Path], Path]:
    def make(archive: Path, file: Path) -> Path:
        return packed([(name, change(name, body)) for name, body in unpacked(archive)], file)

    return make


def forged(change: Callable[[str, bytes], bytes]) -> Callable[[Path, Path], Path]:
    """A file that says of itself that it is whole."""

    def make(archive: Path, file: Path) -> Path:
        members = [(name, change(name, body)) for name, body in unpacked(archive)[:-1]]
        sealed = {name: {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in members}
        return packed([*members, ("manifest.json", json.dumps({"members": sealed}).encode())], file)

    return make


def cut(archive: Path, file: Path) -> Path:
    file.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    return file


def cut_in_its_checksum(archive: Path, file: Path) -> Path:
    file.write_bytes(archive.read_bytes()[:-1])
    return file


def with_a_letter_more(archive: Path, file: Path) -> Path:
    file.write_bytes(archive.read_bytes() + b"x")
    return file


def twice(archive: Path, file: Path) -> Path:
    file.write_bytes(2 * archive.read_bytes())
    return file


def flipped(archive: Path, file: Path) -> Path:
    body = bytearray(archive.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)
    return file


def without_its_end(archive: Path, file: Path) -> Path:
    return packed(unpacked(archive)[:-1], file)


def of_something_else(archive: Path, file: Path) -> Path:
    return packed([("notes.txt", b"notes")], file)


def no_tar(archive: Path, file: Path) -> Path:
    file.write_bytes(b"plain text")
    return file


def head(**more: Any) -> Callable[[str, bytes], bytes]:
    return lambda name, body: json.dumps({**json.loads(body), **more}).encode() if name == "archive.json" else body


def other_record(name: str, body: bytes) -> bytes:
    return body.replace(b'"position":2', b'"position":3') if name == "records/r1.jsonl" else body


def its_own_parent(name: str, body: bytes) -> bytes:
    return body.replace(b'"parent":"r1"', b'"parent":"r2"') if name == "records/r2.jsonl" else body


def other_subject(name: str, body: bytes) -> bytes:
    return body.replace(b'"kind":"model_call"', b'"kind":"model.call"') if name.startswith("traces/") else body


def without_its_lines(name: str, body: bytes) -> bytes:
    return b'{"kind":"log","key":"k"}\n' + body if name.startswith("traces/") else body


def too_deep_a_trace(name: str, body: bytes) -> bytes:
    return b'{"x":' + NESTED + b"\n" + body if name.startswith("traces/") else body


def no_text(name: str, body: bytes) -> bytes:
    return body.replace(b'"kind":"model_call"', b'"kind":"\xff"') if name.startswith("traces/") else body


def instead(member: str, said: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, body: said if name == member else body


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (cut, "cut short or altered"),
        (cut_in_its_checksum, "cut short or altered"),
        (with_a_letter_more, "cut short or altered"),
        (twice, "has more behind its end"),
        (flipped, "altered"),
        (without_its_end, "manifest is missing"),
        (of_something_else, "no archive of a run"),
        (no_tar, "cut short or altered"),
        (changed(head(version=2)), "of version 2; this release reads up to 1"),
        (changed(head(run="r3")), "was altered: archive.json"),
        (changed(other_record), "was altered"),
        (forged(its_own_parent), "the hash chain of run r2 is broken"),
        (forged(other_subject), "was altered: traces/"),
        (forged(without_its_lines), "was altered: traces/"),
        (forged(too_deep_a_trace), "was altered: traces/"),
        (forged(no_text), "was altered: traces/"),
        (changed(instead("manifest.json", b'{"members": []}')), "was altered: its manifest names no members"),
        (changed(instead("manifest.json", b'{"members": 5}')), "was altered: its manifest names no members"),
        (changed(instead("manifest.json", b"{}")), "was altered: its manifest names no members"),
        (changed(instead("manifest.json", NESTED)), "was altered: its head or manifest is no JSON object"),
        (changed(instead("archive.json", NESTED)), "was altered: its head or manifest is no JSON object"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_file_that_is_cut_altered_or_of_a_later_release_is_refused_and_nothing_is_written(
    make: Callable[[Path, Path], Path], said: str, archive: Path, tmp_path: Path
):
    home, file = tmp_path / "home", make(archive, tmp_path / "bad")
    with pytest.raises(ArchiveUnusable, match=said) as refused:
        await restore(Settings(home=home), file)
    assert "othing was written" in str(refused.value) and tree(home) == {}


def test_a_large_member_is_read_without_being_held(archive: Path, tmp_path: Path):
    body = bytes(64 * 2**20)
    head, *_ = unpacked(archive)
    members = [head, (f"blobs/{hashlib.sha256(body).hexdigest()}", body)]
    sealed = {name: {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in members}
    file = packed([*members, ("manifest.json", json.dumps({"members": sealed}).encode())], tmp_path / "large")
    tracemalloc.start()
    try:
        taken = {name: sum(map(len, pieces)) for name, pieces in read(file)}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert list(taken.values()) == [len(body)] and peak < 8 * 2**20


def test_the_command_refuses_with_exit_status_2(tmp_path: Path):
    refused = sia(tmp_path, "restore", no_tar(tmp_path, tmp_path / "bad"))
    assert refused.returncode == 2 and "nothing was written" in refused.stderr
