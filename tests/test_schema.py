"""`sia schema`: the description of the stream holds for every record there is, and for nothing else."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sia_events.shared.events import EVENTS, event_schema
from sia_events.shared.record import SCHEMA
from sia_events.shared.schema import asyncapi

GOLDEN = Path(__file__).parent / "golden/events.jsonl"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return asyncapi()


def resolved(document: dict[str, Any], reference: str) -> Any:
    assert reference.startswith("#/")
    found: Any = document
    for part in reference[2:].split("/"):
        found = found[part]
    return found


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [v for k, v in value.items() if k == "$ref"] + [r for v in value.values() for r in references(v)]
    return [r for v in value for r in references(v)] if isinstance(value, list) else []


def test_it_is_asyncapi_3_with_a_channel_an_operation_and_a_message_for_every_event(document: dict[str, Any]):
    assert document["asyncapi"] == "3.0.0" and {"title", "version"} <= document["info"].keys()
    for part in (document["channels"], document["operations"], document["components"]["messages"]):
        assert list(part) == list(EVENTS)
    assert EVENTS.keys() <= document["components"]["schemas"].keys()
    assert document["channels"]["Scored"]["address"] == "sia.events.{run}.Scored"


def test_every_reference_in_it_leads_somewhere(document: dict[str, Any]):
    found = references(document)
    assert len(found) > 3 * len(EVENTS)
    for reference in found:
        assert isinstance(resolved(document, reference), dict), reference


def test_it_is_json_and_the_same_each_time(document: dict[str, Any]):
    assert json.loads(json.dumps(document)) == document == asyncapi()


@pytest.mark.parametrize("wire", GOLDEN.read_text().splitlines() if GOLDEN.exists() else [])
def test_every_shipped_record_has_the_attributes_it_says(wire: str, document: dict[str, Any]):
    record = json.loads(wire)
    payload = document["components"]["messages"][record["type"]]["payload"]
    assert set(payload["required"]) <= record.keys() <= payload["properties"].keys()
    schema = resolved(document, payload["properties"]["data"]["$ref"])
    # The type stands in the envelope and not in the data, where a schema of the whole event would have it.
    wanted = set(schema.get("required", []))
    assert wanted <= record["data"].keys() <= schema["properties"].keys()
    assert schema["additionalProperties"] is False


# By schema, what each event could hold under it: the first 16 digits of the SHA-256 of its JSON Schema without words.
SHAPES: dict[str, dict[str, str]] = json.loads((GOLDEN.parent / "shapes.json").read_text())


def without_words(value: Any) -> Any:
    if isinstance(value, dict):
        said = {k for k in ("title", "description") if isinstance(value.get(k), str)}
        return {k: without_words(each) for k, each in value.items() if k not in said}
    return [without_words(each) for each in value] if isinstance(value, list) else value


def shapes() -> dict[str, str]:
    told = {name: json.dumps(without_words(body), sort_keys=True) for name, body in event_schema().items()}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in told.items()}


def test_an_event_that_can_hold_something_else_has_another_schema():
    """Code that knows an event otherwise must be able to tell: it stops, and writes nothing behind such a record."""
    now = shapes()
    changed = [name for name in now if now[name] != SHAPES[str(SCHEMA)].get(name)]
    assert now == SHAPES[str(SCHEMA)], (
        f"{', '.join(changed)}: raise SCHEMA in shared/record.py once a release, with an upcast where an old record "
        f"does not parse as it is; add golden lines of it to events.jsonl, and this to shapes.json: {json.dumps(now)}"
    )


def test_what_changed_with_a_schema_has_a_golden_line_of_it():
    have = {(line["schema"], line["type"]) for line in map(json.loads, GOLDEN.read_text().splitlines())}
    for before, after in pairwise(sorted(SHAPES, key=int)):
        changed = {name for name, shape in SHAPES[after].items() if SHAPES[before].get(name) != shape}
        assert {(int(after), name) for name in changed} <= have
