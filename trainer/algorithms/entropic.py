"""Entropic advantages: the best of a group pull hardest, as far as a fixed distance from the uniform allows.

    q(n) = exp(β r_n) / Σ_m exp(β r_m),  β ≥ 0 so that KL(q ‖ uniform) = Σ_n q(n) ln(K q(n)) = ln 2
    centred:        A_n = K q(n) - 1
    leave-one-out:  A_n = exp(β r_n) / (1/(K-1) Σ_{m≠n} exp(β r_m)) - 1

TTT-Discover, arXiv 2601.16175, appendix A.1: the gradient of log E[exp(β r)], whose own form is the leave-one-out
one. Its mean over a group is above zero (Jensen); the centred form has mean 0 and stays within [-1, K-1], and is the
default. Weights are cut at K: leave-one-out passes that in small groups (10.8 at one success of eight). Shifting or
scaling the rewards changes nothing.

With m samples tied at the best no β gets farther than ln(K/m). Unless that is above ln 2 (it never is at K = 2) β would
run to infinity and leave-one-out with it, so such groups are centred: A_n = (r_n - mean(r)) / (max(r) - min(r)),
which is r_n - mean(r) for rewards of 0 and 1. Rewards closer than about a millionth of the group's range count as tied.

One step a batch and no clipping in the source; here the ratio is clipped as elsewhere, and the KL to the base model
is a term of the loss, not of the advantage.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from sia_events.shared.events import Learning
from sia_events.trainer.algorithms.weighing import NOTHING, Algorithm, Weighed, varied

TARGET = math.log(2)
SHARPEST, HALVINGS = 1e6, 60
"""Largest β tried, for rewards in units of their range; and steps of the bisection."""


def weigh(rewards: Sequence[float], learning: Learning) -> Weighed:
    """Figures: β (in 1/reward), effective sample size 1/Σq², KL, the largest |A|, whether it fell back, weights cut."""
    if not varied(rewards):
        return NOTHING
    count, best = len(rewards), max(rewards)
    spread = best - min(rewards)
    below = [(reward - best) / spread for reward in rewards]
    sharpness = _sharpness(below)
    if sharpness is None:
        mean = fmean(below)
        return _weighed([value - mean for value in below], [1 / count] * count, 0.0, fell_back=1, cut=0)
    share = tilted(below, sharpness)
    weights = [q * (count - 1) / (1 - q) for q in share] if learning.leave_one_out else [count * q for q in share]
    advantages = [min(weight, count) - 1 for weight in weights]
    cut = sum(weight > count for weight in weights)
    return _weighed(advantages, share, sharpness / spread, fell_back=0, cut=cut)


def tilted(rewards: Sequence[float], sharpness: float) -> list[float]:
    """q, for rewards whose maximum is 0."""
    powers = [math.exp(sharpness * reward) for reward in rewards]
    total = math.fsum(powers)
    return [power / total for power in powers]


def distance(share: Sequence[float]) -> float:
    """KL(share ‖ uniform), nats."""
    return math.fsum(q * math.log(len(share) * q) for q in share if q > 0)


def _sharpness(below: Sequence[float]) -> float | None:
    """β at the target distance, by bisection: the distance grows with β. None where the target cannot be reached."""
    if distance(tilted(below, SHARPEST)) <= TARGET + 1e-9:
        return None
    low, high = 0.0, 1.0
    while distance(tilted(below, high)) < TARGET:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if distance(tilted(below, middle)) < TARGET:
            low = middle
        else:
            high = middle
    return high


def _weighed(advantages: Sequence[float], share: Sequence[float], beta: float, fell_back: int, cut: int) -> Weighed:
    figures = {
        "beta": beta,
        "ess": 1 / math.fsum(q * q for q in share),
        "kl": distance(share),
        "max_advantage": max(map(abs, advantages)),
        "fell_back": fell_back,
        "cut": cut,
    }
    return Weighed(tuple(advantages), figures)


ENTROPIC = Algorithm("entropic", weigh, reduction="constant")
