"""A model that answers at once and always the same: for benchmarks of everything around the model, and for dry runs."""

from collections.abc import AsyncIterator, Mapping
from math import log
from typing import Any

from sia_events.shared.chunks import chunks
from sia_events.shared.ports import Chat, Choice, Text


class InstantModels:
    """The `Models` port without a model: chat says "ok", a choice is the first, all are as likely, a text is sure."""

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        said = {
            "index": 0,
            "message": {"role": "assistant", "content": "ok"},
            "finish_reason": "stop",
            "token_ids": [0],
        }
        return {
            "object": "chat.completion",
            "model": call.model,
            "prompt_token_ids": [0],
            "choices": [{**said, "logprobs": {"content": [{"token": "ok", "logprob": 0.0}]}}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }

    async def stream(self, call: Chat) -> AsyncIterator[Mapping[str, Any]]:
        for chunk in chunks(await self.chat(call)):
            yield chunk

    async def choose(self, call: Choice) -> Mapping[str, Any]:
        n = len(call.choices)
        return {
            "choice": call.choices[0],
            "index": 0,
            "logprobs": [-log(n)] * n,
            "raw": [-log(n)] * n,
            "prompt_token_ids": [0],
            "choice_token_ids": [[i] for i in range(n)],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }

    async def logprobs(self, text: Text) -> tuple[float, ...]:
        return (0.0,) * len(text.completion)
