"""Derives data/private/items.jsonl from WordNet 3.0's noun database; run once, its result ships with the task.

    python make_items.py /usr/share/wordnet/data.noun data/private/items.jsonl

Format of the database: the manual page wndb(5WN); lexicographer file numbers: lexnames(5WN).
"""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

LABELS = {5: "animal", 20: "plant", 13: "food", 8: "body", 6: "artifact", 18: "person", 15: "location", 11: "event"}
PER_LABEL = 350
WORDS = range(4, 17)


def definitions(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(synset offset, label, definition) of every noun of the eight files, usage examples cut off."""
    for line in lines:
        if line.startswith("  "):  # the licence that opens the file
            continue
        fields, gloss = line.split(" | ", 1)
        offset, file_number = fields.split(" ", 2)[:2]
        if label := LABELS.get(int(file_number)):
            yield offset, label, re.split(r';\s*"', gloss.strip(), maxsplit=1)[0].strip("; ")


def wording(definition: str) -> str:
    """What counts as the same definition: letters only, so that two biographies differing in their years are one."""
    return " ".join(re.findall(r"[a-z]+", definition.lower()))


def digest(purpose: str, offset: str) -> str:
    return hashlib.sha256(f"wordnet-3.0 {purpose} {offset}".encode()).hexdigest()[:10]


def choose(candidates: Iterable[tuple[str, str, str]]) -> list[dict[str, str]]:
    """The same number of items a label, in the order of their ids, which are hashes and tell nothing.

    Drawn by another hash than the id: the smallest ids of a large category would be smaller than a small one's.
    """
    usable = [c for c in candidates if len(c[2].split()) in WORDS and '"' not in c[2]]
    times = Counter(wording(definition) for _, _, definition in usable)
    items: list[dict[str, str]] = []
    for label in LABELS.values():
        unique = [
            (offset, definition)
            for offset, its_label, definition in usable
            if its_label == label and times[wording(definition)] == 1
        ]
        drawn = sorted(unique, key=lambda pair: digest("draw", pair[0]))[:PER_LABEL]
        items += [{"id": digest("id", offset), "text": definition, "label": label} for offset, definition in drawn]
    return sorted(items, key=lambda item: item["id"])


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    with source.open(encoding="ascii") as lines:
        items = choose(definitions(lines))
    target.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    print(f"{len(items)} items, {target.stat().st_size} bytes: {target}", file=sys.stderr)
