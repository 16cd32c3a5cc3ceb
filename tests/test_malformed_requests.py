"""A request of the wrong form is its sender's fault on every wire: told in the wire's shape, unpaid and unrecorded."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from gateway_house import ANTHROPIC, COMPATIBLE, GOOGLE, OPENAI, SECRET, Clock, House, house
from loopback import Fault
from test_gateway_faults import WIRES, Purse, told

from sia_events.model_gateway.door import gateway

CHAT, MESSAGES, RESPONSES = (path for path, _ in WIRES)
# Each wire as it is passed on where it can be, and translated into every other.
EVERY = pytest.mark.parametrize(
    ("path", "model"),
    [
        *((CHAT, model) for model in (COMPATIBLE, ANTHROPIC, GOOGLE)),
        *((MESSAGES, model) for model in (COMPATIBLE, ANTHROPIC, GOOGLE)),
        *((RESPONSES, model) for model in (COMPATIBLE, OPENAI, GOOGLE)),
    ],
)
HELLO: Any = {"role": "user", "content": "hello"}
# Nothing of this is what any field wants, and each breaks other code: unhashable, without attributes, without length.
WRONG: list[Any] = [None, 3, "x", [], [{"a": {}}]]
FIELDS = {
    CHAT: "messages temperature top_p max_tokens stop n tools tool_choice response_format functions",
    MESSAGES: "messages max_tokens system temperature top_p stop_sequences tools tool_choice betas mcp_servers",
    RESPONSES: "input instructions max_output_tokens tools tool_choice text conversation background service_tier",
}
COMMON = ("model", "stream", "stream_options", "metadata")


def changes(path: str) -> Iterator[dict[str, Any]]:
    """What is put into a good request: each field of a wrong type, and parts of its lists and objects."""
    for wrong in WRONG:
        yield from ({name: wrong} for name in (*FIELDS[path].split(), *COMMON))
        yield from conversations(path, wrong)
        for tool in tools(wrong):
            yield {"tools": [tool]}
        for choice in ({"type": wrong}, {"type": "function", "function": wrong}, {"type": "tool", "name": wrong}):
            yield {"tools": [{"type": "function", "name": "n", "function": {"name": "n"}}], "tool_choice": choice}
            yield {"tools": [{"name": "n", "input_schema": {}}], "tool_choice": choice}
        for form in ({"type": wrong}, {"type": "json_schema", "json_schema": wrong, "schema": wrong}):
            yield {"response_format": form}
            yield {"text": {"format": form}}


def conversations(path: str, wrong: Any) -> Iterator[dict[str, Any]]:
    name = "input" if path == RESPONSES else "messages"
    roles: tuple[Any, ...] = ("user", "assistant", "tool", wrong)
    said: list[list[Any]] = [[wrong], [{"role": wrong}], [{"content": wrong}]]
    said += [[{"role": role, "content": wrong}] for role in roles]
    said += [[{"role": role, "content": [{"type": "text", "text": wrong}]}] for role in roles]
    blocks = [{"type": kind, part: wrong} for kind in ("tool_use", "tool_result") for part in BLOCK]
    said += [[{"role": role, "content": [block]}] for role in ("user", "assistant") for block in blocks]
    calls = [
        wrong,
        [wrong],
        [{"id": wrong, "function": {"name": "f"}}],
        [{"id": "c", "function": wrong}],
        [{"id": "c", "function": {"name": wrong, "arguments": "{}"}}],
        [{"id": "c", "function": {"name": "f", "arguments": wrong}}],
        [{"id": "c", "function": {"name": "f"}, "extra_content": wrong}],
        [{"id": "c", "function": {"name": "f"}, "extra_content": {"google": {"thought_signature": wrong}}}],
    ]
    said += [[HELLO, {"role": "assistant", "content": None, "tool_calls": call}] for call in calls]
    said += [[HELLO, {"role": "tool", "tool_call_id": wrong, "content": "x"}]]
    said += [[{"type": kind, part: wrong}] for kind in ITEMS for part in ITEM]
    yield from ({name: each} for each in said)


BLOCK = ("id", "name", "input", "content", "source")
ITEMS = ("message", "function_call", "function_call_output", [])
ITEM = ("role", "content", "name", "arguments", "output", "type")


def tools(wrong: Any) -> Iterator[Any]:
    yield wrong
    for name in ("type", "name", "function", "description", "parameters", "input_schema"):
        yield {"type": "function", "name": "n", "function": {"name": "n", name: wrong}, name: wrong}
        yield {"type": "custom", "name": "n", "input_schema": {}, name: wrong}


async def assert_all_refused(there: House, purse: Purse, model: str, path: str, bodies: Iterator[bytes]) -> None:
    failures: list[str] = []
    app = httpx.ASGITransport(gateway(there.calls, SECRET, Clock()), raise_app_exceptions=False)
    token = {"authorization": f"Bearer {there.token(model)}"}
    async with httpx.AsyncClient(transport=app, base_url=there.url, headers=token) as client:
        for body in bodies:
            reply = await client.post(path, content=body)
            if not 400 <= reply.status_code < 500:
                failures.append(f"{reply.status_code} {reply.text[:200]} to {body[:300]!r}")
            elif told(path, reply.json())[0] not in ("invalid_request_error", "permission_error"):
                failures.append(f"{reply.text[:200]} to {body[:300]!r}")
    assert not failures, "\n".join([f"{len(failures)} bodies:", *failures[:20]])
    assert not await there.recorded() and not purse.held and not any(purse.settled)


@EVERY
async def test_a_request_of_the_wrong_form_is_refused(path: str, model: str):
    """What a wire passes on as it came the provider refuses, as this one does with all that reaches it."""
    purse, good = Purse(calls=10**6), dict(WIRES)[path]
    bodies = (json.dumps({**good, **change}).encode() for change in changes(path))
    async with house(lambda wire, asked: Fault("bad_request"), ledger=purse, patience=0.0) as there:
        await assert_all_refused(there, purse, model, path, bodies)


@EVERY
async def test_a_request_of_endless_depth_is_refused_and_one_of_some_depth_breaks_nothing(path: str, model: str):
    def nested(depth: int) -> Iterator[bytes]:
        lists, objects = b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth
        good = json.dumps(dict(WIRES)[path])[1:-1].encode()
        for deep in (lists, objects):
            yield deep
            yield b'{"messages": [{"role": "user", "content": %s}], "max_tokens": 9}' % deep
            yield b'{"input": [{"role": "user", "content": %s}]}' % deep
            for name in (b"tools", b"metadata", b"tool_choice", b"unknown"):
                yield b'{%s, "%s": %s}' % (good, name, deep)

    purse = Purse(calls=10**6)
    async with house(lambda wire, asked: Fault("bad_request"), ledger=purse, patience=0.0) as there:
        await assert_all_refused(there, purse, model, path, nested(10_000))
        assert there.provider.count == 0
        for depth in (50, 300, 900):
            await assert_all_refused(there, purse, model, path, nested(depth))


@pytest.mark.parametrize("names", ["a\r\nx-api-key: b", "\x80", "a\nb"])
async def test_names_of_beta_features_that_no_header_takes_are_the_callers_fault(names: str):
    purse = Purse(calls=9)
    async with house(lambda wire, asked: Fault("bad_request"), ledger=purse, patience=0.0) as there:
        body = json.dumps({**dict(WIRES)[MESSAGES], "betas": [names]}).encode()
        await assert_all_refused(there, purse, ANTHROPIC, MESSAGES, iter([body]))
        assert there.provider.count == 0
