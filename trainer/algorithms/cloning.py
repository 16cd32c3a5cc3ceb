"""Best-of-N behaviour cloning: likelihood of the best samples of each prompt, and of nothing else.

    loss = -1/S Σ_i w_i Σ_t log π_θ(y_it),  w_i = K / |chosen| for the chosen of the group's K samples, else 0
    chosen: the `best_of` best, with all that tie with the last of them, if above the group's mean

Also called rejection-sampling fine-tuning and expert iteration (Anthony et al. 2017, arXiv 1705.08439; ReST-EM, Singh
et al. 2023, arXiv 2312.06585). Weights are 1 in the mean over a group, so every prompt counts the same, however many
of its samples were good: without that, cloning copies which answers the policy happened to get right most often, down
to collapse onto one of them. `balanced` does the same between answers. Samples that repeat each other word by word
are to be one sample before they come here.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import fmean

from sia_events.shared.events import Learning
from sia_events.trainer.algorithms.weighing import NOTHING, Algorithm, Weighed, varied

UPLIFT = 4.0
"""How many times over a rare answer is counted at most: one odd answer must not outweigh hundreds of common ones."""


def weigh(rewards: Sequence[float], learning: Learning) -> Weighed:
    if not varied(rewards):
        return NOTHING
    last = sorted(rewards, reverse=True)[min(learning.best_of, len(rewards)) - 1]
    mean = fmean(rewards)
    chosen = [reward >= last and reward > mean for reward in rewards]
    weight = len(rewards) / sum(chosen)
    return Weighed(tuple(weight * picked for picked in chosen), {"chosen": sum(chosen)})


def balanced(weights: Sequence[float], answers: Sequence[Hashable]) -> tuple[float, ...]:
    """Weights of a whole batch, brought nearer to one total an answer; their sum stays.

    An answer below the mean total is raised to it, up to UPLIFT times; one above is lowered to it.
    """
    totals: dict[Hashable, float] = defaultdict(float)
    for weight, answer in zip(weights, answers, strict=True):
        totals[answer] += weight
    present = [total for total in totals.values() if total > 0]
    if not present:
        return tuple(weights)
    mean = fmean(present)
    scaled = [
        weight * min(UPLIFT, mean / totals[answer]) if weight else 0.0
        for weight, answer in zip(weights, answers, strict=True)
    ]
    keep = sum(weights) / sum(scaled)
    return tuple(keep * weight for weight in scaled)


CLONING = Algorithm("cloning", weigh, objective="likelihood", needs_logprobs=False, reduction="constant")
