"""OpenAI's API and every endpoint compatible with it, through the `openai` SDK."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx2
import msgspec
import openai
from openai import AsyncOpenAI, AsyncStream, Omit, RequestOptions

from sia_events.infra.providers.account import Account, asked_model, unsupported
from sia_events.infra.providers.connections import connections
from sia_events.infra.providers.failures import answered, garbage
from sia_events.infra.providers.openai_wire import Ending, request, streamed
from sia_events.infra.providers.sampling import Sampling
from sia_events.infra.providers.sdk_failures import named
from sia_events.shared.ports import Chat, Choice, Text, Wire

CHAT, RESPONSES = "/chat/completions", "/responses"
ENDS = ("response.completed", "response.incomplete", "response.failed")
WITHOUT_KEY = "none"
# What the SDK would tell of itself and this machine; each header of a request costs the gateway CPU.
UNTOLD = ["Lang", "Package-Version", "OS", "Arch", "Runtime", "Runtime-Version", "Async", "Retry-Count", "Read-Timeout"]
OPTIONS: RequestOptions = {
    # Without it the SDK may send an administrator's key from the environment along.
    "security": {"bearer_auth": True},
    "headers": {f"X-Stainless-{name}": Omit() for name in UNTOLD},
}


class OpenAIModels:
    """The `Models` port, and `Native` for OpenAI's responses where the endpoint has them.

    Requests go out as they are written here and replies come back as the bytes were: the SDK does authentication,
    connections and server-sent events, its typed models would drop what they do not know. `more` is what an endpoint is
    sent beside OpenAI's own fields.
    """

    def __init__(self, account: Account, more: Callable[[Chat], Mapping[str, Any]] = lambda call: {}) -> None:
        self._account = account
        self._more = more
        row = account.provider
        own = urlsplit(row.base_url or "").hostname == "api.openai.com"
        responses = own if row.responses is None else row.responses
        self.wires: frozenset[Wire] = frozenset({"responses"}) if responses else frozenset()
        # OpenAI's newer models refuse `max_tokens`; most compatible endpoints know nothing else.
        self._limit = "max_completion_tokens" if own else "max_tokens"
        self._sampling = Sampling()
        self._client = AsyncOpenAI(
            api_key=account.key or WITHOUT_KEY,
            base_url=row.base_url,
            timeout=row.timeout_s,
            max_retries=0,
            http_client=connections(account),
        )
        # Whole addresses: the SDK would put them together anew for every call.
        self._root = str(self._client.base_url).rstrip("/")

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        body = self._body(call)
        async with self._account.slots:
            reply = await self._sampling.fitted(body, lambda sent: self._post(CHAT, sent))
        if not reply.get("choices"):
            raise garbage(self._account, "a completion without choices")
        return reply

    async def stream(self, call: Chat) -> AsyncIterator[Mapping[str, Any]]:
        ending = Ending()
        async with self._account.slots:
            opened = await self._sampling.fitted(streamed(self._body(call)), lambda sent: self._open(CHAT, sent))
            async for chunk in self._events(opened):
                if (passed := ending.passed(chunk)) is not None:
                    yield passed
        if not ending.finished:
            raise garbage(self._account, "the stream ended before its end")
        yield ending.last()

    async def choose(self, call: Choice) -> Mapping[str, Any]:
        raise unsupported(self._account, "takes no choice calls: it gives no log-probabilities of given words")

    async def logprobs(self, text: Text) -> tuple[float, ...]:
        raise unsupported(self._account, "gives no log-probabilities of given tokens")

    async def forward(self, wire: Wire, body: Mapping[str, Any]) -> Mapping[str, Any]:
        async with self._account.slots:
            reply = await self._post(RESPONSES, body)
        if reply.get("object") != "response":
            raise garbage(self._account, "no response object")
        return reply

    async def forward_stream(self, wire: Wire, body: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
        finished = False
        async with self._account.slots:
            async for event in self._events(await self._open(RESPONSES, {**body, "stream": True})):
                if event.get("type") == "error":
                    raise answered(self._account, 500, str(event.get("message") or event), {})
                finished = finished or event.get("type") in ENDS
                yield event
        if not finished:
            raise garbage(self._account, "the stream ended before its end")

    async def aclose(self) -> None:
        await self._client.close()

    async def _post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        with named(self._account, openai):
            async with asyncio.timeout(self._account.provider.timeout_s):
                sent = msgspec.json.encode(body)
                came = await self._client.post(
                    self._root + path, cast_to=httpx2.Response, content=sent, options=OPTIONS
                )
                reply = msgspec.json.decode(came.content)
        if not isinstance(reply, dict):
            raise garbage(self._account, f"no JSON object: {reply!r}")
        if error := reply.get("error"):
            # Some report a failure of the model behind them with status 200.
            status = error.get("code") if isinstance(error, dict) else None
            said = error.get("message") if isinstance(error, dict) else error
            raise answered(self._account, status if isinstance(status, int) and status >= 400 else 500, str(said), {})
        return reply

    async def _open(self, path: str, body: Mapping[str, Any]) -> AsyncStream[object]:
        with named(self._account, openai):
            return await self._client.post(
                self._root + path,
                cast_to=object,
                content=msgspec.json.encode(body),
                options=OPTIONS,
                stream=True,
                stream_cls=AsyncStream[object],
            )

    async def _events(self, opened: AsyncStream[object]) -> AsyncIterator[Mapping[str, Any]]:
        with named(self._account, openai):
            async with opened:
                async for event in opened:
                    if not isinstance(event, dict):
                        raise garbage(self._account, f"no JSON object in the stream: {event!r}")
                    yield event

    def _body(self, call: Chat) -> Mapping[str, Any]:
        return {**request(call, asked_model(self._account, call), self._limit), **self._more(call)}
