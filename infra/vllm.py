"""vLLM as a `Models` port: its OpenAI-compatible API, choices by the likelihood of each, adapters loaded at run time.

The server is started with --enable-lora, --max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, on loopback or behind
a wall: the routes that load adapters ask nobody for a key. It reads adapters from the folder that we lay them down in.
"""

from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from sia_events.infra import scoring
from sia_events.infra.adapters import Adapters
from sia_events.infra.drawing import draw
from sia_events.infra.engine_http import EngineHttp
from sia_events.infra.providers.account import Account
from sia_events.infra.providers.openai import OpenAIModels
from sia_events.shared.ports import Blobs, Chat, Choice, Text
from sia_events.shared.providers import split_model

KEPT_ADAPTERS = 8
KEPT_WORDS = 4096


class VllmModels:
    """`account` is a row of kind vllm. Adapters lie under its `adapters`, or under `folder`, one folder a row."""

    def __init__(self, account: Account, blobs: Blobs, folder: Path) -> None:
        row = account.provider
        self._account = account
        self._chat = OpenAIModels(account, more=_more)
        root = (row.base_url or "").rstrip("/").removesuffix("/v1")
        self._http = EngineHttp(account.name, root, row.timeout_s, account.key)
        place = Path(row.adapters) if row.adapters else folder / account.name
        self._adapters = Adapters(self._http.ask, blobs, place, KEPT_ADAPTERS)
        self._words: OrderedDict[tuple[str, str], tuple[int, ...]] = OrderedDict()

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        return await self._adapters.served(call.adapter, lambda: self._chat.chat(_named(call)))

    async def stream(self, call: Chat) -> AsyncIterator[Mapping[str, Any]]:
        async def begun() -> tuple[Mapping[str, Any], AsyncIterator[Mapping[str, Any]]]:
            parts = self._chat.stream(_named(call))
            return await anext(parts), parts

        first, parts = await self._adapters.served(call.adapter, begun)
        async with aclosing(parts):
            yield first
            async for part in parts:
                yield part

    async def choose(self, call: Choice) -> Mapping[str, Any]:
        """The choice is drawn here, from the very distribution that is returned: softmax((log-prob + bias) / T).

        vLLM's own structured output draws token by token among what the grammar allows: that is another distribution
        as soon as a choice has two tokens, and its log-probs are those from before the grammar.
        """
        prompt = await self._prompt(call)
        choices = [await self._word(call.model, choice) for choice in call.choices]
        scored = await self._scores(call, prompt, choices)
        raw = [sum(tokens) for tokens in scored]
        index, logprobs = draw(raw, call.bias, call.temperature, call.seed)
        completion = len(choices[index])
        return {
            "object": "choice",
            "model": call.model,
            "choice": call.choices[index],
            "index": index,
            "logprobs": logprobs,
            "raw": raw,
            "prompt_token_ids": prompt,
            "choice_token_ids": choices,
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": completion,
                "total_tokens": len(prompt) + completion,
            },
        }

    async def logprobs(self, text: Text) -> tuple[float, ...]:
        (scores,) = await self._scores(text, text.prompt, [text.completion])
        return scores

    async def aclose(self) -> None:
        await self._adapters.aclose()
        await self._chat.aclose()
        await self._http.aclose()

    async def _scores(
        self, call: Choice | Text, prompt: Sequence[int], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        async def asked(body: Mapping[str, Any]) -> Mapping[str, Any]:
            async with self._account.slots:
                return await self._adapters.served(call.adapter, lambda: self._http.ask(scoring.PATH, body))

        return await scoring.scores(asked, call.adapter or split_model(call.model)[1], prompt, completions)

    async def _prompt(self, call: Choice) -> Sequence[int]:
        """Token ids of the conversation as the model reads it: an adapter changes nothing of that."""
        body = {"model": split_model(call.model)[1], "messages": list(call.messages), **_continued(call.messages)}
        return (await self._http.ask("/tokenize", body))["tokens"]

    async def _word(self, model: str, text: str) -> tuple[int, ...]:
        key = split_model(model)[1], text
        if key not in self._words:
            body = {"model": key[0], "prompt": text, "add_special_tokens": False}
            self._words[key] = tuple((await self._http.ask("/tokenize", body))["tokens"])
            while len(self._words) > KEPT_WORDS:
                self._words.popitem(last=False)
        return self._words[key]


def _named(call: Chat) -> Chat:
    """The call under the engine's name for its weights: an adapter is a model of its own there."""
    if call.adapter is None:
        return call
    return replace(call, model=f"{split_model(call.model)[0]}/{call.adapter}", adapter=None)


def _more(call: Chat) -> Mapping[str, Any]:
    # What is not said is taken from the model folder; a top_p of 1 goes without saying everywhere else.
    top_p = {} if call.top_p is None else {"top_p": call.top_p}
    return {"logprobs": True, "return_token_ids": True, **top_p, **scoring.PLAIN, **_continued(call.messages)}


def _continued(messages: Sequence[Mapping[str, Any]]) -> Mapping[str, bool]:
    """A last message by the assistant is gone on with; vLLM would begin a new one."""
    opened = bool(messages) and messages[-1].get("role") == "assistant"
    return {"add_generation_prompt": not opened, "continue_final_message": opened}
