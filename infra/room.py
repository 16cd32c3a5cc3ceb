"""Room on a disk: how much of it is wanted before something is begun there, and how the want of it is told."""

import errno
import shutil
from pathlib import Path

# Streams that run out of room freeze. An engine that runs out of it over a table leaves a definition without a word in
# it, and opens the store no more. So neither begins with less, in bytes.
MIN_FREE = 64 << 20


def is_full(error: BaseException) -> bool:
    """Whether a disk, or somebody's share of it, had no room left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def lacking(store: Path) -> str:
    """What there is to say where the disk has too little room to begin on; `store`, or its folder, is there."""
    return too_little(store, shutil.disk_usage(store if store.exists() else store.parent).free)


def too_little(store: object, free: int) -> str:
    """The same of so many bytes that are free; nothing where they are enough."""
    if free >= MIN_FREE:
        return ""
    return (
        f"the disk of {store} is full: {free >> 20} MB are free, {MIN_FREE >> 20} MB are needed. "
        "Nothing was written. Free some space, or set SIA_HOME to another disk."
    )
