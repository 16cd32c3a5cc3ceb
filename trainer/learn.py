"""The learning child: a LoRA adapter trained on logged rollouts, one JSON line a step on stdout.

Run as `python -m sia_events.trainer.learn SPEC.json`. Killed and started again with the same spec, it goes on behind
the last step that it kept, and ends with the same adapter, byte for byte.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from sia_events.local_model import adapter as lora
from sia_events.local_model import parent, weights
from sia_events.shared.failpoints import reach
from sia_events.trainer.algorithms import ALGORITHMS, RewardRefused
from sia_events.trainer.backends import named, why_not_trl
from sia_events.trainer.batches import batches, largest, room_for
from sia_events.trainer.checkpoints import SavingFailed
from sia_events.trainer.credit import teaching
from sia_events.trainer.engines import LONG, Engine, OutOfMemory, TargetsRefused, out_of_memory
from sia_events.trainer.groups import RolloutGroup, RolloutsRefused, read
from sia_events.trainer.holding import divided
from sia_events.trainer.learner import Diverged, Learner
from sia_events.trainer.observing import collapsed
from sia_events.trainer.opening import opened
from sia_events.trainer.preparing import Method
from sia_events.trainer.spec import Spec, from_json
from sia_events.trainer.updating import PartLoss

PROBE_TEXTS = 4

Line = dict[str, Any]


def learn(
    spec: Spec, open_engine: Callable[[Spec], tuple[Engine, weights.ModelFolder]] = opened, halved: bool = False
) -> Iterator[Line]:
    """Train and write the adapter; yields a line a step and at last {"done": true, "stopped": why, ...}.

    `stopped` is "end", "kl", "collapse", "held out" when what is expected of held-out items fell, or
    "no signal" when no group's samples could be told apart: then, as when no step was better than none, no adapter is
    written. The last line has `counts` of what was learned from or left out, the `backend` that was used, and `probe`:
    a few texts with their log-probs under the finished adapter, at temperature 1. Bad input raises RolloutsRefused,
    RewardRefused, AdapterRefused, TargetsRefused or ModelNotReady before anything is trained; later OutOfMemory,
    Diverged and SavingFailed. `halved`: only half as much goes through the model at once, since the kernel ended a
    process in want of memory.
    """
    started = time.monotonic()
    torch.set_num_threads(spec.threads)
    torch.use_deterministic_algorithms(True)
    algorithm, learning = ALGORITHMS[spec.algorithm], spec.learning
    groups, counts = read(Path(spec.rollouts), algorithm.needs_logprobs or learning.hold_out > 0)
    learned, held = divided(groups, learning.hold_out, spec.seed)
    taught, alike = teaching(learned, algorithm, learning)
    if not taught:  # Learning from what was to be held out is better than learning nothing.
        held, (taught, alike) = [], teaching(groups, algorithm, learning)
    groups = taught
    counts.update(equal_rewards=alike, groups=len(groups), samples=sum(len(group.samples) for group in groups))
    if held:
        counts["held_out"] = len(held)
    if not groups:
        yield {"done": True, "stopped": "no signal", "adapter": None, "steps": 0, "counts": dict(counts)}
        return
    why_not = why_not_trl(groups, spec.algorithm, learning)
    by_trl = learning.backend == "trl" and why_not is None
    if by_trl:
        spec = replace(spec, engine="transformers")
    engine, folder = open_engine(_sparing(spec, groups))
    plan = list(batches(groups, learning.batch_prompts, spec.epochs, spec.seed))
    theirs = _trl_loss(engine, spec, groups) if by_trl else None
    room = room_for(engine, [*groups, *held], spec.micro_prompts)
    learner = Learner(engine, spec, len(plan) * learning.updates, room, theirs, started)
    if halved:
        learner.progress.room = learner.progress.room.halved()
    stopped, begun = "end", time.monotonic()
    if held and learner.progress.looks is None:
        learner.look(held)
    for step in range(learner.progress.step + 1, learner.steps + 1):
        if learner.fell():
            stopped = "held out"
            break
        at, update = divmod(step - 1, learning.updates)
        tally = learner.gradients(plan[at], fresh=update == 0)
        yield learner.told(step, tally, time.monotonic() - begun)
        if learning.kl_stop is not None and tally.kl > learning.kl_stop:
            stopped = "kl"
        elif step > spec.warmup and collapsed(learner.progress.recent):
            stopped = "collapse"
        if stopped != "end":
            break
        learner.take(step)
        if held and step % learning.look_every == 0:
            learner.look(held)
        reach(f"learner before keeping step {step}")
        learner.keep()
        reach(f"learner behind keeping step {step}")
    counts["masked"] = len(learner.progress.masked)
    best = learner.progress.step
    if held and best:
        best = learner.take_best(held)
        stopped = stopped if best else "held out"
    if not best:
        yield {"done": True, "stopped": stopped, "adapter": None, "steps": 0, "counts": dict(counts)}
        return
    learner.require_finite()
    _write(engine.adapter, Path(spec.adapter_out), folder)
    yield {
        **learner.progress.line,
        "step": learner.progress.step,  # of the one that stopped it there is a line, and nothing else
        "done": True,
        "stopped": stopped,
        "adapter": spec.adapter_out,
        "counts": dict(counts),
        "backend": named(learning.backend, why_not),
        "base": folder.digest,
        "probe": _probe(engine, groups, spec.seed),
        **learner.timed(),
    }


def _sparing(spec: Spec, groups: Sequence[RolloutGroup]) -> Spec:
    """The spec, with less kept of a pass where one is large that cannot be cut and nobody said otherwise."""
    least = Method(ALGORITHMS[spec.algorithm], spec.learning).least
    if spec.learning.recompute is not None or largest(groups, least) <= LONG:
        return spec
    return replace(spec, learning=spec.learning.model_copy(update={"recompute": True}))


def _trl_loss(engine: Engine, spec: Spec, groups: Sequence[RolloutGroup]) -> PartLoss:
    from sia_events.trainer.hugging_face import HuggingFaceEngine
    from sia_events.trainer.trl_loss import trl_loss

    assert isinstance(engine, HuggingFaceEngine), "TRL computes with transformers"
    return trl_loss(engine, spec, groups[0].scenes[0].temperature)


def _write(adapter: lora.Adapter, to: Path, folder: weights.ModelFolder) -> None:
    try:
        shutil.rmtree(to, ignore_errors=True)  # of one that was killed behind its end
        lora.write(adapter, to, folder.model, folder.digest)
    except (OSError, SafetensorError) as error:
        raise SavingFailed(
            f"The adapter could not be written to {to}: {error}. Its checkpoint is kept. Make room and start learning "
            "again: it goes on from there."
        ) from error


@torch.no_grad()
def _probe(engine: Engine, groups: Sequence[RolloutGroup], seed: int) -> list[Line]:
    """A few texts of the rollouts, drawn from the seed, with the log-prob of each of their tokens."""
    said = {
        (group.scenes[act.scene].prompt, group.said(act)): None
        for group in groups
        for sample in group.samples
        for act in sample.acts
    }
    texts = random.Random(seed).sample(list(said), min(PROBE_TEXTS, len(said)))
    return [
        {"prompt_ids": prompt, "completion_ids": tokens, "logprobs": engine.served(prompt, tokens)}
        for prompt, tokens in texts
    ]


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m sia_events.trainer.learn", description=__doc__)
    options.add_argument("spec", type=Path, help="JSON file, keys as in Spec")
    options.add_argument("--die-with-parent", action="store_true", help="end when stdin closes")
    options.add_argument("--halved", action="store_true", help="with half as much at once, for want of memory")
    given = options.parse_args()
    if given.die_with_parent:
        parent.end_with_parent()
    try:
        # One that was left over from a crash ends within moments; until then the checkpoint is its own.
        with FileLock(given.spec.with_suffix(".lock")):
            for line in learn(from_json(given.spec.read_bytes()), halved=given.halved):
                print(json.dumps(line), flush=True)
    except (RolloutsRefused, RewardRefused, lora.AdapterRefused, TargetsRefused) as refused:
        print(f"learn: {refused}", file=sys.stderr)
        sys.exit(os.EX_DATAERR)  # which no other try would change
    except Diverged as diverged:
        print(f"learn: {diverged}", file=sys.stderr)
        sys.exit(os.EX_SOFTWARE)  # as it would with any other try
    except (OutOfMemory, RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        said = error if isinstance(error, OutOfMemory) else OutOfMemory(f"and not over a step: {error}")
        print(f"learn: {said}", file=sys.stderr)
        sys.exit(os.EX_OSERR)  # as it would with any other try
    except (weights.ModelNotReady, SavingFailed, ValueError, TypeError, KeyError) as error:
        sys.exit(f"learn: {error}")


if __name__ == "__main__":
    main()
