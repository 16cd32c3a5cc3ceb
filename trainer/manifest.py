"""What an adapter says of itself: which base it changes, from what it was learned, how, and what came of it."""

from collections.abc import Mapping, Sequence

import msgspec

from sia_events.shared.events import Learning, Probe, Weights


def manifest(
    *,
    weights: Weights,
    base: str,
    parent: Weights,
    algorithm: str,
    learning: Learning,
    trajectories: Sequence[str],
    rewards: Sequence[str | float],
    counts: Mapping[str, int],
    metrics: Mapping[str, float],
    seed: int,
    code: str,
    backend: str,
    probe: Probe | None = None,
) -> bytes:
    """The manifest of the adapter in `weights`: JSON, the same bytes for the same arguments.

    `base` is the SHA-256 of the base model's weights; `parent` are the weights that learning started from;
    `trajectories` and `rewards` are digests, in the order in which they were learned from, a reward that a whole
    attempt shares the number itself; `code` is the version of
    what learned, `backend` whose trainer it was.
    """
    told = {
        "adapter": weights.adapter,
        "base": {"model": weights.model, "sha256": base},
        "parent": parent.adapter,
        "algorithm": algorithm,
        "learning": learning.model_dump(),
        "data": {"trajectories": list(trajectories), "rewards": list(rewards)},
        "counts": dict(counts),
        "metrics": dict(metrics),
        "probe": None if probe is None else probe.model_dump(),
        "seed": seed,
        "code": code,
        "backend": backend,
    }
    return msgspec.json.format(msgspec.json.encode(told, order="sorted"), indent=1) + b"\n"
