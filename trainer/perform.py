"""Updates a LoRA adapter on the incumbent's logged rollouts, in a process of its own."""

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from sia_events.local_model.weights import prepare
from sia_events.shared.calls import decode_call
from sia_events.shared.environment import plain
from sia_events.shared.events import Event, ProposalFailed, Weights, WeightsUpdated, WeightUpdateRequested
from sia_events.shared.ports import Envelope, Ports
from sia_events.shared.service import Work
from sia_events.shared.tree import load_tree, read_tree, store_tree, write_tree
from sia_events.trainer.rollouts import rollouts, to_lines


class LearningFailed(Exception):
    """The learning process ended without an adapter; the message is its last words."""


async def update(work: Work, asked: WeightUpdateRequested) -> Sequence[Event]:
    """Learn from the attempt's calls and rewards under the parent's own harness; the adapter goes in by content."""
    ports, parent = work.ports, work.run.versions[asked.parent]
    calls = [decode_call(line) for line in (await ports.blobs.get(asked.trajectory)).splitlines()]
    rewards = msgspec.json.decode(await ports.blobs.get(asked.rewards), type=dict[str, float])
    if not parent.weights.model.startswith("local/"):
        return [_barren(asked, f"{parent.weights.model} is not the embedded model: its weights are not ours to train")]
    found = rollouts(calls, rewards)
    if not found:
        return [_barren(asked, "nothing to learn from: none of the parent's model calls names its item")]
    scratch = ports.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="learn-", dir=scratch))
    started = time.monotonic()
    try:
        (folder / "rollouts.jsonl").write_bytes(to_lines(found))
        if parent.weights.adapter:
            write_tree(await load_tree(ports.blobs, parent.weights.adapter), folder / "parent")
        model = await asyncio.to_thread(prepare, ports.home)
        spec = {
            "model": str(model.path),
            "adapter_in": str(folder / "parent") if parent.weights.adapter else None,
            "adapter_out": str(folder / "adapter"),
            "rollouts": str(folder / "rollouts.jsonl"),
            "algorithm": asked.algorithm,
            "seed": asked.seed,
            "epochs": asked.epochs,
            "threads": ports.threads,
        }
        (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
        metrics = await _learn(folder / "spec.json", ports, work.run.name, f"g{asked.generation}")
        if not (folder / "adapter").is_dir():
            return [_barren(asked, f"nothing to learn from {len(found)} rollouts: every group was rewarded alike")]
        adapter = await store_tree(ports.blobs, read_tree(folder / "adapter", max_bytes=1_000_000_000))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [
        WeightsUpdated(
            version=f"g{asked.generation}a",
            generation=asked.generation,
            parent=parent.name,
            harness=parent.harness,
            weights=Weights(model=parent.weights.model, adapter=adapter),
            algorithm=asked.algorithm,
            rollouts=len(found),
            metrics={k: round(float(v), 6) for k, v in metrics.items() if isinstance(v, int | float) and k != "done"},
            seconds=round(time.monotonic() - started, 3),
        )
    ]


async def _learn(spec: Path, ports: Ports, run: str, key: str) -> dict[str, Any]:
    """Run the learner; its lines go to the trace as they come. Ends with us: it watches its standard input."""
    threads = str(ports.threads)
    env = {**plain(), "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sia_events.trainer.learn", str(spec), "--die-with-parent"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
    )
    assert child.stdout and child.stderr
    words = asyncio.create_task(child.stderr.read())
    last: dict[str, Any] = {}
    try:
        async for line in child.stdout:
            last = msgspec.json.decode(line)
            await ports.bus.trace(Envelope(run, "training", key, (line.rstrip(),)))
        code = await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if code or not last.get("done"):
        raise LearningFailed((await words).decode(errors="replace").strip()[-2000:] or f"exit status {code}")
    words.cancel()
    return last


def _barren(asked: WeightUpdateRequested, reason: str) -> ProposalFailed:
    return ProposalFailed(generation=asked.generation, parent=asked.parent, lever="weights", reason=reason)
