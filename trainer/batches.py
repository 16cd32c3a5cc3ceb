"""The order of learning: batches of groups drawn from a seed, and the parts of a batch that fit into memory."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sia_events.trainer.engines import Engine
from sia_events.trainer.groups import RolloutGroup, Scene

PROMPTS = 24
"""Of a part of a batch, at most."""

Least = Literal["call", "sample", "group"]
"""What of a batch is in one part, however large it is."""


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
    engine: Engine, batch: Sequence[RolloutGroup], room: Room, least: Least = "call"
) -> Iterator[list[RolloutGroup]]:
    """A batch cut into runs of groups that there is room for; every call is in one part, and all are in their order.

    A group that is too large is cut between its samples, and a sample that is between its calls: so a part is larger
    than the room only where what is `least` is. What is cut off a group is a group of the same scenes with some of the
    samples, or with some calls of one.
    """
    part: list[RolloutGroup] = []
    for group in batch:
        for piece in _pieces(engine, group, room, least):
            if part and (not _fits(engine, [*part, piece], room) or _kind(piece) != _kind(part[0])):
                yield part
                part = []
            part.append(piece)
    if part:
        yield part


def room_for(engine: Engine, groups: Sequence[RolloutGroup], scenes: int | None = None) -> Room:
    """Room for so many of the longest scene; None: for as many as the engine takes at once."""
    longest = max(engine.cost([scene]) for group in groups for scene in group.scenes)
    scenes = scenes or max(1, min(PROMPTS, engine.at_once // longest))
    return Room(scenes, scenes * min(longest, engine.at_once))


def largest(groups: Sequence[RolloutGroup], least: Least) -> int:
    """How many tokens the largest has of what is in one part however large it is."""
    if least == "call":
        scenes = [scene for group in groups for scene in group.scenes]
        return max(
            (sum if scene.choice else max)(map(len, scene.continuations)) + len(scene.prompt) for scene in scenes
        )
    pieces = groups
    if least == "sample":
        pieces = [replace(group, samples=(sample,)) for group in groups for sample in group.samples]
    return max(sum(scene.tokens for scene in _scenes(piece)) for piece in pieces)


def _pieces(engine: Engine, group: RolloutGroup, room: Room, least: Least) -> Iterator[RolloutGroup]:
    if least == "group" or _fits(engine, [group], room):
        yield group
        return
    for piece in _runs(engine, room, len(group.samples), lambda a, b: replace(group, samples=group.samples[a:b])):
        if least == "sample" or len(piece.samples) > 1:
            yield piece
        else:
            yield from _calls(engine, piece, room)


def _calls(engine: Engine, group: RolloutGroup, room: Room) -> Iterator[RolloutGroup]:
    """Of a group of one sample."""
    (sample,) = group.samples

    def some(begin: int, end: int) -> RolloutGroup:
        return replace(group, samples=(replace(sample, acts=sample.acts[begin:end]),))

    return _runs(engine, room, len(sample.acts), some)


def _runs(engine: Engine, room: Room, count: int, some: Callable[[int, int], RolloutGroup]) -> Iterator[RolloutGroup]:
    """What `some` makes of the runs, from one of `count` places to another, that there is room for."""
    begin, size = 0, Room(0, 0)
    for end in range(1, count + 1):
        grown = _size(engine, [some(begin, end)])
        # What was said already costs nothing.
        if end > begin + 1 and grown != size and not _holds(room, grown):
            yield some(begin, end - 1)
            begin, grown = end - 1, _size(engine, [some(end - 1, end)])
        size = grown
    yield some(begin, count)


def _size(engine: Engine, groups: Sequence[RolloutGroup]) -> Room:
    scenes = [scene for group in groups for scene in _scenes(group)]
    return Room(len(scenes), engine.cost(scenes))


def _scenes(group: RolloutGroup) -> list[Scene]:
    """What its samples came to."""
    return [group.scenes[number].only(answers) for number, answers in group.met().items()]


def _fits(engine: Engine, groups: Sequence[RolloutGroup], room: Room) -> bool:
    return _holds(room, _size(engine, groups))


def _holds(room: Room, size: Room) -> bool:
    return size.scenes <= room.scenes and size.tokens <= room.tokens


def _kind(group: RolloutGroup) -> tuple[bool, float]:
    return group.scenes[0].choice, group.scenes[0].temperature


def _likeness(group: RolloutGroup) -> tuple[bool, float, int]:
    return *_kind(group), len(group.scenes[0].prompt)
