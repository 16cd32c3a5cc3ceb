"""Shell commands of an agent that writes a harness: run in a box on a scratch copy, and recorded like a model call."""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sia_events.agents.check import MAX_FILES, MAX_TREE, without_caches
from sia_events.shared.failpoints import reach
from sia_events.shared.ports import Brief, Envelope, Job, Limits, Outcome, Ports
from sia_events.shared.tree import TreeRefused, load_tree, read_tree, remove_tree, store_tree, write_tree

LIMITS = Limits(wall_s=60.0, cpu_s=60.0, memory_mb=512, processes=32, file_mb=8, open_files=128, output_bytes=16_000)


class Step(msgspec.Struct, frozen=True):
    """A command that was run: `key` names it by its place and by the tree it met, `tree` is what it left behind."""

    key: str
    command: str
    text: str
    tree: str


Steps = dict[str, Step]


async def recorded_steps(brief: Brief, ports: Ports) -> Steps:
    """The commands that an earlier start of the same brief has run, by key."""
    envelopes = await ports.bus.traces(brief.run, "step", brief.key)
    steps = [msgspec.json.decode(line, type=Step) for each in envelopes for line in each.lines]
    return {step.key: step for step in steps}


async def run_command(
    brief: Brief, ports: Ports, steps: Steps, number: int, command: str, files: Mapping[str, bytes]
) -> tuple[Mapping[str, bytes], str]:
    """The harness that `command` leaves behind, and what it said; `number` is its place among the brief's commands.

    A command that was run in an earlier start is not run again: its second output would differ in a time or an
    address, and every model call behind it would be another one and be paid for again.
    """
    key = hashlib.sha256(f"{number} {await store_tree(ports.blobs, files)} {command}".encode()).hexdigest()
    if known := steps.get(key):
        return await load_tree(ports.blobs, known.tree), known.text
    scratch = ports.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="writing-", dir=scratch))
    try:
        for name, tree in (("work", files), ("data", brief.data)):
            (folder / name).mkdir()
            write_tree(tree, folder / name)
        env = {"DATA": "/data", "PYTHONDONTWRITEBYTECODE": "1"}
        reads = {"/data": folder / "data"}
        outcome = await ports.sandbox.run(Job(("sh", "-c", command), folder / "work", reads, env, None, LIMITS))
        text = told(outcome)
        try:
            files = without_caches(read_tree(folder / "work", MAX_FILES, MAX_TREE))
        except TreeRefused as refused:
            text = f"{text}\nThe files are as they were before: {refused}"
    finally:
        remove_tree(folder)
    step = Step(key, command, text, await store_tree(ports.blobs, files))
    reach("agents before recording a command")
    await ports.bus.trace(Envelope(brief.run, "step", brief.key, (msgspec.json.encode(step),)))
    reach("agents after recording a command")
    return files, text


def told(outcome: Outcome) -> str:
    """How a command ended and what it wrote; what was cut is said."""
    parts = [outcome.stdout.decode(errors="replace"), outcome.stderr.decode(errors="replace")]
    if outcome.truncated:
        parts.append(f"[output behind the first {LIMITS.output_bytes:,} bytes of a stream is left out]")
    if outcome.exit_code is None:
        parts.append(f"[ended at its {outcome.status} limit]")
    else:
        parts.append(f"[exit status {outcome.exit_code}]")
    return "\n".join(part.rstrip("\n") for part in parts if part)
