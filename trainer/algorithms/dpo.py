"""DPO: of two samples of one prompt, the better is made likelier than the worse, measured from the base model.

    -log σ(β [(log π_θ(y⁺) - log π_0(y⁺)) - (log π_θ(y⁻) - log π_0(y⁻))])  over pairs with r⁺ - r⁻ ≥ margin

Rafailov et al. 2023, arXiv 2305.18290; log π is summed over a sample's own tokens. Only the order of rewards counts,
for graders whose scale nobody trusts. A sample's advantage is its pairs won less those lost: at θ = base the gradient
is β/2 times the mean over pairs of what these weigh.
"""

from collections.abc import Sequence

from sia_events.shared.events import Learning
from sia_events.trainer.algorithms.weighing import NOTHING, Algorithm, Weighed, varied


def pairs(rewards: Sequence[float], margin: float) -> tuple[tuple[int, int], ...]:
    """Every (better, worse) of a group, by position, at least `margin` apart and never equal."""
    return tuple(
        (better, worse)
        for better, high in enumerate(rewards)
        for worse, low in enumerate(rewards)
        if high > low and high - low >= margin
    )


def weigh(rewards: Sequence[float], learning: Learning) -> Weighed:
    if not varied(rewards):
        return NOTHING
    found = pairs(rewards, learning.margin)
    if not found:
        return Weighed(None, {"pairs": 0})
    net = [0.0] * len(rewards)
    for better, worse in found:
        net[better] += 1
        net[worse] -= 1
    return Weighed(tuple(net), {"pairs": len(found)})


DPO = Algorithm("dpo", weigh, objective="preference", needs_logprobs=False)
