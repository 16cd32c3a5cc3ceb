"""The mean of per-item scores with its 95 % interval."""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist

from sia_events.shared.events import Estimate

DIGITS = 9


def estimate(items: Sequence[float]) -> Estimate:
    """Mean over all items. Right-or-wrong scores get Wilson's interval (Wilson 1927), others Student's t.

    Rounded to nine digits, so that the last bits of a library's arithmetic never tell two replays apart.
    """
    if any(score not in (0.0, 1.0) for score in items):
        return by_spread(items)
    mean = sum(items) / len(items)
    return _rounded(mean, *_wilson(mean, len(items)), len(items))


def by_spread(items: Sequence[float]) -> Estimate:
    """Mean over all items with Student's t interval, for scores that are no counts, whatever they happen to be."""
    from scipy import special  # slow to import, and most tasks never come here

    n = len(items)
    mean = sum(items) / n
    spread = sqrt(sum((x - mean) ** 2 for x in items) / (n - 1) / n) if n > 1 else 0.0
    reach = float(special.stdtrit(n - 1, 0.975)) * spread if n > 1 else 0.0
    return _rounded(mean, mean - reach, mean + reach, n)


def _rounded(mean: float, low: float, high: float, n: int) -> Estimate:
    return Estimate(value=round(mean, DIGITS), low=round(low, DIGITS), high=round(high, DIGITS), n=n)


def _wilson(p: float, n: int) -> tuple[float, float]:
    z = NormalDist().inv_cdf(0.975)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - reach), min(1.0, centre + reach)
