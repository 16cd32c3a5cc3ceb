"""OpenAI's chat completions in the words of Anthropic's messages, and back: pure translation."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sia_events.infra.providers.chat_parts import Untranslatable, arguments_of, function_of, text_of
from sia_events.shared.ports import Chat

FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


def request(call: Chat, model: str) -> dict[str, Any]:
    """The body of POST /v1/messages. Raises Untranslatable. Anthropic takes no seed: it is left out."""
    system, messages = _messages(call.messages)
    body: dict[str, Any] = {"model": model, "max_tokens": call.max_tokens, "messages": messages}
    if system:
        body["system"] = system
    if call.temperature is not None:
        # OpenAI's scale goes to 2, Anthropic's to 1.
        body["temperature"] = min(call.temperature, 1.0)
    if call.top_p is not None and call.top_p != 1:
        body["top_p"] = call.top_p
    if call.stop:
        body["stop_sequences"] = list(call.stop)
    if call.tools:
        body["tools"] = [_tool(tool) for tool in call.tools]
    if call.tool_choice is not None and call.tools:
        body["tool_choice"] = _tool_choice(call.tool_choice)
    if call.response_format is not None and call.response_format.get("type") != "text":
        body["output_config"] = {"format": _format(call.response_format)}
    return body


def _messages(asked: Any) -> tuple[str, list[dict[str, Any]]]:
    system: list[str] = []
    messages: list[dict[str, Any]] = []
    for message in asked:
        role = message.get("role")
        if role in ("system", "developer"):
            system.append(text_of(message.get("content")))
            continue
        if role == "tool":
            result = {"type": "tool_result", "tool_use_id": message.get("tool_call_id", "")}
            blocks = [{**result, "content": text_of(message.get("content"))}]
        elif role in ("user", "assistant"):
            blocks = _blocks(message)
        else:
            raise Untranslatable(f"a message of the role {role!r}")
        speaker = "assistant" if role == "assistant" else "user"
        # The results of calls made side by side have to stand in one message.
        if messages and messages[-1]["role"] == speaker:
            messages[-1]["content"] += blocks
        elif blocks:
            messages.append({"role": speaker, "content": blocks})
    return "\n\n".join(system), messages


def _blocks(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    said = text_of(message.get("content")) or message.get("refusal") or ""
    blocks: list[dict[str, Any]] = [{"type": "text", "text": said}] if said else []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        used = {"type": "tool_use", "id": call["id"], "name": function["name"]}
        blocks.append({**used, "input": arguments_of(function)})
    return blocks


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = function_of(tool)
    known = {"name": function["name"], "input_schema": function.get("parameters") or {"type": "object"}}
    if description := function.get("description"):
        known["description"] = description
    return known


def _tool_choice(choice: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(choice, str):
        return {"type": {"required": "any"}.get(choice, choice)}
    return {"type": "tool", "name": function_of(choice)["name"]}


def _format(wanted: Mapping[str, Any]) -> dict[str, Any]:
    if wanted.get("type") != "json_schema":
        raise Untranslatable(f"the response format {wanted.get('type')!r}: use json_schema")
    return {"type": "json_schema", "schema": wanted["json_schema"]["schema"]}


def usage_of(usage: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's usage. Anthropic counts what is read from and written to its cache beside the other input."""
    read, written = usage.get("cache_read_input_tokens") or 0, usage.get("cache_creation_input_tokens") or 0
    prompt = (usage.get("input_tokens") or 0) + read + written
    completion = usage.get("output_tokens") or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
    }


def reply(message: Mapping[str, Any]) -> dict[str, Any]:
    """A chat.completion object. The model's thinking is left out."""
    blocks = message["content"]
    said = "".join(block["text"] for block in blocks if block["type"] == "text")
    finish = FINISH.get(message.get("stop_reason") or "", "stop")
    answer: dict[str, Any] = {"role": "assistant", "content": said or None, "refusal": None}
    if finish == "content_filter":
        answer.update(content=None, refusal=said or "the model declined")
    if calls := [_call(block["id"], block["name"], json.dumps(block["input"])) for block in _uses(blocks)]:
        answer["tool_calls"] = calls
    return {
        "id": message.get("id", ""),
        "object": "chat.completion",
        "created": 0,
        "model": message.get("model", ""),
        "choices": [{"index": 0, "message": answer, "finish_reason": finish, "logprobs": None}],
        "usage": usage_of(message.get("usage") or {}),
    }


def _uses(blocks: Any) -> Iterator[Mapping[str, Any]]:
    return (block for block in blocks if block["type"] == "tool_use")


def _call(name: str, function: str, arguments: str) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}


class Chunks:
    """Anthropic's stream events as OpenAI's chunks."""

    def __init__(self) -> None:
        self._head: dict[str, Any] = {"id": "", "object": "chat.completion.chunk", "created": 0, "model": ""}
        self._usage: dict[str, Any] = {}
        self._calls: dict[int, int] = {}

    def of(self, event: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """The chunks that an event stands for, none for most."""
        match event["type"]:
            case "message_start":
                message = event["message"]
                self._head.update(id=message.get("id", ""), model=message.get("model", ""))
                self._usage.update(message.get("usage") or {})
                yield self._chunk({"role": "assistant", "content": ""})
            case "content_block_start" if event["content_block"]["type"] == "tool_use":
                block = event["content_block"]
                number = self._calls[event["index"]] = len(self._calls)
                yield self._chunk({"tool_calls": [{"index": number, **_call(block["id"], block["name"], "")}]})
            case "content_block_delta" if event["delta"]["type"] == "text_delta":
                yield self._chunk({"content": event["delta"]["text"]})
            case "content_block_delta" if event["delta"]["type"] == "input_json_delta":
                part = {"arguments": event["delta"]["partial_json"]}
                yield self._chunk({"tool_calls": [{"index": self._calls[event["index"]], "function": part}]})
            case "message_delta":
                self._usage.update({k: v for k, v in (event.get("usage") or {}).items() if v is not None})
                finish = FINISH.get(event["delta"].get("stop_reason") or "", "stop")
                if finish == "content_filter":
                    yield self._chunk({"refusal": "the model declined"})
                yield self._chunk({}, finish)
            case "message_stop":
                yield {**self._head, "choices": [], "usage": usage_of(self._usage)}

    def _chunk(self, delta: Mapping[str, Any], finish: str | None = None) -> Mapping[str, Any]:
        return {**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
