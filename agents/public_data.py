"""Says in a few lines what a task's public files hold: sizes, rows, keys, two rows, and how often each open label."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from sia_events.agents.fit import cut

DESCRIPTION = "task.md"
OPEN = "train.jsonl"
SAMPLES = 2
ROW_CHARS = 300
LABELS = 30
KEYS = 30
NAME_CHARS = 60
TEXT_CHARS = 200


def summarise(files: Mapping[str, bytes]) -> str:
    """A paragraph a file, by name. Labels are counted in train.jsonl alone, the one split whose answers are open."""
    return "\n".join(f"- `{name}`, {len(body):,} bytes: {_content(name, body)}" for name, body in sorted(files.items()))


def _content(name: str, body: bytes) -> str:
    if name == DESCRIPTION:
        return "the task as stated above."
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return "binary."
    kind = name.rsplit(".", 1)[-1].lower()
    try:
        if kind in ("jsonl", "ndjson"):
            return _rows(name, [msgspec.json.decode(line) for line in text.splitlines() if line.strip()])
        if kind in ("csv", "tsv"):
            return _rows(name, list(csv.DictReader(io.StringIO(text), delimiter="\t" if kind == "tsv" else ",")))
        if kind == "json":
            return _value(msgspec.json.decode(body))
    except (msgspec.DecodeError, csv.Error, RecursionError) as error:
        return f"text that is no {kind}: {error}."
    return f"text, {len(text.splitlines()):,} lines; it begins {cut(text, TEXT_CHARS)!r}"


def _rows(name: str, rows: Sequence[object]) -> str:
    tables = [row for row in rows if isinstance(row, dict)]
    names = dict.fromkeys(cut(str(key), NAME_CHARS) for row in tables for key in row)
    shown = "".join(f"\n  - `{_row(row)}`" for row in rows[:SAMPLES])
    counted = ""
    if name == OPEN and (labels := Counter(str(row["label"]) for row in tables if "label" in row)):
        counts = [f"{cut(label, NAME_CHARS)} {times}" for label, times in labels.most_common()]
        counted = f"\n  - labels: {_listed(counts, LABELS)}"
    return f"{len(rows):,} rows with {_listed([*names], KEYS) or 'no keys'}; the first:{shown}{counted}"


def _listed(words: Sequence[str], most: int) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most:,} more" if len(words) > most else "")


def _row(row: object) -> str:
    if isinstance(row, dict):
        # What stands behind the last column of a table has no name.
        row = {str(key): value for key, value in row.items()}
    return cut(msgspec.json.encode(row).decode(), ROW_CHARS).replace("\n", " ")


def _value(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value):,}: `{_row(value)}`"
    if isinstance(value, dict):
        return f"an object with {len(value):,} keys: `{_row(value)}`"
    return f"`{_row(value)}`"
