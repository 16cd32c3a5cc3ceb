"""The stream described for other people's tools: AsyncAPI 3.0 with the JSON Schema of every event inside."""

from typing import Any

from sia_events.shared.events import EVENTS, event_schema
from sia_events.shared.record import SCHEMA


def asyncapi() -> dict[str, Any]:
    """An AsyncAPI 3.0 document (https://www.asyncapi.com/docs/reference/specification/v3.0.0): a channel a type."""
    definitions: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for name, body in event_schema().items():
        definitions |= body.pop("$defs", {})
        schemas[name] = body
    text = _moved({"schemas": {**definitions, **schemas}})
    messages = {name: {"name": name, "title": EVENTS[name].__doc__, "payload": _record(name)} for name in EVENTS}
    channels = {
        name: {
            "address": f"sia.events.{{run}}.{name}",
            "parameters": {"run": {"description": "the run's name"}},
            "messages": {name: {"$ref": f"#/components/messages/{name}"}},
        }
        for name in EVENTS
    }
    operations = {name: {"action": "receive", "channel": {"$ref": f"#/channels/{name}"}} for name in EVENTS}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "SIA on events",
            "version": str(SCHEMA),
            "description": "Records of runs, as CloudEvents 1.0. Where history is cut into partitions, an address ends "
            "in one more word, the number of the run's.",
        },
        "defaultContentType": "application/cloudevents+json",
        "channels": channels,
        "operations": operations,
        "components": {**text, "messages": messages},
    }


def _record(name: str) -> dict[str, Any]:
    """The JSON Schema of a CloudEvents envelope with our extension attributes around one event's data."""
    text, uuid = {"type": "string"}, {"type": "string", "format": "uuid"}
    properties = {
        "specversion": {"const": "1.0"},
        "id": uuid,
        "type": {"const": name},
        "source": text,
        "subject": text,
        "time": {"type": "string", "format": "date-time"},
        "datacontenttype": {"const": "application/json"},
        "run": text,
        "position": {"type": "integer", "minimum": 1},
        "producer": text,
        "cause": uuid,
        "correlation": uuid,
        "schema": {"type": "integer"},
        "chain": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "code": text,
        "data": {"$ref": f"#/components/schemas/{name}"},
    }
    required = [key for key in properties if key not in ("cause", "code")]
    return {"type": "object", "properties": properties, "required": required}


def _moved(value: Any) -> Any:
    """References to a schema's own definitions, pointed at where they stand in this document."""
    if isinstance(value, dict):
        return {
            k: (v.replace("#/$defs/", "#/components/schemas/") if k == "$ref" else _moved(v)) for k, v in value.items()
        }
    return [_moved(each) for each in value] if isinstance(value, list) else value
