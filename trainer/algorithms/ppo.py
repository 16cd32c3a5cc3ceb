"""PPO with generalised advantage estimation over a value head.

    δ_t = r_t + γ V(s_{t+1}) - V(s_t),  A_t = Σ_l (γλ)^l δ_{t+l},  target of V: A_t + V(s_t)
    r_t is -kl · (log π_b(y_t) - log π_0(y_t)), with the task's reward added at the last step

Schulman et al. 2016, arXiv 1506.02438, and 2017, arXiv 1707.06347. γ is `discount`, λ is `trace`; V behind the last
step is 0. Under `credit=terminal` a step is an action: a token, or a choice. Under `per-step` it is a whole call, as
for the critic of utterances in ArCHer (Zhou et al. 2024, arXiv 2402.19446): V(s_t) is the value before its first
action, r_t the sum over its actions, and each of these has the call's advantage and target. So γ and λ tell calls
apart, and how long each of them is does not matter.

The critic is a linear head over the hidden vectors before an action, which it reads detached: what it learns reaches
the policy through advantages alone. It is fresh in every update, and values everything at 0 at first. How far updates
on a batch may take a value is told in deviations of the batch's returns: in the code published with PPO, rewards were
brought to that unit before.

Advantages are whitened over a batch. A critic could learn from a lone sample too; groups without a difference are left
out here as everywhere, so that the counts of all algorithms mean the same.
"""

from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean, pstdev

from sia_events.shared.events import Learning
from sia_events.trainer.algorithms.weighing import NOTHING, Algorithm, Weighed, varied


def weigh(rewards: Sequence[float], _: Learning) -> Weighed:
    """The rewards themselves: what advantages are to be made from, with the critic's help."""
    return Weighed(tuple(rewards)) if varied(rewards) else NOTHING


def gae(
    rewards: Sequence[float], values: Sequence[float], discount: float, trace: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Advantages and the critic's targets, a step each, of one trajectory that ended after its last step."""
    advantages: list[float] = []
    advantage = after = 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        advantage = reward + discount * after - value + discount * trace * advantage
        advantages.append(advantage)
        after = value
    advantages.reverse()
    return tuple(advantages), tuple(a + v for a, v in zip(advantages, values, strict=True))


def gae_of_calls(
    rewards: Sequence[float], values: Sequence[float], lengths: Sequence[int], discount: float, trace: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """As `gae`, an action each, where a step is a call of so many actions as `lengths` says."""
    ends = list(accumulate(lengths))
    spans = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    earned, before = [sum(rewards[span]) for span in spans], [values[span.start] for span in spans]
    advantages, targets = gae(earned, before, discount, trace)
    calls = [call for call, length in enumerate(lengths) for _ in range(length)]
    return tuple(advantages[call] for call in calls), tuple(targets[call] for call in calls)


def whitened(advantages: Sequence[float]) -> tuple[float, ...]:
    """A batch's advantages with mean 0 and standard deviation 1 (0 where all are equal)."""
    mean, scale = fmean(advantages), pstdev(advantages) + 1e-8
    return tuple((advantage - mean) / scale for advantage in advantages)


PPO = Algorithm("ppo", weigh, critic=True, kl_in_reward=True, reduction="token")
