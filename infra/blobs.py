"""Bodies by content in a folder or in a bucket: a blob's name is its SHA-256, so what is read can be proven."""

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from sia_events.shared.ports import BlobCorrupt, BlobMissing

# Half of how young a blob has to be to be left alone by those who sweep.
FRESH = timedelta(minutes=30)

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Kept:
    """A blob in a store: its name, its bytes, and when it was last written, UTC."""

    digest: str
    size: int
    written: datetime


class BlobsUnavailable(Exception):
    """The store cannot be read or written just now: disk full, no permission, no connection."""


class StoredBlobs:
    """The `Blobs` port on obstore. `where` is how messages name the store; `root` its folder, when it is one."""

    def __init__(self, store: ObjectStore, where: str, root: Path | None = None) -> None:
        self._store = store
        self._where = where
        self._root = root

    async def put(self, body: bytes) -> str:
        digest = hashlib.sha256(body).hexdigest()
        path = _path(digest)
        try:
            # One that was torn, or has rotted since, is mended by writing it again; and an old one that nothing names
            # may be swept away before a record names it.
            if await self._stored(path) != body or await self._is_old(path):
                await obstore.put_async(self._store, path, body)
                if self._root:
                    await asyncio.to_thread(_sync, self._root / path)
        except (BaseError, OSError) as error:
            raise BlobsUnavailable(f"cannot write blob {digest} to {self._where}: {_why(error)}") from error
        return digest

    async def get(self, digest: str) -> bytes:
        path = _path(digest)
        try:
            body = await self._stored(path)
        except (BaseError, OSError) as error:
            raise BlobsUnavailable(f"cannot read blob {digest} from {self._where}: {_why(error)}") from error
        if body is None:
            raise BlobMissing(f"no blob {digest} in {self._where}")
        if hashlib.sha256(body).hexdigest() != digest:
            raise BlobCorrupt(
                f"blob {self._where}/{path} is corrupt: its bytes are not those it was stored with. "
                "Put back a good copy, or remove it and start the run that made it again."
            )
        return body

    async def listed(self) -> AsyncIterator[Kept]:
        """Every blob there is, in no particular order. What else lies in the place is passed over."""
        try:
            async for page in obstore.list(self._store):
                for meta in page:
                    name = meta["path"].replace("/", "")
                    if _DIGEST.fullmatch(name) and _path(name) == meta["path"]:
                        yield Kept(name, meta["size"], meta["last_modified"])
        except (BaseError, OSError) as error:
            raise BlobsUnavailable(f"cannot list {self._where}: {_why(error)}") from error

    async def remove(self, digest: str, unless_since: datetime) -> bool:
        """Remove a blob that was last written before then; returns whether it was."""
        path = _path(digest)
        try:
            if (await obstore.head_async(self._store, path))["last_modified"] >= unless_since:
                return False
            await obstore.delete_async(self._store, path)
        except FileNotFoundError:
            return False
        except (BaseError, OSError) as error:
            raise BlobsUnavailable(f"cannot remove blob {digest} from {self._where}: {_why(error)}") from error
        return True

    async def _is_old(self, path: str) -> bool:
        written = (await obstore.head_async(self._store, path))["last_modified"]
        return datetime.now(UTC) - written > FRESH

    async def _stored(self, path: str) -> bytes | None:
        try:
            return bytes(await (await obstore.get_async(self._store, path)).bytes_async())
        except FileNotFoundError:
            return None


def open_blobs(place: str) -> StoredBlobs:
    """Blobs in a folder, made when it is missing, or in an object store by URL, such as s3://bucket/prefix.

    In a folder a put is on disk when it returns. A folder that is made is its owner's alone to read, since blobs hold
    answers and what agents were told. A bucket's keys and region come from the environment, as usual there.

    Raises BlobsUnavailable where there can be none.
    """
    root = Path(place)
    try:
        if "://" in place:
            return StoredBlobs(from_url(place), place)
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (BaseError, OSError, ValueError) as error:
        raise BlobsUnavailable(f"no blobs can be kept in {place}: {_why(error)}") from error
    return StoredBlobs(LocalStore(place, automatic_cleanup=True), place, root)


def _path(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is no SHA-256 digest in lower-case hex")
    return f"{digest[:2]}/{digest[2:]}"


def _why(error: Exception) -> str:
    """What went wrong, without what obstore adds for whoever works on it."""
    return str(error).partition("\n\nDebug source")[0]


def _sync(file: Path) -> None:
    """Make the file and its names outlast a power cut: an event that refers to it may be on disk a moment later."""
    for path in (file, file.parent, file.parent.parent):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
