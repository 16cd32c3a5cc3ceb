"""The order of learning: batches of groups drawn from a seed, and the parts of a batch that fit into memory."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sia_events.trainer.engines import Engine
from sia_events.trainer.groups import RolloutGroup

PROMPTS = 24
"""Of a part of a batch, at most."""


@dataclass(frozen=True)
class Room:
    """What a part of a batch has at most: scenes, and tokens that the engine computes for them."""

    scenes: int
    tokens: int

    def halved(self) -> "Room":
        return Room(max(1, self.scenes // 2), self.tokens // 2)


def batches(groups: Sequence[RolloutGroup], size: int, epochs: int, seed: int) -> Iterator[list[RolloutGroup]]:
    """Every group once an epoch in an order drawn from the seed; in a batch, like kinds and lengths side by side."""
    draw = random.Random(seed)
    for _ in range(epochs):
        order = list(groups)
        draw.shuffle(order)
        for at in range(0, len(order), size):
            yield sorted(order[at : at + size], key=_likeness)


def parts(
    engine: Engine, batch: Sequence[RolloutGroup], room: Room, whole: bool = False
) -> Iterator[list[RolloutGroup]]:
    """A batch cut into runs of groups that there is room for; a group that is too large is cut between its samples.

    So a part is larger than the room only where one sample is, or with `whole` one group. What is cut off a group is a
    group of the same scenes with some of the samples.
    """
    part: list[RolloutGroup] = []
    used = Room(0, 0)
    for group in batch:
        for piece in [group] if whole else _pieces(engine, group, room):
            size = _size(engine, piece)
            both = Room(used.scenes + size.scenes, used.tokens + size.tokens)
            if part and (not _fits(both, room) or _kind(piece) != _kind(part[0])):
                yield part
                part, both = [], size
            part.append(piece)
            used = both
    if part:
        yield part


def room_for(engine: Engine, groups: Sequence[RolloutGroup], scenes: int | None = None) -> Room:
    """Room for so many of the longest scene; None: for as many as the engine takes at once."""
    longest = max(engine.cost(scene) for group in groups for scene in group.scenes)
    scenes = scenes or max(1, min(PROMPTS, engine.at_once // longest))
    return Room(scenes, scenes * min(longest, engine.at_once))


def _pieces(engine: Engine, group: RolloutGroup, room: Room) -> Iterator[RolloutGroup]:
    if _fits(_size(engine, group), room):
        yield group
        return
    begin, size = 0, Room(0, 0)
    for end in range(len(group.samples)):
        grown = _size(engine, _some(group, begin, end + 1))
        # What was said already costs nothing.
        if end > begin and grown != size and not _fits(grown, room):
            yield _some(group, begin, end)
            begin, grown = end, _size(engine, _some(group, end, end + 1))
        size = grown
    yield _some(group, begin, len(group.samples))


def _some(group: RolloutGroup, begin: int, end: int) -> RolloutGroup:
    return replace(group, samples=group.samples[begin:end])


def _size(engine: Engine, group: RolloutGroup) -> Room:
    costs = [engine.cost(group.scenes[number].only(answers)) for number, answers in group.met().items()]
    return Room(len(costs), sum(costs))


def _fits(size: Room, room: Room) -> bool:
    return size.scenes <= room.scenes and size.tokens <= room.tokens


def _kind(group: RolloutGroup) -> tuple[bool, float]:
    return group.scenes[0].choice, group.scenes[0].temperature


def _likeness(group: RolloutGroup) -> tuple[bool, float, int]:
    return *_kind(group), len(group.scenes[0].prompt)
