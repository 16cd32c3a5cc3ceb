"""The learning child: a LoRA adapter trained on logged rollouts, one JSON line a step on stdout.

Run as `python -m sia_events.trainer.learn SPEC.json`. The objective is the policy gradient of REINFORCE (Williams
1992) on data of an earlier policy, its importance ratio clipped as in PPO (Schulman et al. 2017, arXiv 1707.06347).
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sia_events.local_model import adapter as lora
from sia_events.local_model import network, parent, weights
from sia_events.local_model.policy import choice_distribution, common_length
from sia_events.trainer import groups as logged
from sia_events.trainer.advantages import ALGORITHMS
from sia_events.trainer.groups import Group

COLLAPSE_WINDOW, COLLAPSE_SHARE, DESERVED_SHARE = 4, 0.9, 0.75
"""Collapsed: over so many steps one answer is preferred for this share of prompts, and best rewarded far less often."""


@dataclass(frozen=True)
class Spec:
    """What to learn from, where to, and how.

    `model` is a model folder, `adapter_in` the adapter that made the rollouts (None: the base weights), `rollouts`
    a file as `groups.read` takes it. `clip` is wide: all data is of one earlier policy, and the usual 0.2 stops
    learning after a few steps. `kl_stop` (nats) ends learning when the policy's mean KL from the one that made
    the rollouts passes it. `max_seconds` (wall) ends it too, at the price that a repeat may end elsewhere;
    everything else repeats bit for bit on one machine with one number of `threads`.
    """

    model: str
    rollouts: str
    adapter_out: str
    adapter_in: str | None = None
    algorithm: str = "reinforce"
    seed: int = 0
    epochs: int = 1
    batch_prompts: int = 24
    micro_prompts: int = 8
    lr: float = 5e-4
    rank: int = 16
    alpha: float = 32
    warmup: int = 5
    clip: float = 1.0
    grad_norm: float = 1.0
    kl_stop: float | None = None
    max_seconds: float | None = None
    threads: int = 1


@dataclass
class Tally:
    """Sums over the samples and prompts of one step."""

    loss: float = 0.0
    samples: int = 0
    actions: int = 0
    clipped: int = 0
    reward: float = 0.0
    prompts: int = 0
    kl: float = 0.0
    entropy: float = 0.0
    tokens: int = 0
    preferred: list[tuple[int, ...]] = field(default_factory=list)
    behaved: list[tuple[int, ...]] = field(default_factory=list)
    rewarded: list[tuple[int, ...]] = field(default_factory=list)


def learn(spec: Spec) -> Iterator[dict[str, Any]]:
    """Train and write the adapter; yields a line a step and at last {"done": true, "stopped": why, ...}.

    `stopped` is "end", "kl", "collapse", "time", or "no signal" when rewards were equal within every group: then no
    adapter is written. Bad input raises RolloutsRefused, RewardRefused, AdapterRefused or ModelNotReady at once.
    """
    started = time.monotonic()
    torch.set_num_threads(spec.threads)
    torch.use_deterministic_algorithms(True)
    folder = weights.opened(Path(spec.model))
    groups, skipped = logged.read(Path(spec.rollouts), ALGORITHMS[spec.algorithm])
    counts = {"kept_groups": len(groups), "skipped_zero_variance": skipped}
    if not groups:
        yield {"done": True, "stopped": "no signal", "adapter": None, "steps": 0, **counts}
        return
    net = network.load(folder.path)
    if spec.adapter_in is None:
        trained = lora.fresh(net.modules, spec.rank, spec.alpha, spec.seed)
    else:
        trained = lora.read(Path(spec.adapter_in), net.modules, folder.model, folder.digest)
    parameters = [factor.requires_grad_() for pair in trained.factors.values() for factor in pair]
    optimiser = torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=0.0)

    batches = list(_batches(groups, spec))
    recent: deque[Tally] = deque(maxlen=COLLAPSE_WINDOW)
    stopped, line, tokens = "end", {}, 0
    for step, batch in enumerate(batches, start=1):
        tally = Tally()
        optimiser.zero_grad()
        total = sum(len(group.samples) for group in batch)
        for part in _parts(batch, spec.micro_prompts):
            (_loss(net, trained, part, spec.clip, tally) / total).backward()
        tokens += tally.tokens
        recent.append(tally)
        line = {"step": step, "steps": len(batches), **_means(tally), **counts, "tokens": tokens}
        yield line
        stopped = _stop(spec, step, tally, recent, time.monotonic() - started)
        if stopped in ("kl", "collapse"):
            break
        torch.nn.utils.clip_grad_norm_(parameters, spec.grad_norm)
        for setting in optimiser.param_groups:
            setting["lr"] = spec.lr * _schedule(step, spec.warmup, len(batches))
        optimiser.step()
        if stopped == "time":
            break
    lora.write(trained, Path(spec.adapter_out), folder.model, folder.digest)
    seconds = {"seconds": round(time.monotonic() - started, 3), "cpu_seconds": round(time.process_time(), 3)}
    yield {**line, "done": True, "stopped": stopped, "adapter": spec.adapter_out, **seconds}


def _loss(net: network.Network, trained: lora.Adapter, groups: Sequence[Group], clip: float, tally: Tally) -> Tensor:
    """Clipped surrogate, summed over the samples of `groups` (of one kind and temperature); adds to `tally`.

    Per action (a choice, or a token of a completion): -min(ρA, clip(ρ, 1-ε, 1+ε)A), ρ = exp(log π - log π_behaviour).
    """
    prompts = [group.prompt for group in groups]
    common = min(common_length(prompts), min(map(len, prompts)) - 1)
    prefix = net.empty()
    if common:
        _, prefix = net.extend(prefix, [prompts[0][:common]], trained)
    rests = [prompt[common:] for prompt in prompts]
    tally.tokens += common + sum(map(len, rests)) + sum(len(c) - 1 for group in groups for c in group.continuations)
    # A choice applies its temperature after summing over tokens.
    temperature = 1.0 if groups[0].choice else groups[0].temperature
    scored = network.continuation_logprobs(net, trained, prefix, rests, [g.continuations for g in groups], temperature)
    losses = []
    for group, score in zip(groups, scored, strict=True):
        totals = torch.stack([tokens.sum() for tokens in score])
        bias = None if group.bias is None else torch.tensor(group.bias)
        distribution = choice_distribution(totals, bias, group.temperature) if group.choice else totals
        for sample in group.samples:
            behaviour = torch.tensor(sample.logprobs)
            now = distribution[sample.answer : sample.answer + 1] if group.choice else score[sample.answer]
            then = behaviour[sample.answer : sample.answer + 1] if group.choice else behaviour
            ratio = (now - then).exp()
            surrogate = torch.minimum(ratio * sample.advantage, ratio.clamp(1 - clip, 1 + clip) * sample.advantage)
            losses.append(-surrogate.sum())
            moved = (ratio > 1 + clip) if sample.advantage > 0 else (ratio < 1 - clip)
            tally.clipped += int(moved.sum())
            tally.actions += len(ratio)
            tally.reward += sample.reward
            tally.samples += 1
        _observe(group, distribution.detach(), score, tally)
    loss = torch.stack(losses).sum()
    tally.loss += loss.item()
    return loss


def _observe(group: Group, distribution: Tensor, score: Sequence[Tensor], tally: Tally) -> None:
    """Distance from the behaviour policy, entropy and preferred answer of one prompt."""
    best = max(group.samples, key=lambda sample: sample.reward).answer
    tally.prompts += 1
    tally.preferred.append(group.continuations[int(distribution.argmax())])
    tally.rewarded.append(group.continuations[best])
    if group.choice:
        behaviour = torch.tensor(group.samples[0].logprobs)
        tally.behaved.append(group.continuations[int(behaviour.argmax())])
        tally.kl += float((distribution.exp() * (distribution - behaviour)).sum())
        tally.entropy -= float((distribution.exp() * distribution).sum())
        return
    # Of a completion only what was sampled is known: KL(π‖behaviour) by E_behaviour[ρ log ρ - ρ + 1] a token, as in k3
    # (Schulman 2020, "Approximating KL divergence"), and the entropy of a token by -log π.
    tally.behaved.append(group.continuations[Counter(sample.answer for sample in group.samples).most_common(1)[0][0]])
    kl, entropy, count = 0.0, 0.0, 0
    for sample in group.samples:
        now = score[sample.answer].detach()
        log_ratio = now - torch.tensor(sample.logprobs)
        kl += float((log_ratio.exp() * log_ratio - log_ratio.exp() + 1).sum())
        entropy -= float(now.sum())
        count += len(now)
    tally.kl += kl / len(group.samples)
    tally.entropy += entropy / count


def _stop(spec: Spec, step: int, tally: Tally, recent: Sequence[Tally], seconds: float) -> str:
    if spec.kl_stop is not None and tally.kl / tally.prompts > spec.kl_stop:
        return "kl"
    if step > spec.warmup and len(recent) == COLLAPSE_WINDOW:
        preferred = _top_share([answer for t in recent for answer in t.preferred])
        behaved = _top_share([answer for t in recent for answer in t.behaved])
        rewarded = _top_share([answer for t in recent for answer in t.rewarded])
        if preferred >= COLLAPSE_SHARE and preferred > behaved and rewarded < DESERVED_SHARE:
            return "collapse"
    if spec.max_seconds is not None and seconds > spec.max_seconds:
        return "time"
    return "end"


def _means(tally: Tally) -> dict[str, float]:
    return {
        "loss": tally.loss / tally.samples,
        "kl": tally.kl / tally.prompts,
        "entropy": tally.entropy / tally.prompts,
        "clip_fraction": tally.clipped / tally.actions,
        "reward": tally.reward / tally.samples,
        "preferred_share": _top_share(tally.preferred),
    }


def _top_share(answers: Sequence[tuple[int, ...]]) -> float:
    return Counter(answers).most_common(1)[0][1] / len(answers)


def _batches(groups: Sequence[Group], spec: Spec) -> Iterator[list[Group]]:
    """Every group once an epoch in an order drawn from the seed; within a step, like kinds and lengths side by side."""
    draw = random.Random(spec.seed)
    for _ in range(spec.epochs):
        order = list(groups)
        draw.shuffle(order)
        for at in range(0, len(order), spec.batch_prompts):
            yield sorted(order[at : at + spec.batch_prompts], key=_likeness)


def _parts(batch: Sequence[Group], size: int) -> Iterator[list[Group]]:
    """A sorted batch cut into passes of one kind and temperature, of at most `size` prompts: what bounds memory."""
    for _, alike in itertools.groupby(batch, key=lambda group: (group.choice, group.temperature)):
        part = list(alike)
        yield from (part[at : at + size] for at in range(0, len(part), size))


def _likeness(group: Group) -> tuple[bool, float, int]:
    return group.choice, group.temperature, len(group.prompt)


def _schedule(step: int, warmup: int, steps: int) -> float:
    """Share of the full learning rate: up over `warmup` steps, then down in a line to a tenth at the end."""
    if step <= warmup:
        return step / warmup
    return 1 - 0.9 * (step - warmup) / max(1, steps - warmup)


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m sia_events.trainer.learn", description=__doc__)
    options.add_argument("spec", type=Path, help="JSON file, keys as in Spec")
    options.add_argument("--die-with-parent", action="store_true", help="end when stdin closes")
    given = options.parse_args()
    if given.die_with_parent:
        parent.end_with_parent()
    try:
        for line in learn(Spec(**json.loads(given.spec.read_text()))):
            print(json.dumps(line), flush=True)
    except (logged.RolloutsRefused, lora.AdapterRefused, weights.ModelNotReady, ValueError, TypeError) as error:
        sys.exit(f"learn: {error}")


if __name__ == "__main__":
    main()
