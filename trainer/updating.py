"""The loss of a part of a batch, from the views that the policy has of it."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import isnan, nan
from types import MappingProxyType

import torch
from torch import Tensor

from sia_events.trainer.algorithms.dpo import pairs
from sia_events.trainer.engines import Engine
from sia_events.trainer.groups import Rollout, RolloutGroup
from sia_events.trainer.losses import (
    Actions,
    Figures,
    likelihood,
    per_sample,
    preference,
    shares,
    surrogate,
    value_loss,
)
from sia_events.trainer.preparing import Method, Numbers, Prepared, critic
from sia_events.trainer.views import View, view

VALUE_WEIGHT, VALUE_CLIP = 0.1, 0.2
"""Weight of the critic's loss beside the policy's, and how far updates on a batch may take a value, in deviations of
the returns: as usual for text."""


@dataclass(frozen=True)
class Totals:
    """Of a whole batch, so that the losses of its parts add up to its own; `shares` [actions] are weights in it.

    `sample` [actions] is the number of each action's sample, `lengths` how many actions each sample has.
    """

    actions: int
    calls: int
    pairs: int
    shares: Tensor
    sample: Tensor
    lengths: Sequence[int]


@dataclass(frozen=True)
class Part:
    """Some groups of a batch, some samples of one or some calls of a sample, as the policy sees them.

    `first` is the number of the first action in the batch.
    """

    groups: Sequence[RolloutGroup]
    views: Sequence[Mapping[int, View]]
    first: int

    @property
    def samples(self) -> list[tuple[RolloutGroup, Mapping[int, View], Rollout]]:
        told = zip(self.groups, self.views, strict=True)
        return [(group, views, sample) for group, views in told for sample in group.samples]


PartLoss = Callable[[Part, Prepared, Totals, Collection[int]], Tensor]
"""What somebody else says that a part adds; the last are the numbers of the batch's samples that are masked."""


def totals(method: Method, batch: Sequence[RolloutGroup]) -> Totals:
    """Samples that are masked later count here too: masking one weighs no other."""
    lengths = [length for group in batch for length in lengths_of(group)]
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    reduction = method.algorithm.reduction or method.learning.reduction
    share = shares(sample, len(lengths), torch.ones(len(sample), dtype=torch.bool), reduction)
    found = sum(len(_pairs(method, group)) for group in batch) if method.algorithm.objective == "preference" else 0
    calls = sum(len(sample.acts) for group in batch for sample in group.samples)
    return Totals(len(sample), calls, found, share.float(), sample, lengths)


def lengths_of(group: RolloutGroup) -> list[int]:
    """How many actions each of its samples has."""
    return [sum(group.actions(act) for act in sample.acts) for sample in group.samples]


@torch.no_grad()
def distances(engine: Engine, cut: Sequence[Sequence[RolloutGroup]], whole: Totals) -> dict[int, float]:
    """The mean |log ratio| an action of every sample that is in several parts, by its number in the batch.

    That takes a pass more through these samples. Those are left out of which the behaviour policy is not known.
    """
    found: dict[int, float] = defaultdict(float)
    first = 0
    for piece in chain.from_iterable(cut):
        number, actions = int(whole.sample[first]), sum(lengths_of(piece))
        first += actions
        if actions < whole.lengths[number]:  # which no group of several samples is
            part = Part([piece], view(engine, [piece]), first)
            then = _then(part)
            off = (_now(part)[0] - then[0]).abs().sum().item() if then else nan
            found[number] += off / whole.lengths[number]
    return {number: distance for number, distance in found.items() if not isnan(distance)}


def part_loss(
    method: Method, part: Part, prepared: Prepared, whole: Totals, apart: Mapping[int, float] = MappingProxyType({})
) -> tuple[Tensor, Figures, list[int]]:
    """What the part adds to its batch's loss, figures of it, and which of the batch's samples were masked.

    A sample is masked when its mean |log ratio| an action passes `max_ratio`: the policy is too far from what made it.
    `apart` tells it of samples that are in several parts.
    """
    algorithm, learning = method.algorithm, method.learning
    now, then = _now(part), _then(part)
    device, rows = now[0].device, slice(part.first, part.first + sum(map(len, now)))
    first = int(whole.sample[part.first])
    sample = whole.sample[rows] - first
    seen = [(row.detach() - past).abs().mean() for row, past in zip(now, then, strict=True)] if then else []
    masked = [at for at, distance in enumerate(seen) if apart.get(first + at, distance) > learning.max_ratio]
    actions = Actions(
        now=torch.cat(now),
        then=torch.cat(then) if then else None,
        base=_flat(prepared.base, rows, device) if prepared.base else None,
        advantage=_flat(prepared.advantages, rows, device),
        sample=sample.to(device),
        samples=len(now),
        kept=~torch.isin(sample, torch.tensor(masked, dtype=torch.long)).to(device),
        entropy=_entropies(part) if learning.entropy else None,
        share=whole.shares[rows].to(device),
    )
    if algorithm.objective == "preference":
        loss, figures = _preferred(method, part, actions, whole)
    elif algorithm.objective == "likelihood":
        loss, figures = likelihood(actions, learning, algorithm.reduction)
    else:
        loss, figures = surrogate(actions, learning, algorithm.reduction, kl_in_loss=not algorithm.kl_in_reward)
    if method.head is not None:
        values = torch.cat(
            [critic(method.head, views[act.scene].states(act)) for _, views, s in part.samples for act in s.acts]
        )
        assert prepared.values and prepared.returns, "a critic's batch is prepared with values"
        old, returns = _flat(prepared.values, rows, device), _flat(prepared.returns, rows, device)
        off = value_loss(values, old, returns, VALUE_CLIP * prepared.spread)
        figures = figures | {"value_loss": off.item()}
        loss = loss + VALUE_WEIGHT * len(values) / whole.actions * off
    return loss, figures, [first + at for at in masked]


def _preferred(method: Method, part: Part, actions: Actions, whole: Totals) -> tuple[Tensor, Figures]:
    better, worse, first = [], [], 0
    masked = set(actions.sample[~actions.kept].tolist())
    for group in part.groups:
        for high, low in _pairs(method, group):
            if not {first + high, first + low} & masked:
                better.append(first + high)
                worse.append(first + low)
        first += len(group.samples)
    if not better:
        return actions.now.sum() * 0, {}
    assert actions.base is not None, "preferences are measured from the base model"
    now, base = per_sample(actions.now, actions), per_sample(actions.base, actions)
    loss, figures = preference(now[better], now[worse], base[better], base[worse], method.learning.beta)
    return loss * len(better) / whole.pairs, figures | {"actions": float(len(better))}


def _pairs(method: Method, group: RolloutGroup) -> tuple[tuple[int, int], ...]:
    return pairs([sample.reward for sample in group.samples], method.learning.margin)


def _now(part: Part) -> list[Tensor]:
    """The policy's log-probs, a row a sample."""
    return [torch.cat([views[act.scene].logprobs(act) for act in sample.acts]) for _, views, sample in part.samples]


def _then(part: Part) -> list[Tensor]:
    """The behaviour policy's log-probs, a row a sample; empty where some are not known."""
    rows = []
    for group, views, sample in part.samples:
        told = [group.behaviour(act) for act in sample.acts]
        if None in told:
            return []
        device = views[sample.acts[0].scene].distribution.device
        rows.append(torch.tensor([value for row in told for value in row or ()], device=device))
    return rows


def _entropies(part: Part) -> Tensor:
    return torch.cat([views[act.scene].entropies(act) for _, views, sample in part.samples for act in sample.acts])


def _flat(table: Numbers, rows: slice, device: torch.device) -> Tensor:
    return torch.tensor(list(islice(chain.from_iterable(table), rows.start, rows.stop)), device=device)
