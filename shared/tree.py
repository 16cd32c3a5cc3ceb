"""A tree of files as content: a manifest blob {path: digest} over one blob a file, so that trees share and compare."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import msgspec

from sia_events.shared.ports import Blobs

DEEPEST = 100  # folders in one another; what was nested to do harm has thousands


class TreeRefused(Exception):
    """A folder that cannot be taken as a tree; the message names the file and the rule it breaks."""


async def store_tree(blobs: Blobs, files: Mapping[str, bytes]) -> str:
    """Store every file and the manifest; returns the manifest's digest."""
    manifest = {path: await blobs.put(body) for path, body in sorted(files.items())}
    return await blobs.put(msgspec.json.encode(manifest))


async def load_tree(blobs: Blobs, digest: str) -> dict[str, bytes]:
    """The files of a tree, by path."""
    manifest = msgspec.json.decode(await blobs.get(digest), type=dict[str, str])
    return {path: await blobs.get(body) for path, body in manifest.items()}


def write_tree(files: Mapping[str, bytes], folder: Path) -> None:
    """Lay the files down under `folder`, which is made. Raises TreeRefused for a path that leads out, before any is."""
    targets = {folder / _checked(path): body for path, body in files.items()}
    for target, body in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(body)


def read_tree(folder: Path, max_files: int = 1000, max_bytes: int = 64_000_000) -> dict[str, bytes]:
    """The regular files under `folder`. What untrusted code left there is data: links and devices are refused."""
    files: dict[str, bytes] = {}
    size = 0
    for path in _under(folder):
        within = path.relative_to(folder)
        name = within.as_posix()
        if not name.isprintable() or not _utf8(name):
            raise TreeRefused(f"{name!a} is no name for a file; printable names in UTF-8 are taken over")
        if len(within.parts) > DEEPEST:
            raise TreeRefused(f"more than {DEEPEST} folders are in one another, the outermost is {within.parts[0]}")
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise TreeRefused(f"{name} is a link or no plain file; only plain files are taken over")
        if path.is_dir():
            continue
        size += path.stat().st_size
        if len(files) == max_files or size > max_bytes:
            raise TreeRefused(f"more than {max_files} files or {max_bytes:,} bytes, at {name}")
        files[name] = path.read_bytes()
    return files


def remove_tree(folder: Path) -> None:
    """Remove a folder that untrusted code wrote in, as far as that can be done. Blocking.

    It may be nested deeper than Python descends, or shut against us: then programs do it that mind neither.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except (OSError, RecursionError):
        for command in (("chmod", "-R", "u+rwx"), ("rm", "-rf")):
            subprocess.run([*command, "--", str(folder)], capture_output=True)


def _under(folder: Path) -> Iterator[Path]:
    """Everything under `folder`, in order of name, a folder before what is in it; no link is followed."""
    waiting = _listed(folder)
    while waiting:
        path = waiting.pop()
        yield path
        if not path.is_symlink():
            waiting += _listed(path)


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, the last name first; nothing in what is none, or is not ours to read."""
    try:
        return sorted(folder.iterdir(), reverse=True)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked(path: str) -> PurePosixPath:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise TreeRefused(f"{path!r} leads out of its tree")
    return pure
