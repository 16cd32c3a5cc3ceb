"""REINFORCE with the group's mean as baseline, and the KL to the base model in the loss.

    A_i = r_i - mean(r)
    loss = -1/S Σ_i Σ_t A_i log π_θ(y_it) + kl · KL(π_θ ‖ π_0)

Williams 1992 (doi 10.1007/BF00992696) for the estimator. Data of an earlier policy is met by the clipped ratio of the
surrogate, whose gradient at ratio 1 is REINFORCE's own. A_i is (K-1)/K of the unbiased leave-one-out advantage, in
which a sample is no part of its own baseline.
"""

from collections.abc import Sequence
from statistics import fmean

from sia_events.shared.events import Learning
from sia_events.trainer.algorithms.weighing import NOTHING, Algorithm, Weighed, varied


def weigh(rewards: Sequence[float], _: Learning) -> Weighed:
    if not varied(rewards):
        return NOTHING
    mean = fmean(rewards)
    return Weighed(tuple(reward - mean for reward in rewards))


REINFORCE = Algorithm("reinforce", weigh, reduction="constant")
