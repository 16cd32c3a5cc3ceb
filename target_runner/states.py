"""What the rollouts of a search start from: archived solutions, laid down beside the items as files."""

from collections.abc import Mapping

import msgspec

from sia_events.shared.events import AttemptRequested, Start
from sia_events.shared.run import Run
from sia_events.shared.service import Work
from sia_events.shared.tree import load_tree

FOLDER = "state"
ITEMS = "items.jsonl"


async def with_states(work: Work, asked: AttemptRequested, data: Mapping[str, bytes]) -> dict[str, bytes]:
    """`data` with what each start wrote, under state/ and its name, and in each item's line the folder it starts from.

    All samples of an item start from the same, so that they are compared with each other; a whole attempt has one.
    """
    if not asked.starts:
        return dict(data)
    folders = [f"{FOLDER}/{start.state}" for start in asked.starts]
    laid: dict[str, bytes] = {}
    for start, folder in zip(asked.starts, folders, strict=True):
        written = await load_tree(work.ports.blobs, _outputs(work.run, start))
        laid |= {f"{folder}/{path}": body for path, body in written.items()}
    if ITEMS not in data:
        return {**data, **laid}
    lines = [msgspec.json.decode(line) for line in data[ITEMS].splitlines()]
    for place, line in enumerate(lines):
        line["state"] = folders[place // asked.samples % len(folders)]
    return {**data, **laid, ITEMS: b"".join(msgspec.json.encode(line) + b"\n" for line in lines)}


def _outputs(run: Run, start: Start) -> str:
    """The digest of what a rollout wrote, or a version when it was last scored on dev."""
    return run.executions[start.attempt or run.scored(start.version, "dev")[-1].attempt].outputs
