"""OpenAI's chat completion, the shape that replies have inside: put together from chunks, and its usage."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sia_events.model_gateway.wire import Body
from sia_events.shared.ports import ModelFailed

T = TypeVar("T")


def is_completion(reply: Body) -> bool:
    return "choices" in reply


def is_own(reply: Body) -> bool:
    """Whether a reply has its wire's own shape, from a native provider."""
    return not is_completion(reply)


def by_shape(ours: Callable[[Body], T], own: Callable[[Body], T]) -> Callable[[Body], T]:
    """What reads a reply of either shape: `ours` a completion, `own` the wire's."""
    return lambda reply: ours(reply) if is_completion(reply) else own(reply)


def gather(parts: Sequence[Body]) -> Body:
    """The chat.completion that the chunks of one stream add up to. Raises ModelFailed when the stream broke off."""
    reply: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for part in parts:
        told = {name: value for name, value in part.items() if value is not None}
        reply |= {**told, "object": "chat.completion"}
        for choice in part.get("choices") or ():
            _extend(choices.setdefault(choice.get("index", 0), _opened(choice)), choice)
    if not choices or any(choice["finish_reason"] is None for choice in choices.values()):
        raise ModelFailed(502, f"the provider's stream broke off after {len(parts)} parts", "garbage")
    for choice in choices.values():
        if calls := choice["message"].get("tool_calls"):
            choice["message"]["tool_calls"] = [calls[index] for index in sorted(calls)]
    return {**reply, "choices": [choices[index] for index in sorted(choices)]}


def usage(reply: Body) -> Body:
    told = reply.get("usage")
    return told if isinstance(told, dict) else {}


def usage_of(prompt: int, completion: int, cached: int = 0, cache_write: int = 0) -> Body:
    """OpenAI's usage object; of the prompt's tokens `cached` were read from the provider's cache, and some written."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": cache_write},
    }


def cached(usage: Body) -> int:
    return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def message_of(reply: Body) -> tuple[str | None, Sequence[Mapping[str, Any]], str]:
    """The text of a reply's one choice, or the refusal in its place; its tool calls; its finish reason."""
    choice = reply["choices"][0]
    message = choice["message"]
    said = message.get("content") or message.get("refusal")
    return said, message.get("tool_calls") or (), choice.get("finish_reason") or "stop"


def _opened(choice: Body) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": None}
    return {"index": choice.get("index", 0), "message": message, "finish_reason": None}


def _extend(whole: dict[str, Any], part: Body) -> None:
    message = whole["message"]
    for name, value in (part.get("delta") or {}).items():
        if name == "tool_calls":
            for call in value or ():
                calls = message.setdefault("tool_calls", {})
                _extend_call(calls.setdefault(call.get("index", 0), {"id": "", "type": "function"}), call)
        elif name != "role" and isinstance(value, str):
            message[name] = (message.get(name) or "") + value
    for name, value in part.items():
        if name == "logprobs" and value:
            kept = whole.setdefault("logprobs", {"content": []})
            kept["content"] = [*(kept["content"] or ()), *(value.get("content") or ())]
        elif name == "token_ids" and value:
            whole["token_ids"] = [*whole.get("token_ids", ()), *value]
        elif name == "finish_reason" and value:
            whole["finish_reason"] = value


def _extend_call(whole: dict[str, Any], part: Body) -> None:
    """Id and name come once, arguments in pieces."""
    function = whole.setdefault("function", {"name": "", "arguments": ""})
    whole["id"] = part.get("id") or whole["id"]
    told = part.get("function") or {}
    function["name"] = told.get("name") or function["name"]
    function["arguments"] += told.get("arguments") or ""
