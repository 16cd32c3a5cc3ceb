"""The long tail of providers, through the `litellm` SDK: an extra, and never in the base install."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from importlib import import_module
from typing import Any

import openai

from sia_events.infra.providers.account import Account, asked_model, unsupported
from sia_events.infra.providers.failures import garbage
from sia_events.infra.providers.openai_wire import Ending, request, streamed
from sia_events.infra.providers.sampling import Sampling
from sia_events.infra.providers.sdk_failures import named
from sia_events.shared.ports import Chat, Choice, Text


class LiteLLMModels:
    """The `Models` port on litellm's names: `NAME/groq/llama-3` asks litellm for `groq/llama-3`.

    Without a `key_env` litellm reads the variables that it knows for each of its providers.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._sampling = Sampling()
        # Else its import fetches a table of prices from the network, which is not ours to ask.
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        self._sdk = import_module("litellm")
        self._sdk.telemetry = False
        self._sdk.suppress_debug_info = True

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        body = self._body(call)
        async with self._account.slots:
            reply = (await self._sampling.fitted(body, self._ask)).model_dump(mode="json")
        if not reply.get("choices"):
            raise garbage(self._account, "a completion without choices")
        return reply

    async def stream(self, call: Chat) -> AsyncIterator[Mapping[str, Any]]:
        ending, parts = Ending(), 0
        async with self._account.slots:
            opened = await self._sampling.fitted(streamed(self._body(call)), self._ask)
            with named(self._account, openai):
                async for part in opened:
                    passed = ending.passed(part.model_dump(mode="json", exclude_none=True))
                    if passed is not None:
                        parts += 1
                        yield passed
        # litellm makes an end up where a stream had nothing in it at all.
        if not ending.finished or parts < 2:
            raise garbage(self._account, "the stream ended before its end")
        yield ending.last()

    async def choose(self, call: Choice) -> Mapping[str, Any]:
        raise unsupported(self._account, "takes no choice calls: it gives no log-probabilities of given words")

    async def logprobs(self, text: Text) -> tuple[float, ...]:
        raise unsupported(self._account, "gives no log-probabilities of given tokens")

    async def aclose(self) -> None:
        """litellm keeps its connections to itself."""

    async def _ask(self, body: Mapping[str, Any]) -> Any:
        row = self._account.provider
        with named(self._account, openai):
            async with asyncio.timeout(row.timeout_s):
                return await self._sdk.acompletion(
                    **body,
                    api_key=self._account.key or None,
                    base_url=row.base_url,
                    timeout=row.timeout_s,
                    num_retries=0,
                    max_retries=0,
                )

    def _body(self, call: Chat) -> Mapping[str, Any]:
        return request(call, asked_model(self._account, call))
