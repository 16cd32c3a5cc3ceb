"""The items of a task: read and checked, and dealt into splits that share nothing."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError


class TaskError(Exception):
    """A task cannot be used; the message names the place and the mend."""


@dataclass(frozen=True)
class Item:
    """One question of a task with its answer. `id` tells nothing about `label` and has no "#" in it."""

    id: str
    text: str
    label: str


_ITEM = TypeAdapter(Item)


def read_items(file: Path, labels: Sequence[str] = ()) -> list[Item]:
    """The items in `file`, one JSON object a line; each label is one of `labels`, where there are any.

    Raises TaskError at the first bad line, and at an id or a text that stands there twice: in two splits it would
    give its own answer away.
    """
    if not file.is_file():
        raise TaskError(
            f'{file}: missing. With [splits] in task.toml the items stand there: {{"id", "text", "label"}}.'
        )
    items: list[Item] = []
    first_seen: dict[str, int] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = _ITEM.validate_json(line)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise TaskError(f'{file}:{number}: no item {{"id", "text", "label"}}: {problem}.') from error
        if labels and item.label not in labels:
            raise TaskError(f"{file}:{number}: label {item.label!r} is not one of {', '.join(labels)}.")
        if "#" in item.id:
            raise TaskError(f"{file}:{number}: id {item.id!r} has a '#', which marks repeated samples. Rename it.")
        for kind, value in (("id", item.id), ("text", item.text)):
            line_before = first_seen.setdefault(f"{kind} {value}", number)
            if line_before != number:
                raise TaskError(f"{file}:{number}: the same {kind} as line {line_before}. Keep one of the two.")
        items.append(item)
    return items


def split(items: Sequence[Item], seed: int, sizes: Mapping[str, int]) -> dict[str, list[Item]]:
    """`items` in disjoint splits of those sizes, and the rest as "train"; each split has the labels in proportion.

    Where an item falls depends on the ids, the labels and the seed, not on the order of `items`. Each split stands in
    an order of its own, by a second hash, which tells nothing about labels.
    """
    by_label: dict[str, list[Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: _hash(seed, "split", item.id)):
        by_label[item.label].append(item)
    # An item's place is how far down its own label it stands, so every stretch of `dealt` has all labels in proportion.
    places = {item.id: (rank + 0.5) / len(group) for group in by_label.values() for rank, item in enumerate(group)}
    dealt = sorted(items, key=lambda item: (places[item.id], _hash(seed, "split", item.id)))
    splits: dict[str, list[Item]] = {}
    for name, size in sizes.items():
        splits[name], dealt = dealt[:size], dealt[size:]
    splits["train"] = dealt
    return {name: sorted(part, key=lambda item: _hash(seed, "order", item.id)) for name, part in splits.items()}


def _hash(seed: int, purpose: str, id: str) -> str:
    return hashlib.sha256(f"{seed} {purpose} {id}".encode()).hexdigest()
