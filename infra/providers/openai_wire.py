"""OpenAI's chat completions as they go out, and the end of their streams: pure, for every SDK that speaks them."""

from collections.abc import Mapping
from typing import Any

from sia_events.shared.ports import Chat


def request(call: Chat, model: str, limit: str = "max_tokens") -> dict[str, Any]:
    """The body of POST /chat/completions; `limit` is the endpoint's name for the limit of tokens."""
    optional = {
        "temperature": call.temperature,
        # 1 is what everyone takes for granted, and some refuse it beside a temperature.
        "top_p": None if call.top_p == 1 else call.top_p,
        "stop": list(call.stop) or None,
        "tools": list(call.tools) or None,
        "tool_choice": call.tool_choice,
        "response_format": call.response_format,
    }
    return {
        "model": model,
        "messages": list(call.messages),
        limit: call.max_tokens,
        "seed": call.seed,
        **{name: value for name, value in optional.items() if value is not None},
    }


def streamed(body: Mapping[str, Any]) -> dict[str, Any]:
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


class Ending:
    """What a stream has to end with. Some endpoints send the usage with the last choice, some behind it, some never:
    ours always comes last and alone."""

    def __init__(self) -> None:
        self.finished = False
        self._head: dict[str, Any] = {"object": "chat.completion.chunk"}
        self._usage: Mapping[str, Any] = {}

    def passed(self, chunk: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The chunk without its usage; None where nothing else is in it."""
        self._usage = chunk.get("usage") or self._usage
        self._head.update({name: chunk[name] for name in ("id", "created", "model") if name in chunk})
        choices = chunk.get("choices")
        if not choices:
            return None
        self.finished = self.finished or any(choice.get("finish_reason") for choice in choices)
        return {name: value for name, value in chunk.items() if name != "usage"}

    def last(self) -> Mapping[str, Any]:
        return {**self._head, "choices": [], "usage": self._usage}
