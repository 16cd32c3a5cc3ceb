"""A home, the folder of SIA_HOME: the one process that runs its services, and where its sockets are."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from sia_events.errors import NodeHeld, Unusable
from sia_events.infra.store_lock import owner
from sia_events.shared.settings import Settings
from sia_events.shared.tree import remove_tree

# Folders of sockets, in the place for temporary files, and what in them leads to the home that they are of.
SOCKETS, HOME = f"sia-{os.getuid()}-", "home"


def make_home(settings: Settings) -> None:
    """Raises Unusable where the home cannot be."""
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"{settings.home} cannot be made: {error.strerror}"
        raise Unusable(f"{said}; set SIA_HOME to a folder of yours") from error


@asynccontextmanager
async def hold(settings: Settings, purpose: str) -> AsyncIterator[None]:
    """Be the one process that runs this home's services. Raises NodeHeld."""
    make_home(settings)
    lock, note = FileLock(settings.home / "node.lock"), settings.home / "node.json"
    try:
        # Others that only look whether we run take it for an instant.
        lock.acquire(timeout=0.3, poll_interval=0.02)
    except Timeout as error:
        running = running_node(settings) or {"pid": "?", "purpose": "?"}
        raise NodeHeld(
            f"{describe(running, settings.home)}; nothing was written. Wait for it, set SIA_HOME to another folder, "
            "or have runs share services: sia up"
        ) from error
    try:
        try:
            note.write_text(json.dumps({"pid": os.getpid(), "purpose": purpose}))
        except OSError as error:
            raise Unusable(
                f"{note} cannot be written: {error.strerror}. What was acknowledged is kept: free some space, or mend "
                "its permissions, then say it again"
            ) from error
        _sweep(settings)
        yield
    finally:
        note.unlink(missing_ok=True)
        _remove_sockets(socket_place(settings))
        lock.release()


@contextmanager
def at_work(settings: Settings) -> Iterator[None]:
    """Have the scratch folders left alone: services on an outside bus work in them, and hold no home."""
    make_home(settings)
    with _scratch_lock(settings) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def _sweep(settings: Settings) -> None:
    """Remove the scratch folders that were left behind, unless somebody is at work in this home; and the sockets of
    homes that are no more, whose services were killed.
    """
    for place in Path(tempfile.gettempdir()).glob(f"{SOCKETS}*"):
        if os.path.islink(place / HOME) and not os.path.exists(place / HOME) and not _listened_to(place):
            shutil.rmtree(place, ignore_errors=True)
    with _scratch_lock(settings) as lock, suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in (settings.home / "tmp").glob("*-*"):
            remove_tree(left)


def _listened_to(place: Path) -> bool:
    """Whether somebody answers on a socket there: the home may only be out of our sight, in another container."""
    for each in place.glob("*.sock"):
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(str(each))
            return True
    return False


def _scratch_lock(settings: Settings) -> TextIO:
    return (settings.home / "tmp.lock").open("a")


def running_node(settings: Settings) -> Mapping[str, object] | None:
    """{pid, purpose} of the process that runs this home's services, or None."""
    file = settings.home / "node.lock"
    if not file.exists():
        return None
    try:
        FileLock(file).acquire(timeout=0).lock.release()
    except Timeout:
        with suppress(OSError, ValueError):
            return json.loads((settings.home / "node.json").read_text())
    except OSError:
        return None
    return None


def describe(running: Mapping[str, object], home: Path) -> str:
    return f"process {running['pid']} (sia {running['purpose']}) runs the services of {home}"


def own_nats_url(settings: Settings) -> str:
    """The URL of the bus server that another process of this home runs. Raises NodeHeld while there is none yet."""
    found = owner(settings.home / "nats")
    if found is None or found.dsn is None:
        raise NodeHeld(f"the process that runs the services of {settings.home} has no bus yet; try again in a moment")
    return found.dsn


@contextmanager
def only_one(name: str, settings: Settings) -> Iterator[None]:
    """Be this home's one gateway or recorder: they own a socket and a store. Raises NodeHeld."""
    lock = FileLock(settings.home / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise NodeHeld(f"another process is the {name} of {settings.home} already; nothing was changed") from error
    try:
        yield
    finally:
        lock.release()


def is_taken(name: str, settings: Settings) -> bool:
    """Whether some process is this home's one gateway or recorder."""
    lock = FileLock(settings.home / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def socket_folder(settings: Settings) -> Path:
    """A folder of ours for unix sockets, whose names must stay under 108 bytes however deep the home lies."""
    folder = socket_place(settings)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else; remove it or set TMPDIR")
    with suppress(FileExistsError):
        (folder / HOME).symlink_to(settings.home.absolute())
    return folder


def socket_place(settings: Settings) -> Path:
    """That folder's name; whoever holds the home removes it at its end."""
    mark = hashlib.sha256(str(settings.home).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"{SOCKETS}{mark}"


def _remove_sockets(folder: Path) -> None:
    """Remove a folder of sockets, unless one is in it: whoever has that still runs, or was killed and comes again."""
    with suppress(OSError):
        if [each.name for each in folder.iterdir()] == [HOME]:
            (folder / HOME).unlink()
        folder.rmdir()


def door_socket(settings: Settings) -> Path:
    """Where this home's gateway listens."""
    return socket_folder(settings) / "gateway.sock"
