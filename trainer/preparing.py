"""What has to be known of a batch before it is learned from: advantages, and log-probs and values that stay fixed."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from statistics import fmean, pstdev

import torch
from torch import Tensor

from sia_events.shared.events import Learning
from sia_events.trainer.algorithms import Algorithm
from sia_events.trainer.algorithms.cloning import balanced
from sia_events.trainer.algorithms.ppo import gae, gae_of_calls, whitened
from sia_events.trainer.batches import Least, Room, parts
from sia_events.trainer.credit import credit
from sia_events.trainer.engines import Engine
from sia_events.trainer.groups import RolloutGroup
from sia_events.trainer.views import view

Numbers = list[list[float]]
"""Of each sample of a batch, of each of its actions."""


@dataclass(frozen=True)
class Method:
    """An algorithm with its settings, and the critic's head where it has one: hidden vector [width] -> value."""

    algorithm: Algorithm
    learning: Learning
    head: torch.nn.Linear | None = None

    @property
    def least(self) -> Least:
        """What its loss is of: preferences compare samples, and a joint ratio is of all of a sample's tokens."""
        if self.algorithm.objective == "preference":
            return "group"
        return "sample" if self.algorithm.reduction == "joint" else "call"


@dataclass(frozen=True)
class Prepared:
    """A batch weighed: `base` are log-probs of the base model, `values` the critic's and `returns` its targets.

    `spread` is the standard deviation of the returns.
    """

    advantages: Numbers
    base: Numbers | None = None
    values: Numbers | None = None
    returns: Numbers | None = None
    spread: float = 1.0
    figures: Mapping[str, float] = field(default_factory=dict)


def prepare(engine: Engine, method: Method, batch: Sequence[RolloutGroup], room: Room) -> Prepared:
    """Weigh a batch; passes that there is room for are made where the base model or the critic has a say."""
    algorithm, learning = method.algorithm, method.learning
    base, off = None, None
    if learning.kl or algorithm.objective == "preference":
        base = _looked_up(engine, None, batch, room)
    if base is not None and algorithm.kl_in_reward:
        off = [
            [learning.kl * (then - other) for then, other in zip(told, row, strict=True)]
            for told, row in zip(_behaviour(batch), base, strict=True)
        ]
    if method.head is not None:
        return _by_critic(batch, _looked_up(engine, method.head, batch, room), base, off, learning)
    advantages, figures = _by_group(batch, off, algorithm, learning)
    return Prepared(advantages, base, figures=figures)


def _by_critic(
    batch: Sequence[RolloutGroup], values: Numbers, base: Numbers | None, off: Numbers | None, learning: Learning
) -> Prepared:
    """GAE over each sample's actions, or under `per-step` over its calls: the reward comes at the last of them."""
    advantages, returns = [], []
    made = [(group, sample) for group in batch for sample in group.samples]
    for at, (row, (group, sample)) in enumerate(zip(values, made, strict=True)):
        earned = [-part for part in off[at]] if off else [0.0] * len(row)
        earned[-1] += sample.reward
        if learning.credit == "per-step":
            lengths = [group.actions(act) for act in sample.acts]
            advantage, target = gae_of_calls(earned, row, lengths, learning.discount, learning.trace)
        else:
            advantage, target = gae(earned, row, learning.discount, learning.trace)
        advantages.append(advantage)
        returns.append(list(target))
    white = iter(whitened(list(chain.from_iterable(advantages))))
    spread = pstdev(chain.from_iterable(returns))
    return Prepared([[next(white) for _ in row] for row in advantages], base, values, returns, spread)


def _by_group(
    batch: Sequence[RolloutGroup], off: Numbers | None, algorithm: Algorithm, learning: Learning
) -> tuple[Numbers, dict[str, float]]:
    penalties = iter([sum(row) for row in off] if off else [0.0] * sum(len(group.samples) for group in batch))
    calls: list[list[float]] = []
    told: dict[str, list[float]] = defaultdict(list)
    for group in batch:
        rewards = [sample.reward - next(penalties) for sample in group.samples]
        credited = credit(group, rewards, algorithm, learning)
        # With a price on distance, samples that were rewarded otherwise may come to the same.
        advantages, figures = credited or ([[0.0] * len(sample.acts) for sample in group.samples], {})
        calls += map(list, advantages)
        for name, value in figures.items():
            told[name].append(value)
    made = [(group, sample) for group in batch for sample in group.samples]
    if algorithm.objective == "likelihood":
        said = [group.said(act) for group, sample in made for act in sample.acts]
        weights = iter(balanced(list(chain.from_iterable(calls)), said))
        calls = [[next(weights) for _ in row] for row in calls]
    spread = [
        [advantage for act, advantage in zip(sample.acts, row, strict=True) for _ in range(group.actions(act))]
        for (group, sample), row in zip(made, calls, strict=True)
    ]
    joined = {name: max(values) if name.startswith("max_") else fmean(values) for name, values in told.items()}
    return spread, {f"{algorithm.name}_{name}": value for name, value in joined.items()}


@torch.no_grad()
def _looked_up(engine: Engine, head: torch.nn.Linear | None, batch: Sequence[RolloutGroup], room: Room) -> Numbers:
    """The critic's value before every action, or without one the base model's log-prob of it."""
    calls: Numbers = []
    for part in parts(engine, batch, room):
        seen = view(engine, part, adapted=head is not None, hidden=head is not None)
        for group, views in zip(part, seen, strict=True):
            for act in (act for sample in group.samples for act in sample.acts):
                at = views[act.scene]
                calls.append((at.logprobs(act) if head is None else critic(head, at.states(act))).tolist())
    told = iter(calls)
    samples = [sample for group in batch for sample in group.samples]
    return [list(chain.from_iterable(islice(told, len(sample.acts)))) for sample in samples]


def critic(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """Values [actions] of hidden vectors [actions, width]. What the head learns does not reach the policy."""
    return head(hidden.detach())[:, 0]


def _behaviour(batch: Sequence[RolloutGroup]) -> Numbers:
    rows = []
    for group in batch:
        for sample in group.samples:
            told = [group.behaviour(act) for act in sample.acts]
            rows.append([value for part in told for value in part or ()])
    return rows
