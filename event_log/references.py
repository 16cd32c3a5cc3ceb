"""Which blobs a record names, and which a blob names in turn."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from sia_events.shared.events import TaskRegistered
from sia_events.shared.record import Record

# What only the evaluator's store has.
PRIVATE = ("answers", "judge")

_DIGEST = re.compile(r"[0-9a-f]{64}")
_DIGESTS = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_tree = msgspec.json.Decoder(dict[str, str]).decode


def named(record: Record) -> Iterator[tuple[str, bool]]:
    """(digest, whether it is private) for every blob that the record names."""
    for field, value in record.event.model_dump(mode="json").items():
        private = isinstance(record.event, TaskRegistered) and field in PRIVATE
        for digest in _digests(value):
            yield digest, private


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


def _digests(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if _DIGEST.fullmatch(value):
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _digests(each)
    elif isinstance(value, list):
        for each in value:
            yield from _digests(each)
