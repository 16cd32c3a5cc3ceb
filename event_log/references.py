"""Which blobs a record names, and which a blob names in turn."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

import msgspec
from pydantic import BaseModel

from sia_events.shared.events import Names, TaskRegistered
from sia_events.shared.record import Record

# What only the evaluator's store has.
PRIVATE = ("answers", "judge")

_DIGEST = re.compile(r"[0-9a-f]{64}")
_DIGESTS = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_tree = msgspec.json.Decoder(dict[str, str]).decode


@dataclass(frozen=True)
class Reference:
    """A blob that a record names. Of a `tree` the blob is the manifest, and the record needs its members too."""

    digest: str
    private: bool = False
    tree: bool = False


def named(record: Record) -> Iterator[Reference]:
    """Every blob that the record names, as its fields are declared: other text may look like a digest too."""
    private = PRIVATE if isinstance(record.event, TaskRegistered) else ()
    for field, digest, tree in _named(record.event):
        yield Reference(digest, field in private, tree)


def members(body: bytes) -> tuple[str, ...]:
    """The blobs of a tree, when `body` is a tree's manifest; else none."""
    if not body.startswith(b"{"):
        return ()
    try:
        files = _tree(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ()
    return tuple(files.values()) if all(_DIGEST.fullmatch(digest) for digest in files.values()) else ()


def mentioned(body: bytes) -> set[str]:
    """Every digest that is written anywhere in `body`: more than it names, and never less."""
    return {found.decode() for found in _DIGESTS.findall(body)}


def _named(value: BaseModel) -> Iterator[tuple[str, str, bool]]:
    """(field, digest, whether it is a tree) for each of a value's own fields and those of the values within."""
    declared = _declared(type(value))
    for field, held in value:
        for each in _each(held):
            if isinstance(each, BaseModel):
                yield from _named(each)
            elif field in declared and isinstance(each, str):
                yield field, each, declared[field] == "tree"


def _each(held: Any) -> Iterator[Any]:
    """What a field holds: itself, or what is in it."""
    if isinstance(held, Mapping):
        for each in held.values():
            yield from _each(each)
    elif isinstance(held, tuple | list):
        for each in held:
            yield from _each(each)
    else:
        yield held


@cache
def _declared(kind: type[BaseModel]) -> Mapping[str, str]:
    """What those fields name that name something by digest."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: marks[0].what for name in kind.model_fields if (marks := [*_marks(hints[name])])}


def _marks(hint: Any) -> Iterator[Names]:
    yield from (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Names))
    for each in get_args(hint):
        yield from _marks(each)
