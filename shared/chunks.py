"""A whole chat completion as a stream of chunks, for engines that have no stream of their own."""

from collections.abc import Iterator, Mapping
from typing import Any


def chunks(reply: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """OpenAI's chat.completion.chunk objects that add up to `reply`: the message, how it ended, and the usage.

    What an engine adds to its replies, token ids and log-probs say, comes with the last two.
    """
    head = {"id": reply.get("id", ""), "object": "chat.completion.chunk", "created": reply.get("created", 0)}
    head["model"] = reply.get("model", "")
    for choice in reply["choices"]:
        message = choice["message"]
        calls = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls") or ())]
        delta = {"role": "assistant", "content": message.get("content"), **({"tool_calls": calls} if calls else {})}
        yield {**head, "choices": [{"index": choice.get("index", 0), "delta": delta, "finish_reason": None}]}
        ended = {"index": choice.get("index", 0), "delta": {}, "finish_reason": choice.get("finish_reason", "stop")}
        more = {name: choice[name] for name in choice if name not in ("index", "message", "finish_reason")}
        yield {**head, "choices": [{**more, **ended}]}
    yield {**reply, **head, "choices": [], "usage": reply.get("usage", {})}
