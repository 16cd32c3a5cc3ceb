"""The wire formats of OpenAI, Anthropic and Google, as a provider speaks them: replies whole and as streams."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Wire = Literal["chat", "responses", "messages", "gemini"]


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = "call_1"


@dataclass(frozen=True)
class Reply:
    """What the model says. A stream hands out `text` word by word; a `held` one waits for `release` after the first.

    `refused`: the model declines, in the words of `text` where the wire has a place for them. `counted`: how many
    tokens it took is told.
    """

    text: str = "ok"
    tools: Sequence[ToolCall] = ()
    prompt_tokens: int = 11
    completion_tokens: int = 7
    cached_tokens: int = 0
    finish: Literal["stop", "length"] = "stop"
    held: bool = False
    refused: bool = False
    counted: bool = True


def whole(wire: Wire, body: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    """The reply's body when it is not streamed."""
    return {"chat": _chat, "responses": _response, "messages": _message, "gemini": _gemini}[wire](body, reply)


def events(wire: Wire, body: Mapping[str, Any], reply: Reply) -> Iterator[str]:
    """The reply as server-sent events."""
    streams = {
        "chat": _chat_events,
        "responses": _response_events,
        "messages": _message_events,
        "gemini": _gemini_events,
    }
    return streams[wire](body, reply)


def _data(event: Mapping[str, Any], name: str | None = None) -> str:
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(event)}\n\n"


def _words(text: str) -> list[str]:
    return [word + " " for word in text.split(" ")[:-1]] + [text.split(" ")[-1]]


def first_word(reply: Reply) -> str:
    """How the event that carries a stream's first word can be told."""
    return json.dumps(_words(reply.text)[0])[:-1]


# OpenAI chat completions: https://platform.openai.com/docs/api-reference/chat


def _chat_head(body: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": kind, "created": 1_700_000_000, "model": body["model"]}


def _chat_usage(reply: Reply) -> dict[str, Any] | None:
    if not reply.counted:
        return None
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": reply.cached_tokens},
    }


def _chat_tools(reply: Reply) -> list[dict[str, Any]]:
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}
        for call in reply.tools
    ]


def _chat_finish(reply: Reply) -> str:
    return "tool_calls" if reply.tools else reply.finish


def _chat(body: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    said = reply.text or None
    message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
    if reply.refused:
        message = {"role": "assistant", "content": None, "refusal": said}
    if reply.tools:
        message["tool_calls"] = _chat_tools(reply)
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _chat_finish(reply)}
    return {**_chat_head(body, "chat.completion"), "choices": [choice], "usage": _chat_usage(reply)}


def _chat_events(body: Mapping[str, Any], reply: Reply) -> Iterator[str]:
    head = _chat_head(body, "chat.completion.chunk")

    def chunk(delta: Mapping[str, Any], finish: str | None = None) -> str:
        return _data({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    yield chunk({"role": "assistant", "content": ""})
    for word in _words(reply.text) if reply.text else ():
        yield chunk({"refusal" if reply.refused else "content": word})
    for i, call in enumerate(_chat_tools(reply)):
        arguments = call["function"]["arguments"]
        started = {**call, "index": i, "function": {"name": call["function"]["name"], "arguments": ""}}
        yield chunk({"tool_calls": [started]})
        for part in (arguments[:3], arguments[3:]):
            yield chunk({"tool_calls": [{"index": i, "function": {"arguments": part}}]})
    yield chunk({}, _chat_finish(reply))
    if (body.get("stream_options") or {}).get("include_usage"):
        yield _data({**head, "choices": [], "usage": _chat_usage(reply)})
    yield "data: [DONE]\n\n"


# OpenAI responses: https://platform.openai.com/docs/api-reference/responses


def _response_items(reply: Reply) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if reply.text:
        content: list[dict[str, Any]] = [{"type": "output_text", "text": reply.text, "annotations": []}]
        if reply.refused:
            content = [{"type": "refusal", "refusal": reply.text}]
        said = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": content}
        items.append(said)
    for i, call in enumerate(reply.tools):
        named = {"call_id": call.id, "name": call.name, "arguments": json.dumps(call.arguments)}
        items.append({"type": "function_call", "id": f"fc_{i}", "status": "completed", **named})
    return items


def _response(body: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    cut = reply.finish == "length"
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1_700_000_000,
        "status": "incomplete" if cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": body.get("instructions"),
        "model": body["model"],
        "output": _response_items(reply),
        "parallel_tool_calls": True,
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": body.get("tools", []),
        "usage": {
            "input_tokens": reply.prompt_tokens,
            "input_tokens_details": {"cached_tokens": reply.cached_tokens},
            "output_tokens": reply.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        }
        if reply.counted
        else None,
    }


def _response_events(body: Mapping[str, Any], reply: Reply) -> Iterator[str]:
    done = _response(body, reply)
    number = iter(range(1_000_000))

    def event(kind: str, **values: Any) -> str:
        return _data({"type": kind, "sequence_number": next(number), **values}, kind)

    opened = {**done, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    yield event("response.created", response=opened)
    yield event("response.in_progress", response=opened)
    for i, item in enumerate(done["output"]):
        at = {"item_id": item["id"], "output_index": i}
        if item["type"] == "message":
            begun = {**item, "status": "in_progress", "content": []}
            yield event("response.output_item.added", output_index=i, item=begun)
            at["content_index"] = 0
            part = item["content"][0]
            kind, key = ("refusal", "refusal") if reply.refused else ("output_text", "text")
            yield event("response.content_part.added", **at, part={**part, key: ""})
            for word in _words(reply.text):
                yield event(f"response.{kind}.delta", **at, delta=word, logprobs=[])
            yield event(f"response.{kind}.done", **at, **{key: reply.text}, logprobs=[])
            yield event("response.content_part.done", **at, part=part)
        else:
            begun = {**item, "status": "in_progress", "arguments": ""}
            yield event("response.output_item.added", output_index=i, item=begun)
            for piece in (item["arguments"][:3], item["arguments"][3:]):
                yield event("response.function_call_arguments.delta", **at, delta=piece)
            named = {"name": item["name"], "arguments": item["arguments"]}
            yield event("response.function_call_arguments.done", **at, **named)
        yield event("response.output_item.done", output_index=i, item=item)
    yield event(f"response.{done['status']}", response=done)


# Anthropic messages: https://docs.anthropic.com/en/api/messages


def _message_stop(reply: Reply) -> str:
    if reply.refused:
        return "refusal"
    return "tool_use" if reply.tools else {"stop": "end_turn", "length": "max_tokens"}[reply.finish]


def _message(body: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": reply.text}] if reply.text else []
    content += [{"type": "tool_use", "id": c.id, "name": c.name, "input": dict(c.arguments)} for c in reply.tools]
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": content,
        "stop_reason": _message_stop(reply),
        "stop_sequence": None,
        "usage": {
            # Anthropic counts what came from its cache apart from the other input.
            "input_tokens": reply.prompt_tokens - reply.cached_tokens,
            "cache_read_input_tokens": reply.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": reply.completion_tokens,
        }
        if reply.counted
        else {},
    }


def _message_events(body: Mapping[str, Any], reply: Reply) -> Iterator[str]:
    done = _message(body, reply)

    def event(kind: str, **values: Any) -> str:
        return _data({"type": kind, **values}, kind)

    opened = {
        **done,
        "content": [],
        "stop_reason": None,
        "usage": done["usage"] and {**done["usage"], "output_tokens": 1},
    }
    yield event("message_start", message=opened)
    yield event("ping")
    for i, block in enumerate(done["content"]):
        if block["type"] == "text":
            yield event("content_block_start", index=i, content_block={"type": "text", "text": ""})
            for word in _words(reply.text):
                yield event("content_block_delta", index=i, delta={"type": "text_delta", "text": word})
        else:
            yield event("content_block_start", index=i, content_block={**block, "input": {}})
            arguments = json.dumps(block["input"])
            for part in (arguments[:3], arguments[3:]):
                yield event("content_block_delta", index=i, delta={"type": "input_json_delta", "partial_json": part})
        yield event("content_block_stop", index=i)
    ended = {"stop_reason": done["stop_reason"], "stop_sequence": None}
    yield event("message_delta", delta=ended, usage={"output_tokens": reply.completion_tokens} if reply.counted else {})
    yield event("message_stop")


# Google generateContent: https://ai.google.dev/api/generate-content


def _gemini_chunk(parts: Sequence[Mapping[str, Any]], finish: str | None, reply: Reply) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": list(parts)}, "index": 0}
    if finish:
        candidate["finishReason"] = finish
    usage = {
        "promptTokenCount": reply.prompt_tokens,
        "candidatesTokenCount": reply.completion_tokens,
        "totalTokenCount": reply.prompt_tokens + reply.completion_tokens,
        "cachedContentTokenCount": reply.cached_tokens,
    }
    return {
        "candidates": [candidate],
        "usageMetadata": usage if reply.counted else None,
        "modelVersion": "scripted",
        "responseId": "gemini-1",
    }


def _gemini_tools(reply: Reply) -> list[dict[str, Any]]:
    return [{"functionCall": {"id": c.id, "name": c.name, "args": dict(c.arguments)}} for c in reply.tools]


def _gemini_finish(reply: Reply) -> str:
    return "SAFETY" if reply.refused else {"stop": "STOP", "length": "MAX_TOKENS"}[reply.finish]


def _gemini(body: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    said: list[dict[str, Any]] = [{"text": reply.text}] if reply.text and not reply.refused else []
    return _gemini_chunk(said + _gemini_tools(reply), _gemini_finish(reply), reply)


def _gemini_events(body: Mapping[str, Any], reply: Reply) -> Iterator[str]:
    for word in _words(reply.text) if reply.text and not reply.refused else ():
        yield _data(_gemini_chunk([{"text": word}], None, reply))
    yield _data(_gemini_chunk(_gemini_tools(reply), _gemini_finish(reply), reply))


def last_text(wire: Wire, body: Mapping[str, Any]) -> str:
    """What the last message of the request says, whatever its wire; "" where it has no text."""
    said: Any
    if wire == "gemini":
        said = body["contents"][-1]["parts"]
    elif wire == "responses":
        said = body["input"] if isinstance(body["input"], str) else body["input"][-1].get("content", "")
    else:
        said = body["messages"][-1].get("content") or ""
    return said if isinstance(said, str) else "".join(part.get("text", "") for part in said)
