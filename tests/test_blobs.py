"""The Blobs port's contract, in memory and in a folder; then what only a folder can do: rot, fill up, be torn."""

import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from small_disk import small_disk

from sia_events.infra.blobs import BlobsUnavailable, open_blobs
from sia_events.infra.memory import MemoryBlobs
from sia_events.shared.ports import BlobCorrupt, BlobMissing, Blobs


@pytest.fixture(params=["memory", "folder", "URL"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    match request.param:
        case "memory":
            return MemoryBlobs()
        case "folder":
            return open_blobs(str(tmp_path / "deep" / "blobs"))
        case _:
            return open_blobs("memory:///")


@pytest.mark.parametrize("body", [b"", b"hello", bytes(range(256)) * 20_000])
async def test_a_body_comes_back_by_the_hash_of_its_bytes(blobs: Blobs, body: bytes):
    digest = await blobs.put(body)
    assert digest == hashlib.sha256(body).hexdigest()
    assert await blobs.get(digest) == body


async def test_a_body_put_many_times_at_once_is_one_blob(blobs: Blobs):
    digests = await asyncio.gather(*(blobs.put(b"same") for _ in range(20)))
    assert len(set(digests)) == 1
    assert await blobs.get(digests[0]) == b"same"


async def test_a_missing_blob_is_said_to_be(blobs: Blobs):
    with pytest.raises(BlobMissing, match="0" * 64):
        await blobs.get("0" * 64)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "0" * 63])
async def test_what_is_no_digest_is_never_looked_for(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="no SHA-256 digest"):
        await open_blobs(str(tmp_path)).get(name)


def only_file(folder: Path) -> Path:
    (path,) = (path for path in folder.rglob("*") if path.is_file())
    return path


async def test_rot_is_found_and_the_file_named(tmp_path: Path):
    blobs = open_blobs(str(tmp_path))
    digest = await blobs.put(b"precious")
    only_file(tmp_path).write_bytes(b"precioUs")
    with pytest.raises(BlobCorrupt, match=f"{tmp_path}/{digest[:2]}/{digest[2:]} is corrupt"):
        await blobs.get(digest)


@pytest.mark.parametrize("left", [b"pre", b"precioUs", b"precious and more", b""])
async def test_a_torn_or_rotten_blob_is_mended_by_putting_it_again(tmp_path: Path, left: bytes):
    blobs = open_blobs(str(tmp_path))
    digest = await blobs.put(b"precious")
    only_file(tmp_path).write_bytes(left)
    assert await blobs.put(b"precious") == digest
    assert await blobs.get(digest) == b"precious"


async def test_blobs_outlive_the_process_that_put_them(tmp_path: Path):
    digest = await open_blobs(str(tmp_path)).put(b"kept")
    assert await open_blobs(str(tmp_path)).get(digest) == b"kept"


async def test_a_full_disk_is_named_and_what_was_put_stays(tmp_path: Path):
    with small_disk(tmp_path, megabytes=1):
        blobs = open_blobs(str(tmp_path))
        digest = await blobs.put(b"kept")
        with pytest.raises(BlobsUnavailable, match=f"cannot write blob .* to {tmp_path}: .*No space left"):
            await blobs.put(os.urandom(2_000_000))
        assert await blobs.get(digest) == b"kept"
        small = await blobs.put(b"small still fits")
        assert await blobs.get(small) == b"small still fits"
