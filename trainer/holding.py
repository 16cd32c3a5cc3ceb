"""Held out: items of which nothing is learned, whose samples tell what reward new weights can expect."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor

from sia_events.trainer.algorithms.weighing import varied
from sia_events.trainer.batches import Room, parts
from sia_events.trainer.engines import Engine
from sia_events.trainer.groups import RolloutGroup
from sia_events.trainer.views import view


@dataclass
class Looks:
    """Rewards that were expected: at the `start`, at the `last` look, which was behind `step` steps, and at the `best`.

    `below` counts the looks since the best one.
    """

    start: float
    last: float
    best: float
    step: int = 0
    best_step: int = 0
    below: int = 0

    def add(self, step: int, expected: float) -> None:
        self.last, self.step = expected, step
        if expected >= self.best:
            self.best, self.best_step, self.below = expected, step, 0
        else:
            self.below += 1

    def figures(self) -> dict[str, float]:
        told = {"start": self.start, "last": self.last, "best": self.best, "best_step": float(self.best_step)}
        return {f"held_out_{name}": value for name, value in told.items()}


def divided(groups: Sequence[RolloutGroup], share: float, seed: int) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
    """The groups to learn from, and those held out: about that share of the items, drawn by a hash of seed and item.

    An item that several attempts have samples of is on one side with all of them. Groups that are held out and whose
    rewards are all equal are on no side: they would tell nothing.
    """
    sides: tuple[list[RolloutGroup], list[RolloutGroup]] = ([], [])
    for group in groups:
        attempt, _, item = group.name.partition("/")
        drawn = int.from_bytes(sha256(f"{seed}/{item or attempt}".encode()).digest()[:8]) / 2**64
        sides[drawn < share].append(group)
    learned, held = sides
    return learned, [group for group in held if varied([sample.reward for sample in group.samples])]


@torch.no_grad()
def expected_reward(engine: Engine, groups: Sequence[RolloutGroup], room: Room) -> float:
    """The mean over groups of Σ wᵢ rᵢ / Σ wᵢ, wᵢ = π(sample i) / π_behaviour(sample i).

    The self-normalised importance estimate (Swaminathan and Joachims 2015, "The Self-Normalized Estimator for
    Counterfactual Learning", NIPS 28). It stays within the rewards that were seen, whatever the weights, and is their
    mean under the policy that made them. Of long texts few samples have any weight left: it then tells of these alone.
    """
    calls: list[Tensor] = []
    for part in parts(engine, groups, room):
        for group, views in zip(part, view(engine, part), strict=True):
            for act in (act for sample in group.samples for act in sample.acts):
                now = views[act.scene].logprobs(act).double()
                calls.append((now - torch.tensor(group.behaviour(act) or (), device=now.device)).sum())
    values, ratios = [], iter(calls)
    for group in groups:
        together = [torch.stack(list(islice(ratios, len(sample.acts)))).sum() for sample in group.samples]
        weights = torch.softmax(torch.stack(together), dim=0).tolist()
        values.append(sum(w * sample.reward for w, sample in zip(weights, group.samples, strict=True)))
    return fmean(values)
