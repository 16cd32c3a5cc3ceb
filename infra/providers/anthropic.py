"""Anthropic's messages API, through the `anthropic` SDK."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anthropic
from anthropic import AsyncAnthropic, AsyncStream

from sia_events.infra.providers.account import Account, asked_model, unsupported
from sia_events.infra.providers.anthropic_wire import Chunks, reply, request
from sia_events.infra.providers.chat_parts import translating
from sia_events.infra.providers.connections import connections
from sia_events.infra.providers.failures import garbage
from sia_events.infra.providers.sampling import Sampling
from sia_events.infra.providers.sdk_failures import named
from sia_events.shared.ports import Chat, Choice, Text, Wire

MESSAGES = "/v1/messages"
WITHOUT_KEY = "none"


class AnthropicModels:
    """The `Models` port by translation, and `Native` for Anthropic's own wire.

    A forwarded body may have `betas`, names of beta features: they go where Anthropic reads them, in a header.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self.wires: frozenset[Wire] = frozenset({"anthropic"})
        self._sampling = Sampling()
        row = account.provider
        self._client = AsyncAnthropic(
            api_key=account.key or WITHOUT_KEY,
            base_url=row.base_url,
            timeout=row.timeout_s,
            max_retries=0,
            http_client=connections(account),
        )

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        body = self._body(call)
        async with self._account.slots:
            return reply(await self._sampling.fitted(body, self._post))

    async def stream(self, call: Chat) -> AsyncIterator[Mapping[str, Any]]:
        body = {**self._body(call), "stream": True}
        chunks = Chunks()
        async with self._account.slots:
            async for event in self._events(await self._sampling.fitted(body, self._open)):
                for chunk in chunks.of(event):
                    yield chunk

    async def choose(self, call: Choice) -> Mapping[str, Any]:
        raise unsupported(self._account, "takes no choice calls: it gives no log-probabilities of given words")

    async def logprobs(self, text: Text) -> tuple[float, ...]:
        raise unsupported(self._account, "gives no log-probabilities of given tokens")

    async def forward(self, wire: Wire, body: Mapping[str, Any]) -> Mapping[str, Any]:
        async with self._account.slots:
            return await self._post(body)

    async def forward_stream(self, wire: Wire, body: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
        async with self._account.slots:
            async for event in self._events(await self._open({**body, "stream": True})):
                yield event

    async def aclose(self) -> None:
        await self._client.close()

    async def _post(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        sent, headers = _with_betas(body)
        with named(self._account, anthropic):
            async with asyncio.timeout(self._account.provider.timeout_s):
                message = await self._client.post(MESSAGES, cast_to=object, body=sent, options={"headers": headers})
        if not isinstance(message, dict) or not isinstance(message.get("content"), list):
            raise garbage(self._account, f"no message: {message!r}")
        return message

    async def _open(self, body: Mapping[str, Any]) -> AsyncStream[object]:
        sent, headers = _with_betas(body)
        with named(self._account, anthropic):
            return await self._client.post(
                MESSAGES,
                cast_to=object,
                body=sent,
                options={"headers": headers},
                stream=True,
                stream_cls=AsyncStream[object],
            )

    async def _events(self, opened: AsyncStream[object]) -> AsyncIterator[Mapping[str, Any]]:
        """The events up to `message_stop`; a stream without it is garbage."""
        finished = False
        with named(self._account, anthropic):
            async with opened:
                async for event in opened:
                    if not isinstance(event, dict) or "type" not in event:
                        raise garbage(self._account, f"no event in the stream: {event!r}")
                    finished = event["type"] == "message_stop"
                    yield event
        if not finished:
            raise garbage(self._account, "the stream ended before its end")

    def _body(self, call: Chat) -> Mapping[str, Any]:
        model = asked_model(self._account, call)
        with translating(self._account):
            return request(call, model)


def _with_betas(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, str]]:
    betas = body.get("betas")
    sent = {name: value for name, value in body.items() if name != "betas"}
    return sent, {"anthropic-beta": ",".join(betas)} if betas else {}
