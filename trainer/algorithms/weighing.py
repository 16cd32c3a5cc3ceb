"""What an algorithm is, what it says about a group of samples, and which groups it can say anything about."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sia_events.shared.events import Learning

Reduction = Literal["sample", "token", "constant", "joint"]
"""How terms of actions add up to a loss; `trainer/losses.py` has the formulae. `Learning` offers the first three."""


LARGEST, ROUNDING = 1e100, 1e-9
"""The largest reward taken, so that no sum overflows; and what share of it two rewards must differ by to differ."""


class RewardRefused(ValueError):
    """A reward is no usable number; nothing was computed from its group."""


@dataclass(frozen=True)
class Weighed:
    """A group's advantages, one a sample, or None where there is nothing to learn; `figures` say how it went."""

    advantages: tuple[float, ...] | None
    figures: Mapping[str, float] = field(default_factory=dict)


NOTHING = Weighed(None)


@dataclass(frozen=True)
class Algorithm:
    """One way to learn from groups of samples of one prompt: what each sample weighs, and in which loss.

    `weigh` takes the rewards of a group's samples. With a `critic`, advantages are GAE's over a value head, and `weigh`
    only says whether the group is learned from. Without `needs_logprobs`, rollouts may lack the log-probs of the policy
    that made them. `kl_in_reward`: the distance from the base model comes off the reward, not on top of the loss.
    `reduction` is the algorithm's own; None leaves it to the settings.
    """

    name: str
    weigh: Callable[[Sequence[float], Learning], Weighed]
    objective: Literal["surrogate", "likelihood", "preference"] = "surrogate"
    critic: bool = False
    needs_logprobs: bool = True
    kl_in_reward: bool = False
    reduction: Reduction | None = None


def varied(rewards: Sequence[float]) -> bool:
    """Whether siblings can be told apart by their rewards: two samples or more, not all rewarded alike.

    Raises RewardRefused at the first reward that is not finite, or beyond 1e100.
    """
    for position, reward in enumerate(rewards):
        if not abs(reward) <= LARGEST:
            raise RewardRefused(
                f"Reward {position} of {len(rewards)} in its group is {reward}; "
                f"a reward is a finite number of at most {LARGEST:g}. Nothing was learned from the group."
            )
    return bool(rewards) and max(rewards) - min(rewards) > ROUNDING * max(map(abs, rewards))
