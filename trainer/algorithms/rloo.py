"""RLOO: every sample is measured against the mean of its siblings, itself left out.

    A_i = r_i - (Σ_{j≠i} r_j) / (K-1) = K/(K-1) · (r_i - mean(r))
    r_i is the reward less kl · Σ_t (log π_b(y_it) - log π_0(y_it))

Kool et al. 2019 ("Buy 4 REINFORCE samples, get a baseline for free!"), for language models Ahmadian et al. 2024,
arXiv 2402.14740. A whole completion is one action there: its tokens share one ratio, clipped as one. With a baseline
that does not depend on the sample, the estimate is unbiased. Groups are of samples with their KL already taken off.
"""

from collections.abc import Sequence
from statistics import fmean

from sia_events.shared.events import Learning
from sia_events.trainer.algorithms.weighing import NOTHING, Algorithm, Weighed, varied


def weigh(rewards: Sequence[float], _: Learning) -> Weighed:
    if not varied(rewards):
        return NOTHING
    count, mean = len(rewards), fmean(rewards)
    return Weighed(tuple(count / (count - 1) * (reward - mean) for reward in rewards))


RLOO = Algorithm("rloo", weigh, kl_in_reward=True, reduction="joint")
