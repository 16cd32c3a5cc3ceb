"""The gate: whether a candidate's gain over the incumbent, item by item, is real. Pure."""

from collections.abc import Sequence
from math import comb, sqrt

from sia_events.shared.events import Comparison, Split
from sia_events.shared.run import Run

DIGITS = 9


def compare_on(run: Run, split: Split, before: str, after: str) -> Comparison | None:
    """What version `after` gained over `before` on a split's items, more being better whatever the metric's direction.

    None where one of the two has no score there.
    """
    scored = [run.scored(version, split) for version in (before, after)]
    if not all(scored):
        return None
    sign = 1.0 if run.task is None or run.task.maximize else -1.0
    return compare(*([sign * item for item in scores[-1].items] for scores in scored))


def compare(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """A paired comparison of per-item scores on the same items, in the same order.

    The interval of the mean gain is Student's t on the differences at 95 %. The p-value is two-sided and exact: the
    sign test on the items that differ, which for right-or-wrong scores is McNemar's exact test. A single item has no
    spread, so its interval reaches to zero.
    Raises ValueError when the two do not score the same number of items.
    """
    from scipy import special  # slow to import, and a run's first model call does not wait for it

    if len(before) != len(after) or not before:
        raise ValueError(f"paired scores need the same items: {len(before)} before, {len(after)} after")
    differences = [b - a for a, b in zip(before, after, strict=True)]
    n = len(differences)
    gain = sum(differences) / n
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    spread = sqrt(sum((d - gain) ** 2 for d in differences) / (n - 1) / n) if n > 1 else 0.0
    reach = float(special.stdtrit(n - 1, 0.975)) * spread if n > 1 else max(1.0, abs(gain))
    p_value = _sign_test(better, worse)
    return Comparison(
        gain=round(gain, DIGITS),
        low=round(gain - reach, DIGITS),
        high=round(gain + reach, DIGITS),
        p_value=float(f"{p_value:.6g}"),
        n=n,
        better=better,
        worse=worse,
    )


def proven(comparison: Comparison, alpha: float) -> bool:
    """Accept: the whole interval lies above zero, and the exact test agrees at `alpha`."""
    return comparison.low > 0 and comparison.p_value < alpha


def hopeless(comparison: Comparison) -> bool:
    """No look at the gate is spent on a candidate that is plainly worse already."""
    return comparison.high < 0


def _sign_test(better: int, worse: int) -> float:
    """Two-sided binomial probability of a split at least this uneven under a fair coin, in whole numbers to the end."""
    n = better + worse
    tail = sum(comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)
