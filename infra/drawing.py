"""A choice drawn from log-probs and a bias: the distribution that is told is the one that was drawn from. Pure."""

import random
from collections.abc import Sequence
from itertools import accumulate
from math import exp, log


def draw(raw: Sequence[float], bias: Sequence[float] | None, temperature: float, seed: int) -> tuple[int, list[float]]:
    """(index, log-probs) of softmax((raw + bias) / temperature), in nats; the same `seed` draws the same.

    At temperature 0 the likeliest is taken, and the log-probs are those of temperature 1.
    """
    biased = raw if bias is None else [score + added for score, added in zip(raw, bias, strict=True)]
    scaled = [score / (temperature or 1.0) for score in biased]
    highest = max(scaled)
    total = highest + log(sum(exp(score - highest) for score in scaled))
    logprobs = [score - total for score in scaled]
    if temperature == 0:
        return logprobs.index(max(logprobs)), logprobs
    cumulated = list(accumulate(map(exp, logprobs)))
    drawn = random.Random(seed).random() * cumulated[-1]
    return next(at for at, reached in enumerate(cumulated) if drawn < reached), logprobs
