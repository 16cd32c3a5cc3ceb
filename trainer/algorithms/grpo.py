"""GRPO: advantages in units of the group's standard deviation.

    A_i = (r_i - mean(r)) / (std(r) + η),  η = 1e-4,  std over K - 1

Shao et al. 2024, arXiv 2402.03300; the loss is the clipped surrogate with the KL to the base model, reduced as the
settings say: `sample` is the paper's own and favours short good answers, `token` is DAPO's (Yu et al. 2025, arXiv
2503.14476), `constant` Dr. GRPO's (Liu et al. 2025, arXiv 2503.20783), but for its division by a fixed length. Dr. GRPO
does not divide by std either, which weighs prompts that are nearly always right, or nearly always wrong, above the
others; its advantages are those of `reinforce`. η keeps rewards that differ by rounding alone from counting as full
successes.
"""

from collections.abc import Sequence
from statistics import fmean, stdev

from sia_events.shared.events import Learning
from sia_events.trainer.algorithms.weighing import NOTHING, Algorithm, Weighed, varied

ETA = 1e-4


def weigh(rewards: Sequence[float], _: Learning) -> Weighed:
    if not varied(rewards):
        return NOTHING
    mean, scale = fmean(rewards), stdev(rewards) + ETA
    return Weighed(tuple((reward - mean) / scale for reward in rewards))


GRPO = Algorithm("grpo", weigh)
