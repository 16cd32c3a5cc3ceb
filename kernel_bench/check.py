"""Right or wrong: one output against the oracle's."""

from dataclasses import dataclass

import numpy as np

from sia_events.kernel_bench.problems import Array


@dataclass(frozen=True)
class Comparison:
    """`fault` is empty when the output is right; `error` is the largest absolute difference of finite elements."""

    fault: str
    error: float


def compare(output: Array, expected: Array, *, atol: float, rtol: float) -> Comparison:
    """Judge `output` (fp32) against `expected` (fp64, same shape).

    Right means |output - expected| <= atol + rtol * |expected| for every element, infinities of the same sign and
    NaN in the same places.
    """
    if not np.array_equal(np.isnan(output), np.isnan(expected)):
        return Comparison(f"NaN in the wrong places: {np.isnan(output).sum()} of {output.size}", np.inf)
    infinite = np.isinf(output) | np.isinf(expected)
    if not np.array_equal(output[infinite], expected[infinite]):
        return Comparison(f"infinite in the wrong places: {np.isinf(output).sum()} of {output.size}", np.inf)
    finite = np.isfinite(expected)
    wanted = expected[finite]
    difference = np.abs(output[finite] - wanted)
    worst = float(difference.max(initial=0.0))
    wrong = int((difference > atol + rtol * np.abs(wanted)).sum())
    if wrong:
        return Comparison(f"{wrong} of {output.size} elements wrong, the worst by {worst:.3g}", worst)
    return Comparison("", worst)
