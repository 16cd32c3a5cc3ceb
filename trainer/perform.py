"""Updates a LoRA adapter on logged rollouts: from the log to the learner, and from there to whoever serves it."""

import asyncio
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from sia_events.local_model.weights import prepare
from sia_events.shared.calls import ModelCall, decode_call
from sia_events.shared.events import (
    Event,
    ProposalFailed,
    RolloutSource,
    Weights,
    WeightsUpdated,
    WeightUpdateRequested,
)
from sia_events.shared.outage import fails_alone
from sia_events.shared.oversight import active_minutes
from sia_events.shared.ports import Ports, ProviderAway
from sia_events.shared.run import Version, fold
from sia_events.shared.service import Work
from sia_events.shared.tree import load_tree, read_tree, store_tree, write_tree
from sia_events.trainer.algorithms import ALGORITHMS
from sia_events.trainer.algorithms.weighing import LARGEST
from sia_events.trainer.base_model import base_folder, lacks
from sia_events.trainer.child import LearningDiverged, LearningRefused, LearningTooLarge, run_learner
from sia_events.trainer.manifest import manifest
from sia_events.trainer.probe import claims, probe, within_budget
from sia_events.trainer.rollouts import WHOLE, Source, Step, gather, to_lines

STORED = "updated.json"
MOMENT_S = 0.1
LARGEST_ADAPTER = 4_000_000_000


class Barren(Exception):
    """There is nothing to learn, or nothing that may; no retry would change it."""


async def update(work: Work, asked: WeightUpdateRequested) -> Sequence[Event]:
    """Learn from the attempts' calls and rewards; the adapter goes in by content, and is served before it is told of.

    Whoever answers this request again after a crash goes on where the learner was, in the same folder, and once the
    adapter is stored repeats the answer.
    """
    folder = work.ports.home / "learning" / learning_key(work.run.name, asked)
    if (folder / STORED).is_file():
        return [WeightsUpdated.model_validate_json((folder / STORED).read_bytes())]
    try:
        updated = await _update(work, asked, folder)
    except Barren as barren:
        shutil.rmtree(folder, ignore_errors=True)
        return [ProposalFailed(generation=asked.generation, parent=asked.parent, lever="weights", reason=str(barren))]
    draft = folder / f"{STORED}.draft"
    draft.write_text(updated.model_dump_json())
    draft.replace(folder / STORED)
    _tidy(folder, work.run.name)
    return [updated]


async def _update(work: Work, asked: WeightUpdateRequested, folder: Path) -> WeightsUpdated:
    ports, parent, started = work.ports, work.run.versions[asked.parent], time.monotonic()
    _require_known(asked)
    model = await _base_model(ports, parent.weights)
    sources = await _sources(work, asked, parent)
    algorithm = ALGORITHMS[asked.algorithm]
    found, counts = gather(
        sources,
        max_lag=asked.learning.max_lag,
        context=json.loads((model / "config.json").read_text()).get("max_position_embeddings"),
        needs_logprobs=algorithm.needs_logprobs or asked.learning.hold_out > 0,
    )
    if not found:
        raise Barren(_why_nothing(counts, asked))
    before = await load_tree(ports.blobs, parent.weights.adapter) if parent.weights.adapter else {}
    write_tree({"rollouts.jsonl": to_lines(found), **{f"parent/{name}": body for name, body in before.items()}}, folder)
    spec = {
        "model": str(model),
        "adapter_in": str(folder / "parent") if parent.weights.adapter else None,
        "adapter_out": str(folder / "adapter"),
        "checkpoint": str(folder / "checkpoint.safetensors"),
        "rollouts": str(folder / "rollouts.jsonl"),
        "algorithm": asked.algorithm,
        "learning": asked.learning.model_dump(),
        "seed": asked.seed,
        "epochs": asked.epochs,
        "threads": ports.threads,
    }
    (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
    key = f"g{asked.generation}"
    try:
        last = await _learned(work, folder / "spec.json", key, parent.weights, found[0].steps[0])
    except LearningRefused as refused:
        raise Barren(
            f"{asked.algorithm} was not begun: {refused} {parent.name} stays as it is, its rollouts are on record. The "
            "same would be refused again: mend what is named, then sia branch "
            f"{work.run.name} --at {asked.generation - 1}"
        ) from refused
    except LearningDiverged as diverged:
        raise Barren(
            f"{asked.algorithm} was broken off: {diverged} {parent.name} stays as it is, its rollouts are on record. "
            f"To learn anew, with smaller steps: sia branch {work.run.name} --at {asked.generation - 1} --set "
            f"learning.lr={asked.learning.lr / 10:g}"
        ) from diverged
    except LearningTooLarge as large:
        raise Barren(
            f"{asked.algorithm} was broken off: {large} {parent.name} stays as it is, its rollouts are on record. "
            f"To learn anew: sia branch {work.run.name} --at {asked.generation - 1} --set learning.recompute=true"
        ) from large
    # Those of a process that was killed: they were spent as well.
    started -= last.pop("earlier_seconds", 0.0)
    counts.update(last["counts"])
    if last["adapter"] is None:
        why = f"none can be told from its siblings by its reward ({_told(counts)})"
        if last["stopped"] == "kl":
            why = "the weights are further from what made them than learning.kl_stop before the first step"
        if last["stopped"] == "held out":
            why = "no step made the reward that is expected of the held-out items higher than it was"
        raise Barren(f"nothing to learn from {len(found)} samples: {why}")
    files = read_tree(folder / "adapter", max_bytes=LARGEST_ADAPTER)
    weights = Weights(model=parent.weights.model, adapter=await store_tree(ports.blobs, files))
    try:
        proof = await probe(
            *(ports, work.run.name, key, weights, parent.weights),
            [(tuple(text["prompt_ids"]), tuple(text["completion_ids"])) for text in last["probe"]],
            [text["logprobs"] for text in last["probe"]],
        )
    except ProviderAway as away:
        if not await fails_alone(work, away, claims(work.run.name, key, weights)):
            raise
        raise Barren(f"given up, since what serves {weights.model} answers others: {away}") from away
    told = _told_of_items(asked)
    metrics = {name: round(float(value), 6) for name, value in last.items() if type(value) in (int, float)}
    left = {name: count for name, count in sorted(counts.items()) if count}
    about = manifest(
        weights=weights,
        base=last["base"],
        parent=parent.weights,
        algorithm=asked.algorithm,
        learning=asked.learning,
        trajectories=[each.trajectory for each in (*told, *asked.whole)],
        rewards=[*(source.rewards for source in told), *(each.reward for each in asked.whole)],
        counts=left,
        metrics=metrics,
        seed=asked.seed,
        code=version("sia-events"),
        backend=last["backend"],
        probe=proof,
    )
    seconds, an_hour = round(time.monotonic() - started, 3), ports.trainer_usd_per_hour
    return WeightsUpdated(
        version=f"g{asked.generation}a",
        generation=asked.generation,
        parent=parent.name,
        harness=parent.harness,
        weights=weights,
        algorithm=asked.algorithm,
        rollouts=len(found),
        metrics=metrics,
        seconds=seconds,
        counts=left,
        probe=proof,
        manifest=await ports.blobs.put(about),
        backend=last["backend"],
        usd=None if an_hour is None else round(an_hour * seconds / 3600, 6),
    )


async def _learned(work: Work, spec: Path, key: str, before: Weights, step: Step) -> dict[str, Any]:
    """The learner's last line, as `run_learner` has it.

    The run's minutes end it: raises BudgetSpent, and whoever asks again once there are more goes on behind the last
    step. `step` is a call that `before` can score, by which the gateway is asked whether the minutes are used up.
    """
    ports, run = work.ports, work.run.name
    acted = step.completion_ids or step.choice_ids[step.index]
    while True:
        try:
            async with asyncio.timeout(await _seconds_left(ports, run)) as limit:
                return await run_learner(spec, ports, run, key)
        except TimeoutError:
            if not limit.expired():
                raise
        await within_budget(ports, run, key, before, (step.prompt_ids, acted[:1]))


async def _seconds_left(ports: Ports, run: str) -> float | None:
    """Of the minutes that the run may take, and a moment more, so that the gateway says so too; None: no limit."""
    history = await ports.bus.history(run)
    minutes = fold(history).settings.budget.minutes
    if minutes is None:
        return None
    return 60 * max(0.0, minutes - active_minutes(history, ports.clock.now())) + MOMENT_S


def _require_known(asked: WeightUpdateRequested) -> None:
    if asked.algorithm not in ALGORITHMS:
        raise Barren(f"{asked.algorithm} is no algorithm; there are {', '.join(ALGORITHMS)}")


async def _base_model(ports: Ports, weights: Weights) -> Path:
    """The folder of the base model's weights: the embedded model's own, or one that was put under `models`."""
    if weights.model.startswith("local/"):
        return (await asyncio.to_thread(prepare, ports.home)).path
    if lacking := lacks(ports.home, weights.model):
        raise Barren(f"{weights.model} is not ours to train: {lacking}")
    return base_folder(ports.home, weights.model)


async def _sources(work: Work, asked: WeightUpdateRequested, parent: Version) -> list[Source]:
    """The parent's own rollouts first, then older ones."""
    versions, blobs = work.run.versions, work.ports.blobs
    sources = []
    for told in _told_of_items(asked):
        made, attempt = versions[told.version], told.attempt
        rewards = msgspec.json.decode(await blobs.get(told.rewards), type=dict[str, float | None])
        earned = _finite(asked, attempt, rewards)
        calls = await _calls(work, told.trajectory)
        sources.append(Source(attempt, calls, earned, made.weights.adapter, made.harness, told.lag))
    for whole in asked.whole:
        made, earned = versions[whole.version], _finite(asked, whole.attempt, {WHOLE: whole.reward})
        calls = await _calls(work, whole.trajectory)
        sources.append(Source(whole.attempt, calls, earned, made.weights.adapter, made.harness, whole.lag, whole.group))
    return sources


def _told_of_items(asked: WeightUpdateRequested) -> list[RolloutSource]:
    """Attempts at many items: the parent's own, and older ones."""
    if asked.trajectory is None or asked.rewards is None:
        return []
    # The request has the parent's name where an older source has its attempt's.
    own = RolloutSource(attempt=asked.parent, version=asked.parent, trajectory=asked.trajectory, rewards=asked.rewards)
    return [own, *asked.older]


async def _calls(work: Work, trajectory: str) -> list[ModelCall]:
    return [decode_call(line) for line in (await work.ports.blobs.get(trajectory)).splitlines()]


def _finite(asked: WeightUpdateRequested, attempt: str, earned: Mapping[str, float | None]) -> dict[str, float]:
    """The rewards by item. Raises Barren at one that cannot be learned from."""
    found = {item: reward for item, reward in earned.items() if reward is not None and abs(reward) <= LARGEST}
    if unusable := sorted(earned.keys() - found.keys()):
        # JSON has no infinities and no NaN: they are told as null.
        item, reward = unusable[0], earned[unusable[0]]
        raise Barren(
            f"the reward of {item + ' in ' if item else ''}{attempt} is "
            f"{'not a finite number' if reward is None else reward}: only finite ones of at most {LARGEST:g} are "
            f"learned from. Nothing was trained, {asked.parent} stays as it is. Mend the task's evaluator, then start "
            "a run with it"
        )
    return found


def _why_nothing(counts: Mapping[str, int], asked: WeightUpdateRequested) -> str:
    algorithm = asked.algorithm
    if counts.get("no_logprobs"):
        able = ", ".join(name for name, other in ALGORITHMS.items() if not other.needs_logprobs)
        who = algorithm if ALGORITHMS[algorithm].needs_logprobs else "learning.hold_out"
        return (
            f"{who} needs the log-probs of what was sampled, and {counts['no_logprobs']} calls have none: the "
            f"model's server tells none. Algorithms that do without, where nothing is held out: {able}"
        )
    if asked.whole and not counts:
        return f"nothing to learn from: none of the {len(asked.whole)} attempts asked the model anything"
    if not counts.keys() - {"no_item", "no_calls"}:
        return "nothing to learn from: none of the parent's model calls names its item"
    return f"nothing to learn from: {_told(counts)}"


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in sorted(counts.items()) if count)


def learning_key(run: str, asked: WeightUpdateRequested) -> str:
    """What earlier releases lacked is told where it is set alone, so that learning that they began is gone on with."""
    learning = asked.learning
    new: dict[str, bool | set[str]] = {} if asked.whole else {"whole": True}
    if not learning.targets and learning.recompute is None:
        new["learning"] = {"targets", "recompute"}
    told = asked.model_dump_json(exclude=new)
    return f"{run}.g{asked.generation}.{sha256(told.encode()).hexdigest()[:12]}"


def _tidy(folder: Path, run: str) -> None:
    """Keep nothing of this update but its answer, and of the run's earlier ones nothing: their answers are recorded."""
    for path in folder.iterdir():
        if path.name != STORED:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for other in folder.parent.glob(f"{run}.g*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
