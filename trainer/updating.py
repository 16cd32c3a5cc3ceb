"""The loss of a part of a batch, from the views that the policy has of it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sia_events.trainer.algorithms.dpo import pairs
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
from sia_events.trainer.views import View

VALUE_WEIGHT, VALUE_CLIP = 0.1, 0.2
"""Weight of the critic's loss beside the policy's, and how far updates on a batch may take a value, in deviations of
the returns: as usual for text."""


@dataclass(frozen=True)
class Totals:
    """Of a whole batch, so that the losses of its parts add up to its own; `shares` [actions] are weights in it."""

    actions: int
    calls: int
    pairs: int
    shares: Tensor


@dataclass(frozen=True)
class Part:
    """Some groups of a batch, or some samples of one, as the policy sees them. `first` is the first sample's number in
    the batch.
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
    lengths = [sum(group.actions(act) for act in sample.acts) for group in batch for sample in group.samples]
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    reduction = method.algorithm.reduction or method.learning.reduction
    share = shares(sample, len(lengths), torch.ones(len(sample), dtype=torch.bool), reduction)
    found = sum(len(_pairs(method, group)) for group in batch) if method.algorithm.objective == "preference" else 0
    calls = sum(len(sample.acts) for group in batch for sample in group.samples)
    return Totals(len(sample), calls, found, share.float())


def part_loss(method: Method, part: Part, prepared: Prepared, whole: Totals) -> tuple[Tensor, Figures, list[int]]:
    """What the part adds to its batch's loss, figures of it, and which of the batch's samples were masked.

    A sample is masked when its mean |log ratio| an action passes `max_ratio`: the policy is too far from what made it.
    """
    algorithm, learning = method.algorithm, method.learning
    now = [torch.cat([views[act.scene].logprobs(act) for act in sample.acts]) for _, views, sample in part.samples]
    then = _then(part)
    apart = [(row.detach() - past).abs().mean() for row, past in zip(now, then, strict=True)] if then else []
    masked = [at for at, distance in enumerate(apart) if distance > learning.max_ratio]
    device, rows = now[0].device, slice(part.first, part.first + len(now))
    before = sum(map(len, prepared.advantages[: part.first]))
    sample = torch.arange(len(now)).repeat_interleave(torch.tensor([len(row) for row in now]))
    actions = Actions(
        now=torch.cat(now),
        then=torch.cat(then) if then else None,
        base=_flat(prepared.base, rows, device),
        advantage=torch.tensor([value for row in prepared.advantages[rows] for value in row], device=device),
        sample=sample.to(device),
        samples=len(now),
        kept=~torch.isin(sample, torch.tensor(masked, dtype=torch.long)).to(device),
        entropy=_entropies(part) if learning.entropy else None,
        share=whole.shares[before : before + len(sample)].to(device),
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
        old, returns = _flat(prepared.values, rows, device), _flat(prepared.returns, rows, device)
        assert old is not None and returns is not None, "a critic's batch is prepared with values"
        off = value_loss(values, old, returns, VALUE_CLIP * prepared.spread)
        figures = figures | {"value_loss": off.item()}
        loss = loss + VALUE_WEIGHT * len(values) / whole.actions * off
    return loss, figures, [part.first + at for at in masked]


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


def _flat(table: Numbers | None, rows: slice, device: torch.device) -> Tensor | None:
    if table is None:
        return None
    return torch.tensor([value for row in table[rows] for value in row], device=device)
