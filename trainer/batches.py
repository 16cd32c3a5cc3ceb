"""The order of learning: batches of groups drawn from a seed, and the parts of a batch that fit into memory."""

import random
from collections.abc import Iterator, Sequence

from sia_events.trainer.groups import RolloutGroup

TOKENS = 4096
"""Of a part's prompts and continuations: what bounds the memory that activations take."""


def batches(groups: Sequence[RolloutGroup], size: int, epochs: int, seed: int) -> Iterator[list[RolloutGroup]]:
    """Every group once an epoch in an order drawn from the seed; in a batch, like kinds and lengths side by side."""
    draw = random.Random(seed)
    for _ in range(epochs):
        order = list(groups)
        draw.shuffle(order)
        for at in range(0, len(order), size):
            yield sorted(order[at : at + size], key=_likeness)


def parts(batch: Sequence[RolloutGroup], scenes: int) -> Iterator[list[RolloutGroup]]:
    """A batch cut into runs of whole groups with at most that many scenes and TOKENS, or of one group that has more."""
    part: list[RolloutGroup] = []
    for group in batch:
        both = [*part, group]
        crowded = sum(len(each.scenes) for each in both) > scenes or sum(map(_tokens, both)) > TOKENS
        if part and (crowded or _kind(group) != _kind(part[0])):
            yield part
            part = []
        part.append(group)
    if part:
        yield part


def _tokens(group: RolloutGroup) -> int:
    return sum(len(scene.prompt) + sum(map(len, scene.continuations)) for scene in group.scenes)


def _kind(group: RolloutGroup) -> tuple[bool, float]:
    return group.scenes[0].choice, group.scenes[0].temperature


def _likeness(group: RolloutGroup) -> tuple[bool, float, int]:
    return *_kind(group), len(group.scenes[0].prompt)
