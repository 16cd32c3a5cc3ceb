"""What goes wrong behind the gateway: each fault has its kind in the record and its shape on the wire."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import anthropic
import openai
import pytest
from gateway_house import ANTHROPIC, COMPATIBLE, OPENAI, house
from loopback import Fault, Reply

from sia_events.model_gateway.budget import OverBudget, Reservation, Spend

HELLO: Any = [{"role": "user", "content": "hello there"}]
WIRES = [
    ("/v1/chat/completions", {"messages": HELLO}),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 9}),
    ("/v1/responses", {"input": "hello"}),
]
EVERY_WIRE = pytest.mark.parametrize(("path", "body"), WIRES)


class Purse:
    """The `Ledger` port: so many calls, a dollar each, and what was set aside and settled."""

    def __init__(self, calls: int) -> None:
        self.left = calls
        self.held: list[Reservation] = []
        self.limits: list[tuple[int, int]] = []
        self.settled: list[Mapping[str, Any] | None] = []

    async def look(self, run: str) -> None:
        pass

    async def reserve(self, run: str, model: str, prompt_tokens: int, max_tokens: int) -> Reservation:
        if self.left == 0:
            raise OverBudget("calls", 1, 1)
        self.left -= 1
        self.limits.append((prompt_tokens, max_tokens))
        self.held.append(Reservation(run, model, Spend(calls=1)))
        return self.held[-1]

    async def settle(self, reservation: Reservation, usage: Mapping[str, Any] | None) -> float | None:
        self.held.remove(reservation)
        self.settled.append(usage)
        return 1.0 if usage else 0.0


def told(path: str, reply: Mapping[str, Any]) -> tuple[str, str]:
    """Type and message of an error body, which is in the shape of the wire that was called."""
    assert ("type" in reply and reply["type"] == "error") == (path == "/v1/messages")
    assert path == "/v1/messages" or set(reply["error"]) == {"message", "type", "param", "code"}
    return reply["error"]["type"], reply["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "status", "name", "fault"),
    [
        ("rate_limited", 429, "rate_limit_error", "rate_limited"),
        ("broken", 503, "provider_away", "unavailable"),
        ("overloaded", 503, "provider_away", "unavailable"),
        ("garbage", 502, "provider_error", "garbage"),
        ("empty", 502, "provider_error", "garbage"),
        ("wrong_type", 502, "provider_error", "garbage"),
        ("unauthorised", 503, "provider_away", "no_key"),
        ("unknown_model", 502, "provider_error", "unknown_model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@EVERY_WIRE
async def test_what_a_provider_could_not_answer_is_recorded_with_its_kind(
    path: str, body: dict[str, Any], kind: Any, status: int, name: str, fault: str, stream: bool
):
    async with house(lambda wire, asked: Fault(kind), patience=0.0) as there, there.http(COMPATIBLE) as client:
        reply = await client.post(path, json={**body, "stream": stream})
        assert reply.status_code == status and told(path, reply.json())[0] == name
        (call,) = await there.recorded()
        assert (call.reply, call.fault, call.usd) == (None, fault, 0.0) and call.error in told(path, reply.json())[1]
        assert there.provider.count == 1


@pytest.mark.parametrize("model", [COMPATIBLE, ANTHROPIC, OPENAI])
@EVERY_WIRE
async def test_a_request_that_the_provider_refuses_is_the_callers_and_leaves_no_record(
    path: str, body: dict[str, Any], model: str
):
    async with house(lambda wire, asked: Fault("bad_request")) as there, there.http(model) as client:
        reply = await client.post(path, json=body)
        assert reply.status_code == 400 and "scripted: bad_request" in told(path, reply.json())[1]
        assert there.provider.count == 1 and not await there.recorded()


@EVERY_WIRE
async def test_a_provider_without_its_key_is_the_runs_failure_and_names_the_variable(path: str, body: dict[str, Any]):
    async with house() as there, there.http("keyless/llama") as client:
        reply = await client.post(path, json=body)
        (call,) = await there.recorded()
        assert reply.status_code == 503 and "NO_SUCH_KEY" in (call.error or "") and call.fault == "no_key"
        assert there.provider.count == 0


@EVERY_WIRE
async def test_a_provider_that_stays_silent_is_a_timeout(path: str, body: dict[str, Any]):
    async with house(lambda wire, asked: Fault("hang"), patience=0.0) as there, there.http("slow/llama") as client:
        reply = await client.post(path, json=body)
        assert reply.status_code == 504 and told(path, reply.json())[0] == "timeout_error"
        (call,) = await there.recorded()
        assert call.fault == "timeout"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_is_asked_again_when_it_said_that_it_may_be(stream: bool):
    replies = [Fault("rate_limited", retry_after="1"), Reply("at last")]
    async with house(lambda wire, asked: replies.pop(0)) as there, there.http(COMPATIBLE) as client:
        began = time.monotonic()
        reply = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": stream})
        assert reply.status_code == 200 and time.monotonic() - began >= 1.0
        (call,) = await there.recorded()
        assert call.reply and call.fault == "" and there.provider.count == 2


async def test_a_provider_that_wants_more_time_than_there_is_is_not_waited_for():
    async with house(lambda wire, asked: Fault("rate_limited", retry_after="3600")) as there:
        async with there.http(COMPATIBLE) as client, asyncio.timeout(15):
            reply = await client.post("/v1/chat/completions", json={"messages": HELLO})
        assert reply.status_code == 429 and there.provider.count == 1


@pytest.mark.parametrize("model", [COMPATIBLE, ANTHROPIC, OPENAI])
@EVERY_WIRE
async def test_a_call_over_the_budget_reaches_no_provider_and_is_recorded_without_a_reply(
    path: str, body: dict[str, Any], model: str
):
    purse = Purse(calls=1)
    async with house(ledger=purse) as there, there.http(model) as client:
        assert (await client.post(path, json=body)).status_code == 200
        for stream in (False, True):
            refused = await client.post(path, json={**body, "stream": stream})
            assert refused.status_code == 402 and told(path, refused.json())[0] == "budget_exhausted"
        made, over = await there.recorded()
        assert (made.usd, made.fault) == (1.0, "") and there.provider.count == 1
        assert (over.reply, over.fault, over.usd) == (None, "budget", 0.0)
        assert not purse.held and purse.settled == [purse.settled[0]]
        purse.left = 1
        assert (await client.post(path, json=body)).status_code == 200
        assert there.provider.count == 2


async def test_an_agent_that_goes_on_asking_over_its_budget_fills_no_record():
    async with house(ledger=Purse(calls=0)) as there:
        async with there.http(COMPATIBLE) as client:
            for n in range(20):
                body = {"messages": [{"role": "user", "content": str(n)}]}
                assert (await client.post("/v1/chat/completions", json=body)).status_code == 402
        async with there.http(COMPATIBLE, start="second") as client:
            await client.post("/v1/chat/completions", json={"messages": HELLO})
        assert [call.fault for call in await there.recorded()] == ["budget"] * 2


async def test_what_is_set_aside_bounds_what_a_call_can_take_and_what_was_not_used_is_given_back():
    purse = Purse(calls=9)
    async with (
        house(lambda wire, asked: Fault("broken"), ledger=purse, patience=0.0) as there,
        there.http(COMPATIBLE) as client,
    ):
        await client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 77})
        async with there.http(COMPATIBLE, start="second") as later:
            await later.post("/v1/chat/completions", json={"messages": HELLO})
    (prompt, most), (_, unbounded) = purse.limits
    assert prompt >= len(str(HELLO)) and most == 77 and unbounded > 1000
    assert purse.settled == [None, None] and not purse.held


async def test_a_stream_that_breaks_off_is_settled_for_what_had_come():
    purse = Purse(calls=1)
    async with house(lambda wire, asked: Fault("cut"), ledger=purse) as there, there.http(COMPATIBLE) as client:
        reply = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})
        assert "error" in reply.text and "[DONE]" not in reply.text
        (call,) = await there.recorded()
    (usage,) = purse.settled
    assert usage and (usage["prompt_tokens"], usage["completion_tokens"]) == (
        call.prompt_tokens,
        call.completion_tokens,
    )
    assert call.usd == 1.0 and call.reply is None


@EVERY_WIRE
async def test_what_is_no_request_of_the_wire_is_told_in_its_shape(path: str, body: dict[str, Any]):
    async with house() as there, there.http(COMPATIBLE) as client:
        wrong = {name: 7 for name in body}
        for sent, status, name in [
            (wrong, 400, "invalid_request_error"),
            ({**body, "model": "best"}, 403, "permission_error"),
            ([], 400, "invalid_request_error"),
        ]:
            reply = await client.post(path, json=sent)
            assert (reply.status_code, told(path, reply.json())[0]) == (status, name)
        unknown = await client.post(path, json=body, headers={"authorization": "Bearer nonsense"})
        assert (unknown.status_code, told(path, unknown.json())[0]) == (401, "authentication_error")
        missing = await client.post(f"{path}/nowhere", json=body)
        assert (missing.status_code, told(path, missing.json())[0]) == (404, "not_found_error")
        assert there.provider.count == 0 and not await there.recorded()


IMAGE: Any = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": [IMAGE]}]}, "blocks of type 'image'"),
        ("/v1/messages", {"messages": [{"role": "tool", "content": "x"}]}, "the role is 'tool'"),
        ("/v1/messages", {"messages": [{"role": "user", "content": 7}]}, "neither text nor a list of blocks"),
        ("/v1/messages", {"max_tokens": None}, "max_tokens"),
        ("/v1/messages", {"tools": [{"type": "web_search_20250305", "name": "w"}]}, "runs at Anthropic"),
        ("/v1/messages", {"tool_choice": {"type": "some"}}, "tool_choice 'some' is unknown"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "'input_image'"),
        ("/v1/responses", {"input": [{"role": "robot", "content": "x"}]}, "the role is 'robot'"),
        ("/v1/responses", {"input": [{"type": "reasoning", "summary": []}]}, "items of type 'reasoning'"),
        ("/v1/responses", {"previous_response_id": "resp_1"}, "keeps no conversations"),
        ("/v1/responses", {"background": True}, "`background`"),
        ("/v1/responses", {"tools": [{"type": "web_search"}]}, "runs at OpenAI"),
        ("/v1/responses", {"tool_choice": {"type": "mcp"}}, "tool_choice 'mcp'"),
        ("/v1/responses", {"max_output_tokens": 99_999}, "max_tokens 99999 is over 65536"),
    ],
)
async def test_what_has_no_equal_at_another_provider_is_refused_clearly(
    path: str, change: dict[str, Any], message: str
):
    async with house() as there, there.http(COMPATIBLE) as client:
        reply = await client.post(path, json={**dict(WIRES)[path], **change})
        assert reply.status_code == 400 and message in told(path, reply.json())[1]
        assert there.provider.count == 0 and not await there.recorded()


@pytest.mark.parametrize(
    ("model", "path", "change"),
    [
        (ANTHROPIC, "/v1/messages", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
        (ANTHROPIC, "/v1/messages", {"mcp_servers": [{"type": "url", "url": "https://example.org", "name": "m"}]}),
        (ANTHROPIC, "/v1/messages", {"messages": [{"role": "user", "content": [IMAGE]}]}),
        (OPENAI, "/v1/responses", {"tools": [{"type": "web_search"}]}),
        (OPENAI, "/v1/responses", {"background": True}),
    ],
)
async def test_what_a_provider_would_fetch_or_do_elsewhere_is_refused_where_bodies_pass_through_too(
    model: str, path: str, change: dict[str, Any]
):
    """An agent in a box has no network, and a provider's own tools would be one."""
    async with house() as there, there.http(model) as client:
        reply = await client.post(path, json={**dict(WIRES)[path], **change})
        assert reply.status_code == 400 and "not served" in told(path, reply.json())[1]
        assert there.provider.count == 0 and not await there.recorded()


async def test_the_clients_raise_their_own_errors_for_what_the_gateway_refuses():
    async with house(ledger=Purse(calls=0)) as there:
        with pytest.raises(openai.PermissionDeniedError, match=f"it may use {COMPATIBLE}"):
            await there.openai(COMPATIBLE).chat.completions.create(model="gpt-9", messages=HELLO)
        with pytest.raises(anthropic.PermissionDeniedError, match=f"it may use {COMPATIBLE}"):
            await there.anthropic(COMPATIBLE).messages.create(model="claude-9", max_tokens=9, messages=HELLO)
        with pytest.raises(openai.APIStatusError) as spent:
            await there.openai(COMPATIBLE).responses.create(model=COMPATIBLE, input="hello")
        with pytest.raises(anthropic.APIStatusError) as out:
            await there.anthropic(COMPATIBLE).messages.create(model=COMPATIBLE, max_tokens=9, messages=HELLO)
        assert spent.value.status_code == out.value.status_code == 402
