"""How far the embedded streams have been copied, kept beside them: whether there is news is told without a server."""

import json
import os
from contextlib import suppress
from pathlib import Path

from sia_events.infra.nats_partitions import holds_history


def sizes(store: Path) -> dict[str, int]:
    """Bytes in the message files of each stream of history; empty when no server ever ran on `store`.

    The server writes a message to the end of its stream's last file before it acknowledges it (`sync_interval`), and
    leaves these files alone when it starts and ends. So equal sizes mean that nothing came.
    """
    found: dict[str, int] = {}
    for folder in sorted((store / "jetstream" / "$G" / "streams").glob("*/msgs")):
        if holds_history(name := folder.parent.name):
            found[name] = 0
            for file in folder.glob("*.blk"):
                with suppress(FileNotFoundError):  # a running server replaces a full file by a compressed one
                    found[name] += file.stat().st_size
    return found


def keep(copied: dict[str, int], mark: Path) -> None:
    """Note that everything up to these sizes has been copied."""
    fresh = mark.with_name(f"{mark.name}.{os.getpid()}")
    fresh.write_text(json.dumps(copied))
    fresh.replace(mark)


def has_news(store: Path, mark: Path) -> bool:
    """Whether `store` has something that was not there when `mark` was kept, or may have, for want of a mark."""
    found = sizes(store)
    try:
        return bool(found) and found != json.loads(mark.read_text())
    except (OSError, ValueError):
        return True
