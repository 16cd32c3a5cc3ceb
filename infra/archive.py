"""An archive file: members in a tar under Zstandard, the first says what it is, the last what all of them have to be.

docs/archive.md describes the format. Whoever reads one has read it to its end and checked it before anything is used.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sia_events.infra.zstd import zstd

FORMAT, VERSION = "sia-archive", 1
HEAD, MANIFEST = "archive.json", "manifest.json"
LEVEL = 9
PIECE = 2**20


class ArchiveUnusable(Exception):
    """The file is no archive, or not whole, or of a later release; nothing was written."""


async def write(file: Path, head: Mapping[str, Any], members: AsyncIterator[tuple[str, bytes]]) -> None:
    """Write an archive, its owner's alone to read. The file is there once it is whole.

    Equal members make equal files: no time and no owner goes in.
    """
    made: dict[str, dict[str, Any]] = {}
    draft = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as raw:
            with zstd.ZstdFile(raw, "wb", options=_OPTIONS) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
                _add(tar, HEAD, _json({"format": FORMAT, "version": VERSION, **head}), made)
                async for name, body in members:
                    _add(tar, name, body, made)
                _add(tar, MANIFEST, _json({"members": made}), {})
            raw.flush()
            os.fsync(raw.fileno())
        draft.rename(file)
    finally:
        draft.unlink(missing_ok=True)


def read(file: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    """The archive's members between head and manifest, in order; the head is checked first, the manifest at the end.

    A member comes in pieces, so that it need not be held as a whole; what is not taken of it is read all the same.
    Raises ArchiveUnusable, maybe behind the last member.
    """
    seen: dict[str, dict[str, Any]] = {}
    listed: Any = None
    for name, pieces in _members(file):
        if listed is not None:
            raise ArchiveUnusable(f"{file} has more behind its end; nothing was written")
        if not seen:
            body = b"".join(pieces) if name == HEAD else b""
            check_head(file, name, body)
            seen[name] = _entry(body)
        elif name == MANIFEST:
            listed = _parsed(file, b"".join(pieces)).get("members")
            if not isinstance(listed, dict):
                raise ArchiveUnusable(f"{file} was altered: its manifest names no members; nothing was written")
        elif name in seen:
            raise ArchiveUnusable(f"{file} has two members {name!r}; nothing was written")
        else:
            measured = _measured(pieces, seen.setdefault(name, {}))
            yield name, measured
            for _ in measured:
                pass
    if listed is None:
        raise ArchiveUnusable(f"{file} is cut short: its manifest is missing; nothing was written. Copy it again.")
    if wrong := sorted(name for name in {*seen, *listed} if seen.get(name) != listed.get(name)):
        raise ArchiveUnusable(f"{file} was altered: {wrong[0]} is not what its manifest says; nothing was written")


def lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """What stands between the line ends of a member."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
    if rest:
        yield rest


def read_head(file: Path) -> Mapping[str, Any]:
    """What the archive says it is. Raises ArchiveUnusable."""
    for name, pieces in _members(file):
        return check_head(file, name, b"".join(pieces) if name == HEAD else b"")
    raise ArchiveUnusable(f"{file} is empty; nothing was written")


def check_head(file: Path, name: str, body: bytes) -> Mapping[str, Any]:
    """Raises ArchiveUnusable for what is no archive of ours, and for one that only a later release can read."""
    head = _parsed(file, body) if name == HEAD else {}
    if head.get("format") != FORMAT:
        raise ArchiveUnusable(f"{file} is no archive of a run (sia archive RUN makes one); nothing was written")
    if not isinstance(head.get("version"), int) or head["version"] > VERSION:
        said = f"of version {head.get('version')}; this release reads up to {VERSION}"
        raise ArchiveUnusable(f"{file} is an archive {said}. Nothing was written. Use a later release.")
    return head


def _members(file: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    with _refusing(file), zstd.ZstdFile(file, "rb") as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
        for entry in tar:
            body = tar.extractfile(entry) if entry.isreg() else None
            if body is None:
                raise ArchiveUnusable(f"{file} has a member that is no plain file; nothing was written")
            yield entry.name, _pieces(file, body)
        # The checksum stands behind the last member: who stops there has not read it, nor what somebody added.
        while piece := packed.read(PIECE):
            if piece.strip(b"\0"):  # a tar is filled up with these
                raise ArchiveUnusable(f"{file} has more behind its end; nothing was written")


def _pieces(file: Path, body: IO[bytes]) -> Iterator[bytes]:
    with _refusing(file):
        while piece := body.read(PIECE):
            yield piece


@contextmanager
def _refusing(file: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zstd.ZstdError, EOFError) as error:
        raise ArchiveUnusable(f"{file} is cut short or altered: {error}; nothing was written") from error
    except OSError as error:
        raise ArchiveUnusable(f"{file} cannot be read: {error.strerror or error}; nothing was written") from error


def _measured(pieces: Iterable[bytes], into: dict[str, Any]) -> Iterator[bytes]:
    """The pieces, and when they are through, what they come to."""
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
        yield piece
    into.update(size=size, sha256=digest.hexdigest())


def _add(tar: tarfile.TarFile, name: str, body: bytes, made: dict[str, dict[str, Any]]) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(body), 0o600
    tar.addfile(entry, io.BytesIO(body))
    made[name] = _entry(body)


def _entry(body: bytes) -> dict[str, Any]:
    return {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()


def _parsed(file: Path, body: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(body), dict):
            return found
    raise ArchiveUnusable(f"{file} was altered: its head or manifest is no JSON object; nothing was written")


_OPTIONS: Mapping[int, int] = {
    zstd.CompressionParameter.compression_level: LEVEL,
    zstd.CompressionParameter.checksum_flag: 1,
}
