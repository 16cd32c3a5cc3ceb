"""Anthropic's replies: a message, the events of its stream, and how each is made of the other and of a completion."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from sia_events.model_gateway import completion
from sia_events.model_gateway.wire import Ask, Body, named_frame
from sia_events.shared.ports import ModelFailed

CLOSING = frozenset({"message_delta", "message_stop"})
STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}


def message(ask: Ask, reply: Body) -> Body:
    """A chat.completion as a message."""
    text, calls, finish = completion.message_of(reply)
    content: list[Body] = [{"type": "text", "text": text}] if text else []
    for call in calls:
        function = call["function"]
        content.append({**_tool_use(call["id"], function["name"]), "input": _input(function["arguments"])})
    return {
        **_opened(ask),
        "content": content,
        "stop_reason": STOP_REASONS.get(finish, "end_turn"),
        "usage": _usage(completion.usage(reply)),
    }


def usage(reply: Body) -> Body:
    """OpenAI's usage of a message, whose own input tokens leave out what the cache had and what it took in."""
    told = reply.get("usage") or {}
    cached = told.get("cache_read_input_tokens") or 0
    written = told.get("cache_creation_input_tokens") or 0
    prompt = (told.get("input_tokens") or 0) + cached + written
    return completion.usage_of(prompt, told.get("output_tokens") or 0, cached, written)


def events(reply: Body) -> Iterator[Body]:
    """The stream of a message that is there as a whole."""
    yield {"type": "message_start", "message": {**reply, "content": [], "stop_reason": None, "stop_sequence": None}}
    for index, block in enumerate(reply["content"]):
        opened, delta = dict(block), None
        if block["type"] == "text":
            opened, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
        elif block["type"] == "tool_use":
            written = msgspec.json.encode(block["input"]).decode()
            opened, delta = {**block, "input": {}}, {"type": "input_json_delta", "partial_json": written}
        yield {"type": "content_block_start", "index": index, "content_block": opened}
        if delta:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    ended = {name: reply.get(name) for name in ("stop_reason", "stop_sequence")}
    yield {"type": "message_delta", "delta": ended, "usage": reply["usage"]}
    yield {"type": "message_stop"}


def gather(parts: Sequence[Body]) -> Body:
    """The message that a stream's events add up to. Raises ModelFailed when the stream broke off."""
    reply: dict[str, Any] = {}
    blocks: dict[int, dict[str, Any]] = {}
    written: dict[int, str] = {}
    for part in parts:
        match part.get("type"):
            case "message_start":
                reply = dict(part["message"])
            case "content_block_start":
                blocks[part["index"]] = dict(part["content_block"])
            case "content_block_delta":
                block, delta = blocks[part["index"]], part["delta"]
                if name := DELTAS.get(delta["type"]):
                    block[name] = (block.get(name) or "") + delta[name]
                elif delta["type"] == "input_json_delta":
                    written[part["index"]] = written.get(part["index"], "") + delta["partial_json"]
                elif delta["type"] == "citations_delta":
                    block["citations"] = [*(block.get("citations") or ()), delta["citation"]]
            case "message_delta":
                told = {name: value for name, value in (part.get("usage") or {}).items() if value is not None}
                reply |= {**part["delta"], "usage": {**(reply.get("usage") or {}), **told}}
            case "error":
                raise ModelFailed(502, f"the provider ended its stream with an error: {part.get('error')}")
    if not parts or parts[-1].get("type") != "message_stop":
        raise ModelFailed(502, f"the provider's stream broke off after {len(parts)} events", "garbage")
    for index, arguments in written.items():
        blocks[index]["input"] = _input(arguments)
    return {**reply, "content": [blocks[index] for index in sorted(blocks)]}


class MessageEncoder:
    """Chunks of a chat completion as the events of a message, each as soon as its chunk is there."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._tools: dict[int, int] = {}  # the provider's numbers of tool calls, as indices of blocks
        self._blocks = 0
        self._open: int | None = None
        self._text = False
        self._begun = False

    def feed(self, part: Body) -> Iterable[bytes]:
        return [named_frame(event) for event in self._events(part)]

    def close(self, reply: Body) -> Iterable[bytes]:
        whole = message(self._ask, reply)
        ended = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
        return [
            named_frame(event)
            for event in (
                *self._begin(),
                *self._stop(),
                {"type": "message_delta", "delta": ended, "usage": whole["usage"]},
                {"type": "message_stop"},
            )
        ]

    def _events(self, part: Body) -> Iterator[Body]:
        yield from self._begin()
        for choice in part.get("choices") or ():
            delta = choice.get("delta") or {}
            if text := delta.get("content") or delta.get("refusal"):
                if not self._text:
                    yield from self._start({"type": "text", "text": ""})
                    self._text = True
                yield self._delta(self._blocks - 1, {"type": "text_delta", "text": text})
            for call in delta.get("tool_calls") or ():
                function, number = call.get("function") or {}, call.get("index", 0)
                if number not in self._tools:
                    yield from self._start(_tool_use(call.get("id") or "", function.get("name") or "") | {"input": {}})
                    self._tools[number] = self._blocks - 1
                if arguments := function.get("arguments"):
                    yield self._delta(self._tools[number], {"type": "input_json_delta", "partial_json": arguments})

    def _begin(self) -> Iterator[Body]:
        if not self._begun:
            self._begun = True
            yield {"type": "message_start", "message": _opened(self._ask)}

    def _start(self, block: Body) -> Iterator[Body]:
        yield from self._stop()
        self._open, self._text = self._blocks, False
        self._blocks += 1
        yield {"type": "content_block_start", "index": self._open, "content_block": block}

    def _stop(self) -> Iterator[Body]:
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._open}
        self._open = None

    @staticmethod
    def _delta(index: int, delta: Body) -> Body:
        return {"type": "content_block_delta", "index": index, "delta": delta}


def _opened(ask: Ask) -> dict[str, Any]:
    """A message at its beginning; what the prompt was worth is only known at its end."""
    nothing = {"input_tokens": 0, "output_tokens": 0}
    head = {"id": f"msg_{ask.call.replace('-', '')}", "type": "message", "role": "assistant", "model": ask.model}
    return {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": nothing}


def _usage(told: Body) -> Body:
    cached = completion.cached(told)
    prompt = (told.get("prompt_tokens") or 0) - cached
    written = told.get("completion_tokens") or 0
    return {"input_tokens": prompt, "cache_read_input_tokens": cached, "output_tokens": written}


def _tool_use(id: str, name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name}


def _input(arguments: str) -> Any:
    """A tool's input, an object on this wire; what the model wrote instead of one is shown under `unparsable`."""
    try:
        found = msgspec.json.decode(arguments or "{}")
    except msgspec.DecodeError:
        found = None
    return found if isinstance(found, dict) else {"unparsable": arguments}
