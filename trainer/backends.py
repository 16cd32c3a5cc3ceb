"""Whose trainer makes an update: ours, or TRL's of what it has a way to learn. Pure."""

from collections.abc import Sequence
from importlib.metadata import version

from sia_events.shared.events import Learning
from sia_events.trainer.groups import RolloutGroup

TRL_HAS = ("grpo", "rloo", "dpo")


def why_not_trl(groups: Sequence[RolloutGroup], algorithm: str, learning: Learning) -> str | None:
    """What TRL has no way to learn of this; None where it can."""
    if algorithm not in TRL_HAS:
        return f"TRL has {', '.join(TRL_HAS)}, and no {algorithm}"
    if learning.entropy:
        return "TRL weighs no entropy as learning.entropy does"
    scenes = [scene for group in groups for scene in group.scenes]
    if any(scene.choice for scene in scenes):
        return "TRL learns text, and some answers were chosen among given ones"
    temperatures = {scene.temperature for scene in scenes}
    if len(temperatures) > 1 or (algorithm == "dpo" and temperatures != {1.0}):
        drawn = ", ".join(map(str, sorted(temperatures)))
        return f"TRL has one temperature, for DPO that of 1, and text was drawn at {drawn}"
    if algorithm == "dpo" and any(len(sample.acts) > 1 for group in groups for sample in group.samples):
        return "TRL's DPO compares two texts of one prompt, and some samples are of several calls"
    return None


def named(asked: str, why_not: str | None) -> str:
    """The backend as an update names it."""
    if asked == "ours":
        return asked
    return f"trl {version('trl')}" if why_not is None else f"ours: {why_not}"
