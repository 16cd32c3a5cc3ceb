"""`sia schema`: the description of the stream holds for every record there is, and for nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from sia_events.shared.events import EVENTS
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
