"""The gateway's wires, met by the real clients: chat completions, responses and messages, whole and as streams."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest
from gateway_house import ANTHROPIC, COMPATIBLE, KEY, OPENAI, House, house
from loopback import Fault, Reply, ToolCall

from sia_events.infra.memory import MemoryBus

WEATHER: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
RESPONSES_TOOL: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": False}
MESSAGES_TOOL: Any = {"name": "weather", "description": "the weather of a city", "input_schema": WEATHER}
CALLED = Reply(text="Let me look.", tools=[ToolCall("weather", {"city": "Oslo"}, "call_7")])
HELLO: Any = [{"role": "user", "content": "hello there"}]
EVERY = pytest.mark.parametrize("model", [COMPATIBLE, OPENAI, ANTHROPIC])


def says(*replies: Reply | Fault) -> Any:
    """A script that gives these replies in order, the last of them again and again."""
    left = list(replies)
    return lambda wire, body: left.pop(0) if len(left) > 1 else left[0]


@EVERY
async def test_openais_client_chats_with_every_provider(model: str):
    async with house(says(Reply("good day", cached_tokens=4))) as there:
        told = await there.openai(model).chat.completions.create(model=model, messages=HELLO, max_tokens=50)
        assert told.choices[0].message.content == "good day" and told.choices[0].finish_reason == "stop"
        assert told.usage and (told.usage.prompt_tokens, told.usage.completion_tokens) == (11, 7)
        (call,) = await there.recorded()
        assert (call.prompt_tokens, call.completion_tokens, call.model, call.fault) == (11, 7, model, "")


@EVERY
async def test_anthropics_client_talks_with_every_provider(model: str):
    async with house(says(Reply("good day", cached_tokens=4))) as there:
        told = await there.anthropic(model).messages.create(
            model=model, max_tokens=50, system="be kind", messages=HELLO, stop_sequences=["END"]
        )
        assert told.type == "message" and told.stop_reason == "end_turn"
        assert [(block.type, getattr(block, "text", "")) for block in told.content] == [("text", "good day")]
        assert (told.usage.input_tokens, told.usage.cache_read_input_tokens, told.usage.output_tokens) == (7, 4, 7)
        (call,) = await there.recorded()
        assert (call.prompt_tokens, call.completion_tokens) == (11, 7)


@EVERY
async def test_openais_client_asks_every_provider_for_a_response(model: str):
    async with house(says(Reply("good day", cached_tokens=4))) as there:
        told = await there.openai(model).responses.create(model=model, instructions="be kind", input="hello there")
        assert told.output_text == "good day" and told.status == "completed"
        assert told.usage and (told.usage.input_tokens, told.usage.input_tokens_details.cached_tokens) == (11, 4)
        (call,) = await there.recorded()
        assert (call.prompt_tokens, call.completion_tokens) == (11, 7)


@EVERY
async def test_a_tool_is_called_and_answered_in_a_chat(model: str):
    async with house(says(CALLED, Reply("rain"))) as there:
        client = there.openai(model).chat.completions
        first = await client.create(model=model, messages=HELLO, tools=[CHAT_TOOL], tool_choice="auto")
        said = first.choices[0].message
        assert first.choices[0].finish_reason == "tool_calls" and said.tool_calls
        (call,) = said.tool_calls
        assert call.type == "function" and (call.id, call.function.name) == ("call_7", "weather")
        assert call.function.arguments == '{"city": "Oslo"}' or call.function.arguments == '{"city":"Oslo"}'
        answer: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        then = await client.create(model=model, messages=[*HELLO, said.to_dict(), answer], tools=[CHAT_TOOL])
        assert then.choices[0].message.content == "rain"


@EVERY
async def test_a_tool_is_called_and_answered_in_messages(model: str):
    async with house(says(CALLED, Reply("rain"))) as there:
        client = there.anthropic(model).messages
        asked: Any = {"model": model, "max_tokens": 90, "tools": [MESSAGES_TOOL], "tool_choice": {"type": "any"}}
        first = await client.create(messages=HELLO, **asked)
        text, used = first.content
        assert first.stop_reason == "tool_use" and text.type == "text" and used.type == "tool_use"
        assert (used.id, used.name, used.input) == ("call_7", "weather", {"city": "Oslo"})
        result: Any = {"type": "tool_result", "tool_use_id": used.id, "content": [{"type": "text", "text": "rain"}]}
        turn: Any = [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        then = await client.create(messages=[*HELLO, *turn], **asked)
        assert [getattr(block, "text", "") for block in then.content] == ["rain"]


@EVERY
async def test_a_tool_is_called_and_answered_in_responses(model: str):
    async with house(says(CALLED, Reply("rain"))) as there:
        client = there.openai(model).responses
        first = await client.create(model=model, input=HELLO, tools=[RESPONSES_TOOL])
        said, used = first.output
        assert said.type == "message" and used.type == "function_call"
        assert (used.call_id, used.name) == ("call_7", "weather") and "Oslo" in used.arguments
        result: Any = {"type": "function_call_output", "call_id": used.call_id, "output": "rain"}
        turn: Any = [*HELLO, *(item.to_dict() for item in first.output), result]
        then = await client.create(model=model, input=turn, tools=[RESPONSES_TOOL])
        assert then.output_text == "rain"


async def test_what_a_wire_says_reaches_another_providers_wire_in_its_words():
    async with house(says(Reply())) as there:
        call: Any = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}
        result: Any = {"type": "tool_result", "tool_use_id": "t1", "content": "no such city", "is_error": True}
        await there.anthropic(COMPATIBLE).messages.create(
            model=COMPATIBLE,
            max_tokens=50,
            system=[{"type": "text", "text": "be kind"}],
            messages=[
                *HELLO,
                {"role": "assistant", "content": [{"type": "text", "text": "wait"}, call]},
                {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]},
            ],
            tools=[MESSAGES_TOOL],
            tool_choice={"type": "tool", "name": "weather"},
            stop_sequences=["END"],
        )
        await there.openai(COMPATIBLE).responses.create(
            model=COMPATIBLE,
            instructions="be kind",
            input=[
                {"role": "developer", "content": "be brief"},
                *HELLO,
                {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
                {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "rain"},
                {"type": "function_call_output", "call_id": "c2", "output": "sun"},
            ],
            text={"format": {"type": "json_schema", "name": "w", "schema": WEATHER, "strict": True}},
            max_output_tokens=60,
        )
        first, second = (asked.body for asked in there.provider.requests)
    function = {"name": "weather", "arguments": '{"city":"Oslo"}'}
    assert first["messages"] == [
        {"role": "system", "content": "be kind"},
        *HELLO,
        {
            "role": "assistant",
            "content": "wait",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "error: no such city"},
        {"role": "user", "content": "and now?"},
    ]
    assert (first["model"], first["max_tokens"], first["stop"]) == ("llama", 50, ["END"])
    assert first["tools"][0]["function"]["parameters"] == WEATHER and "temperature" not in first
    assert first["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    roles = [(said["role"], len(said.get("tool_calls", ()))) for said in second["messages"]]
    assert roles == [("system", 0), ("system", 0), ("user", 0), ("assistant", 2), ("tool", 0), ("tool", 0)]
    schema = {"name": "w", "schema": WEATHER, "strict": True}
    assert second["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert second["max_tokens"] == 60


async def test_a_provider_that_speaks_the_wire_itself_gets_the_request_as_it_was_but_for_the_model():
    async with house(says(Reply())) as there:
        thinking: Any = {"type": "enabled", "budget_tokens": 1024}
        await there.anthropic(ANTHROPIC).messages.create(
            model="claude",
            max_tokens=2000,
            messages=HELLO,
            thinking=thinking,
            extra_headers={"anthropic-beta": "tools-2026"},
        )
        await there.openai(OPENAI).responses.create(model="gpt", input="hello", reasoning={"effort": "low"})
        first, second = there.provider.requests
    assert first.wire == "messages" and first.headers["anthropic-beta"] == "tools-2026"
    assert first.body == {"model": "claude", "max_tokens": 2000, "messages": HELLO, "thinking": thinking}
    assert second.wire == "responses" and second.body["reasoning"] == {"effort": "low"}
    assert second.body["max_output_tokens"] > 0, "a call has a bound, so that its worst price is known"


@EVERY
async def test_a_chat_is_streamed_with_its_tools_and_with_its_usage_where_it_is_asked_for(model: str):
    async with house(says(CALLED)) as there:
        client = there.openai(model).chat.completions
        asked: Any = {"model": model, "messages": HELLO, "tools": [CHAT_TOOL], "stream": True}
        parts = [part async for part in await client.create(stream_options={"include_usage": True}, **asked)]
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        calls = [call for part in parts if part.choices for call in part.choices[0].delta.tool_calls or ()]
        assert text == "Let me look." and calls[0].function and calls[0].function.name == "weather"
        written = "".join(call.function.arguments or "" for call in calls if call.function)
        assert "Oslo" in written
        assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "tool_calls"
        assert parts[-1].usage and parts[-1].usage.completion_tokens == 7 and not parts[-1].choices
        (call,) = await there.recorded()
        assert call.reply and call.reply["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == written
        again = [part async for part in await client.create(**asked)]
        assert not any(part.usage for part in again)


@EVERY
async def test_messages_are_streamed_with_their_tools(model: str):
    async with house(says(CALLED)) as there:
        asked: Any = {"model": model, "max_tokens": 90, "messages": HELLO, "tools": [MESSAGES_TOOL]}
        async with there.anthropic(model).messages.stream(**asked) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            whole = await stream.get_final_message()
        assert text == "Let me look." and whole.stop_reason == "tool_use"
        said, used = whole.content
        assert said.type == "text" and used.type == "tool_use"
        assert (used.id, used.name, used.input) == ("call_7", "weather", {"city": "Oslo"})
        assert (whole.usage.input_tokens, whole.usage.output_tokens) == (11, 7)
        (call,) = await there.recorded()
        assert (call.prompt_tokens, call.completion_tokens) == (11, 7)


@EVERY
async def test_a_response_is_streamed_with_its_tools(model: str):
    async with house(says(CALLED)) as there:
        asked: Any = {"model": model, "input": "hello", "tools": [RESPONSES_TOOL]}
        async with there.openai(model).responses.stream(**asked) as stream:
            events = [event async for event in stream]
            whole = await stream.get_final_response()
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Let me look."
        said, used = whole.output
        assert said.type == "message" and used.type == "function_call"
        assert (used.call_id, used.name) == ("call_7", "weather") and "Oslo" in used.arguments
        assert whole.usage and whole.usage.output_tokens == 7
        (call,) = await there.recorded()
        assert (call.prompt_tokens, call.completion_tokens) == (11, 7)


@EVERY
async def test_a_reply_that_was_cut_at_its_limit_says_so_on_every_wire(model: str):
    async with house(says(Reply("and then", finish="length"))) as there:
        chat = await there.openai(model).chat.completions.create(model=model, messages=HELLO)
        message = await there.anthropic(model).messages.create(model=model, max_tokens=9, messages=HELLO)
        response = await there.openai(model).responses.create(model=model, input="hello")
    assert chat.choices[0].finish_reason == "length" and message.stop_reason == "max_tokens"
    assert response.status == "incomplete" and response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"


async def replies(there: House, model: str, start: str) -> list[Any]:
    """The same conversation, plain and streamed, on all three wires."""
    chat, claude = there.openai(model, start=start), there.anthropic(model, start=start)
    asked: Any = {"model": model, "messages": HELLO, "tools": [CHAT_TOOL]}
    said: Any = {"model": model, "max_tokens": 90, "messages": HELLO, "tools": [MESSAGES_TOOL]}
    told: Any = {"model": model, "input": "hello", "tools": [RESPONSES_TOOL]}
    found: list[Any] = [(await chat.chat.completions.create(**asked)).to_dict()]
    found.append([part.to_dict() async for part in await chat.chat.completions.create(**asked, stream=True)])
    found.append((await claude.messages.create(**said)).to_dict())
    async with claude.messages.stream(**said) as messages:
        found.append((await messages.get_final_message()).to_dict())
    found.append((await chat.responses.create(**told)).to_dict())
    async with chat.responses.stream(**told) as responses:
        found.append((await responses.get_final_response()).to_dict())
    return found


@EVERY
async def test_started_again_the_gateway_gives_every_wire_its_recorded_reply_and_stream_and_asks_nobody(model: str):
    bus = MemoryBus()
    async with house(says(CALLED), bus) as there:
        first = await replies(there, model, "first")
        assert there.provider.count == len(await there.recorded()) == 6
    async with house(says(Fault("broken")), bus) as there:
        again = await replies(there, model, "second")
        assert there.provider.count == 0 and len(await there.recorded()) == 6
    assert again[0] == first[0] and again[2:] == first[2:]
    assert joined(again[1]) == joined(first[1])


def joined(parts: list[Any]) -> tuple[str, str, str]:
    """What a chat's stream says, whatever pieces it comes in."""
    deltas = [part["choices"][0]["delta"] for part in parts if part["choices"]]
    written = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls") or ()]
    finish = [part["choices"][0]["finish_reason"] for part in parts if part["choices"]][-1]
    return "".join(delta.get("content") or "" for delta in deltas), "".join(written), finish


async def test_a_call_recorded_whole_is_streamed_from_the_record_and_one_that_was_streamed_is_given_whole():
    bus = MemoryBus()
    async with house(says(Reply("one two three"))) as there:
        first = there.openai(COMPATIBLE, start="a").chat.completions
        whole = await first.create(model=COMPATIBLE, messages=HELLO)
        second = there.openai(COMPATIBLE, start="b").chat.completions
        parts = [part.to_dict() async for part in await second.create(model=COMPATIBLE, messages=HELLO, stream=True)]
        assert joined(parts) == (whole.choices[0].message.content, "", "stop") and there.provider.count == 1
    async with house(says(Reply("one two three")), bus) as there:
        first = there.anthropic(COMPATIBLE, start="a").messages
        async with first.stream(model=COMPATIBLE, max_tokens=9, messages=HELLO) as stream:
            streamed = await stream.get_final_message()
        second = there.anthropic(COMPATIBLE, start="b").messages
        plain = await second.create(model=COMPATIBLE, max_tokens=9, messages=HELLO)
        assert plain.to_dict() | {"stop_details": None} == streamed.to_dict() and there.provider.count == 1


async def lines(there: House, path: str, body: Any, **claims: Any) -> AsyncIterator[str]:
    async with there.http(COMPATIBLE, **claims) as client, client.stream("POST", path, json=body) as reply:
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
        async for line in reply.aiter_lines():
            if line:
                yield line


STREAMS = [
    ("/v1/chat/completions", {"messages": HELLO, "stream": True}, "[DONE]", "finish_reason"),
    ("/v1/messages", {"messages": HELLO, "stream": True, "max_tokens": 9}, "message_stop", "stop_reason"),
    ("/v1/responses", {"input": "hello", "stream": True}, "response.completed", "status"),
]


@pytest.mark.parametrize(("path", "body", "end", "_"), STREAMS)
async def test_the_first_word_is_handed_on_while_the_provider_still_speaks(path: str, body: Any, end: str, _: str):
    async with house(says(Reply("one two", held=True))) as there:
        seen: list[str] = []
        async with asyncio.timeout(20):
            reading = lines(there, path, body)
            while "one " not in (line := await anext(reading)):
                seen.append(line)
            assert not await there.recorded()
            there.provider.release()
            seen += [line async for line in reading]
        assert any("two" in line for line in seen) and end in seen[-1]
        assert len(await there.recorded()) == 1


class Slow(MemoryBus):
    """A bus whose disk waits until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = asyncio.Event(), asyncio.Event()

    async def trace(self, envelope: Any) -> None:
        self.reached.set()
        await self.go.wait()
        await super().trace(envelope)


@pytest.mark.parametrize(("path", "body", "end", "closing"), STREAMS)
async def test_how_a_stream_ended_is_told_when_it_is_on_disk_and_not_before(
    path: str, body: Any, end: str, closing: str
):
    bus, seen = Slow(), list[str]()
    async with house(says(Reply("one two")), bus) as there:

        async def read() -> None:
            async for line in lines(there, path, body):
                seen.append(line)

        async with asyncio.timeout(20):
            reading = asyncio.create_task(read())
            await bus.reached.wait()
            while not any("two" in line for line in seen):  # noqa: ASYNC110 - it comes over a socket
                await asyncio.sleep(0)
            assert not any(end in line or '"stop"' in line or "end_turn" in line for line in seen)
            assert not await there.recorded()
            bus.go.set()
            await reading
        assert end in seen[-1] and any(closing in line for line in seen)


@pytest.mark.parametrize("kind", ["cut", "dropped"])
@EVERY
async def test_a_provider_that_dies_in_mid_stream_is_an_error_in_the_wires_terms_and_recorded_as_one(
    model: str, kind: Any
):
    async with house(says(Fault(kind))) as there:
        with pytest.raises(openai.APIError) as failed:
            async for _ in await there.openai(model).chat.completions.create(model=model, messages=HELLO, stream=True):
                pass
        with pytest.raises(anthropic.APIError):
            async with there.anthropic(model).messages.stream(model=model, max_tokens=9, messages=HELLO) as stream:
                await stream.get_final_message()
        with pytest.raises(openai.APIError):
            async with there.openai(model).responses.stream(model=model, input="hello") as responses:
                await responses.get_final_response()
        calls = await there.recorded()
    assert len(calls) == 3 and all(call.reply is None and call.error and call.fault for call in calls)
    assert all(call.error and call.error[:20] in str(failed.value) for call in calls[:1])
    assert all(call.completion_tokens > 0 for call in calls), "what had come is paid for"


async def test_what_a_provider_says_is_read_to_its_end_and_recorded_when_the_caller_hangs_up():
    async with house(says(Reply("one two three", held=True))) as there:
        body = {"messages": HELLO, "stream": True}
        async with there.http(COMPATIBLE) as client, client.stream("POST", "/v1/chat/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if "one" in line:
                    break
        assert not await there.recorded()
        there.provider.release()
        async with asyncio.timeout(20):
            while not (calls := await there.recorded()):  # noqa: ASYNC110 - another task writes it
                await asyncio.sleep(0)
        assert calls[0].reply
        assert calls[0].reply["choices"][0]["message"]["content"] == "one two three"
        again = [line async for line in lines(there, "/v1/chat/completions", body, start="next")]
        assert there.provider.count == 1 and again[-1] == "data: [DONE]"


async def test_two_starts_that_ask_the_same_at_once_share_one_call():
    async with house(says(Reply("one two", held=True))) as there, asyncio.timeout(20):
        body = {"messages": HELLO, "stream": True}
        first, second = (lines(there, "/v1/chat/completions", body, start=start) for start in "ab")
        heads = [await anext(first), await anext(second)]
        there.provider.release()
        ends = [[line async for line in each][-1] for each in (first, second)]
        assert heads[0] == heads[1] and ends == ["data: [DONE]"] * 2 and there.provider.count == 1


async def test_the_clients_that_block_work_as_well():
    async with house(says(CALLED)) as there:

        def ask() -> tuple[str | None, str, str]:
            token = there.token(COMPATIBLE)
            chats = openai.OpenAI(base_url=f"{there.url}/v1", api_key=token, max_retries=0)
            claude = anthropic.Anthropic(base_url=there.url, api_key=token, max_retries=0)
            chat = chats.chat.completions.create(model=COMPATIBLE, messages=HELLO)
            with claude.messages.stream(model=COMPATIBLE, max_tokens=9, messages=HELLO) as stream:
                message = stream.get_final_text()
            response = chats.responses.create(model=COMPATIBLE, input="hello").output_text
            listed = [model.id for model in chats.models.list()] + [model.id for model in claude.models.list()]
            assert listed == [COMPATIBLE] * 2
            return chat.choices[0].message.content, message, response

        assert await asyncio.to_thread(ask) == ("Let me look.",) * 3


async def test_tokens_are_counted_without_asking_anybody():
    async with house() as there:
        told = await there.anthropic(ANTHROPIC).messages.count_tokens(model="claude", messages=HELLO)
        assert 5 < told.input_tokens < 100 and there.provider.count == 0 and not await there.recorded()


async def test_no_key_is_in_any_record_or_reply():
    async with house(says(Fault("unauthorised"))) as there:
        replies = []
        async with there.http(COMPATIBLE) as client:
            for path, body, _, _ in STREAMS:
                replies.append((await client.post(path, json=body)).text)
        recorded = str(await there.recorded())
        assert recorded.count("fault='no_key'") == 1, "said once, however often it is asked"
        for text in (*replies, recorded):
            assert KEY not in text and there.token(COMPATIBLE)[:40] not in text
