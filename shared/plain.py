"""Task folders of SIA's layout, which state no splits: their ids dealt into splits, and the answers a judge sees."""

import csv
import hashlib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

FEWEST = 20
SHARES = {"dev": 0.25, "gate": 0.5}
ID_NAMES = ("id", "question_id")


@dataclass(frozen=True)
class Key:
    """The one private file that has an answer an id: its name under data/private, and the ids as text, in its order."""

    file: str
    ids: tuple[str, ...]


def find_key(private: Mapping[str, bytes]) -> Key | None:
    """The answer key among the private files, or None where none or more than one of them could be it.

    A key is a CSV file with a column of ids, a JSON or JSON-lines list of objects with an id, or a JSON object by id,
    of at least 20 different ids. A column or field of ids is called "id" or "question_id", or is a table's first
    column and ends in "id".
    """
    found = [Key(name, ids) for name, body in sorted(private.items()) if (ids := _ids(name, body))]
    return found[0] if len(found) == 1 else None


def deal(ids: Sequence[str], key: bytes = b"") -> dict[str, tuple[str, ...]]:
    """A quarter of the ids as dev, half as gate, the rest as test, by a hash of the id and of the answer `key`.

    Every attempt answers all of them and, the key being private, cannot tell which count where.
    """
    secret = hashlib.sha256(key).hexdigest()
    dealt = sorted(ids, key=lambda id: hashlib.sha256(f"plain split {secret} {id}".encode()).hexdigest())
    splits: dict[str, tuple[str, ...]] = {}
    for name, share in SHARES.items():
        size = round(share * len(ids))
        splits[name], dealt = tuple(dealt[:size]), dealt[size:]
    return {**splits, "test": tuple(dealt)}


def keep_only(name: str, body: bytes, ids: Collection[str]) -> bytes:
    """The key file with the answers to `ids` and no others, in its own format and order."""
    wanted = set(ids)
    if name.endswith(".csv"):
        rows = _rows(body)
        column = _id_column(rows[0])
        assert column is not None, "a key has a column of ids"
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([rows[0], *(row for row in rows[1:] if row[column] in wanted)])
        return out.getvalue().encode()
    if name.endswith(".jsonl"):
        lines = [line for line in body.splitlines() if line.strip()]
        return b"".join(line + b"\n" for line in lines if _id_of(msgspec.json.decode(line)) in wanted)
    stated = msgspec.json.decode(body)
    if isinstance(stated, dict):
        return msgspec.json.encode({id: answer for id, answer in stated.items() if id in wanted})
    return msgspec.json.encode([row for row in stated if _id_of(row) in wanted])


def _ids(name: str, body: bytes) -> tuple[str, ...] | None:
    """The file's ids where it reads as a key."""
    try:
        found = _stated_ids(name, body)
    except (msgspec.DecodeError, UnicodeDecodeError, csv.Error, RecursionError):
        return None
    if found is None or len(found) < FEWEST or None in found or len(set(found)) < len(found):
        return None
    return tuple(id for id in found if id is not None)


def _stated_ids(name: str, body: bytes) -> list[str | None] | None:
    if name.endswith(".csv"):
        rows = _rows(body)
        column = _id_column(rows[0]) if rows else None
        return None if column is None else [row[column] if len(row) > column else None for row in rows[1:]]
    if name.endswith(".jsonl"):
        return [_id_of(msgspec.json.decode(line)) for line in body.splitlines() if line.strip()]
    if name.endswith(".json"):
        stated = msgspec.json.decode(body)
        if isinstance(stated, dict):
            return list(stated)
        return [_id_of(row) for row in stated] if isinstance(stated, list) else None
    return None


def _id_column(header: Sequence[str]) -> int | None:
    for name in ID_NAMES:
        if name in header:
            return header.index(name)
    return 0 if header and header[0].lower().endswith("id") else None


def _id_of(row: Any) -> str | None:
    if isinstance(row, dict):
        for name in ID_NAMES:
            if isinstance(row.get(name), str | int):
                return str(row[name])
    return None


def _rows(body: bytes) -> list[list[str]]:
    """A table's rows, its blank lines left out."""
    return [row for row in csv.reader(io.StringIO(_text(body), newline="")) if row]


def _text(body: bytes) -> str:
    return body.decode("utf-8-sig")
