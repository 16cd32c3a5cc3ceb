"""How good each rollout was beside its siblings: rewards of one group in, advantages out."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite


class RewardRefused(ValueError):
    """A reward is not a finite number; nothing was computed from its group."""


def group_baseline(rewards: Sequence[float]) -> list[float] | None:
    """REINFORCE with the group's mean as baseline: A_i = r_i - mean(r); None when all are equal and teach nothing.

    Williams 1992 for the estimator, the mean of the siblings as in GRPO (Shao et al. 2024, arXiv 2402.03300) without
    its division by the standard deviation.
    """
    for position, reward in enumerate(rewards):
        if not isfinite(reward):
            raise RewardRefused(f"Reward {position} of {len(rewards)} in its group is {reward}, not a finite number.")
    if len(set(rewards)) < 2:
        return None
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


ALGORITHMS: Mapping[str, Callable[[Sequence[float]], list[float] | None]] = {"reinforce": group_baseline}
"""By the name that events and settings use."""
