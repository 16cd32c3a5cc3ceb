"""How an agent asks to be answered reaches the provider in the provider's words, and the record in the agent's own."""

from typing import Any

import pytest
from gateway_house import ANTHROPIC, COMPATIBLE, GOOGLE, OPENAI, house
from loopback import Asked, Fault, Reply
from test_gateway_faults import WIRES

CHAT, MESSAGES, RESPONSES = (path for path, _ in WIRES)
EVERY = pytest.mark.parametrize("model", [COMPATIBLE, OPENAI, ANTHROPIC, GOOGLE])
SAMPLING = {"temperature": 0.25, "top_p": 0.5}
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {**SAMPLING, "max_tokens": 9, "stop": ["END"]},
    MESSAGES: {**SAMPLING, "max_tokens": 9, "stop_sequences": ["END"]},
    RESPONSES: {**SAMPLING, "max_output_tokens": 9},
}
BODIES = dict(WIRES)


def sampling(asked: Asked) -> tuple[Any, ...]:
    """Temperature, top_p, limit and stops of a request, whatever its provider calls them."""
    body = asked.body
    match asked.wire:
        case "gemini":
            body, names = body["generationConfig"], ("temperature", "topP", "maxOutputTokens", "stopSequences")
        case "messages":
            names = ("temperature", "top_p", "max_tokens", "stop_sequences")
        case "responses":
            names = ("temperature", "top_p", "max_output_tokens", "stop")
        case _:
            names = ("temperature", "top_p", "max_tokens", "stop")
    return tuple(body.get(name) for name in names)


@EVERY
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_an_agent_asks_for_is_what_the_provider_is_asked(path: str, model: str, stream: bool):
    async with house() as there, there.http(model) as client:
        reply = await client.post(path, json={**BODIES[path], **ASKED[path], "stream": stream})
        assert reply.status_code == 200, reply.text
        (asked,), (call,) = there.provider.requests, await there.recorded()
    stops = None if path == RESPONSES else ["END"]
    assert sampling(asked) == (0.25, 0.5, 9, stops)
    assert {name: call.request[name] for name in ASKED[path]} == ASKED[path]


@EVERY
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
async def test_what_it_does_not_ask_for_is_left_to_the_provider(path: str, model: str):
    async with house() as there, there.http(model) as client:
        assert (await client.post(path, json=BODIES[path])).status_code == 200
        (asked,), (call,) = there.provider.requests, await there.recorded()
    assert sampling(asked)[:2] == (None, None) and not {"temperature", "top_p"} & call.request.keys()


@EVERY
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
async def test_a_rollout_is_drawn_at_temperature_1_whatever_it_asks_for(path: str, model: str):
    async with house() as there, there.http(model, sample=True) as client:
        assert (await client.post(path, json={**BODIES[path], **ASKED[path]})).status_code == 200
        (asked,), (call,) = there.provider.requests, await there.recorded()
    assert sampling(asked)[0] == 1.0 and sampling(asked)[1] in (None, 1.0)
    assert call.request["temperature"] == 0.25, "the record has what the agent sent"


async def test_a_temperature_that_the_model_refuses_is_left_out_and_still_on_record():
    replies = [Fault("bad_request", message="Unsupported parameter: 'temperature' is not supported"), Reply()]
    async with house(lambda wire, body: replies.pop(0)) as there, there.http(COMPATIBLE) as client:
        assert (await client.post(CHAT, json={**BODIES[CHAT], **ASKED[CHAT]})).status_code == 200
        (first, second), (call,) = there.provider.requests, await there.recorded()
    assert sampling(first)[0] == 0.25 and sampling(second)[:2] == (None, 0.5)
    assert call.request["temperature"] == 0.25
