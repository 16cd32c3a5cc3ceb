"""The order of learning: batches of groups drawn from a seed, and the parts of a batch that fit into memory."""

import random
from collections.abc import Iterator, Sequence

from sia_events.trainer.groups import RolloutGroup

PROMPTS, TOKENS = 24, 2048
"""Of a part of a batch, at most: what bounds the memory that activations take."""


def batches(groups: Sequence[RolloutGroup], size: int, epochs: int, seed: int) -> Iterator[list[RolloutGroup]]:
    """Every group once an epoch in an order drawn from the seed; in a batch, like kinds and lengths side by side."""
    draw = random.Random(seed)
    for _ in range(epochs):
        order = list(groups)
        draw.shuffle(order)
        for at in range(0, len(order), size):
            yield sorted(order[at : at + size], key=_likeness)


def parts(batch: Sequence[RolloutGroup], scenes: int) -> Iterator[list[RolloutGroup]]:
    """A batch cut into runs of whole groups with at most that many scenes, or of one group that has more."""
    part: list[RolloutGroup] = []
    for group in batch:
        if part and (sum(len(g.scenes) for g in part) + len(group.scenes) > scenes or _kind(group) != _kind(part[0])):
            yield part
            part = []
        part.append(group)
    if part:
        yield part


def scenes_at_once(groups: Sequence[RolloutGroup]) -> int:
    """How many of the longest scene a part may have."""
    longest = max(len(scene.prompt) + sum(map(len, scene.continuations)) for group in groups for scene in group.scenes)
    return max(1, min(PROMPTS, TOKENS // longest))


def _kind(group: RolloutGroup) -> tuple[bool, float]:
    return group.scenes[0].choice, group.scenes[0].temperature


def _likeness(group: RolloutGroup) -> tuple[bool, float, int]:
    return *_kind(group), len(group.scenes[0].prompt)
