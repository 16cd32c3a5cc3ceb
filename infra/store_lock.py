"""Who owns an embedded store: one process at a time, named in a file beside the store."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout


@dataclass(frozen=True)
class Owner:
    """The process that holds a store; `dsn` says how to ask it, or is None when it takes no questions."""

    pid: int
    dsn: str | None


class StoreHeld(Exception):
    """Another process holds the store; `owner.dsn` says how to ask it, where it takes questions."""

    def __init__(self, path: Path, owner: Owner | None) -> None:
        who = f"process {owner.pid}" if owner else "another process"
        super().__init__(
            f"the store {path} is held by {who}; nothing was written. "
            "Stop that process, or set SIA_HOME to another folder."
        )
        self.path = path
        self.owner = owner


@contextmanager
def claim(path: Path, dsn: str | None = None, patience: float = 0.0) -> Iterator[Owner]:
    """Hold the store at `path` until the block ends; the kernel releases it when the process dies.

    The name of the owner goes into `PATH.owner`, readable by this user alone since a DSN carries a token; raises
    OSError where that of one who takes questions cannot be written.
    Raises StoreHeld when another process, or another claim of this one, still has it after `patience` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_beside(path, "lock"))
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise StoreHeld(path, owner(path)) from None
    try:
        mine = Owner(os.getpid(), dsn)
        try:
            _write_private(_beside(path, "owner"), json.dumps(asdict(mine)))
        except OSError:
            if dsn:
                raise
            # On a full disk there is no room for a name, and who takes no questions can do without.
            _beside(path, "owner").unlink(missing_ok=True)
        yield mine
    finally:
        _beside(path, "owner").unlink(missing_ok=True)
        lock.release()


def owner(path: Path) -> Owner | None:
    """The name last written beside the store. It may be that of a dead process: only the lock tells."""
    try:
        return Owner(**json.loads(_beside(path, "owner").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _write_private(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
