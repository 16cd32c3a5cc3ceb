"""Google's Gemini API, through the `google-genai` SDK."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any, cast

import httpx2
from google import genai
from google.genai import errors
from google.genai.types import Content, GenerateContentConfig, GenerateContentResponse, HttpOptions
from pydantic import TypeAdapter, ValidationError

from sia_events.infra.providers.account import Account, asked_model, unsupported
from sia_events.infra.providers.chat_parts import Untranslatable, translating
from sia_events.infra.providers.connections import connections
from sia_events.infra.providers.failures import answered, garbage, timed_out, unreachable
from sia_events.infra.providers.google_wire import Chunks, config, contents, reply
from sia_events.infra.providers.sampling import Sampling
from sia_events.shared.ports import Chat, Choice, Text

WITHOUT_KEY = "none"


class GoogleModels:
    """The `Models` port by translation."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._sampling = Sampling()
        row = account.provider
        # Handed in, so that it is this client and not whichever other happens to be installed.
        self._http = connections(account)
        options = HttpOptions(
            base_url=row.base_url, timeout=int(row.timeout_s * 1000), httpx_async_client=cast(Any, self._http)
        )
        self._client = genai.Client(vertexai=False, api_key=account.key or WITHOUT_KEY, http_options=options)

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        body = self._body(call)
        async with self._account.slots:
            response = await self._sampling.fitted(body, self._ask)
        try:
            return reply(_plain(response), body["model"])
        except ValueError as error:
            raise garbage(self._account, str(error)) from error

    async def stream(self, call: Chat) -> AsyncIterator[Mapping[str, Any]]:
        body = self._body(call)
        chunks = Chunks(body["model"])
        async with self._account.slots:
            opened = await self._sampling.fitted(body, self._open)
            with self._named():
                async for response in opened:
                    for chunk in chunks.of(_plain(response)):
                        yield chunk
        if not chunks.finished:
            raise garbage(self._account, "the stream ended before its end")
        for chunk in chunks.end():
            yield chunk

    async def choose(self, call: Choice) -> Mapping[str, Any]:
        raise unsupported(self._account, "takes no choice calls: it gives no log-probabilities of given words")

    async def logprobs(self, text: Text) -> tuple[float, ...]:
        raise unsupported(self._account, "gives no log-probabilities of given tokens")

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _ask(self, body: Mapping[str, Any]) -> GenerateContentResponse:
        with self._named():
            async with asyncio.timeout(self._account.provider.timeout_s):
                return await self._client.aio.models.generate_content(**_arguments(body))

    async def _open(self, body: Mapping[str, Any]) -> AsyncIterator[GenerateContentResponse]:
        with self._named():
            return await self._client.aio.models.generate_content_stream(**_arguments(body))

    def _body(self, call: Chat) -> Mapping[str, Any]:
        model = asked_model(self._account, call)
        with translating(self._account):
            said, rest = contents(call.messages), config(call)
            if not said:
                raise Untranslatable("no message in which anything is said")
            # The SDK does so too, but complains of a request in the same words as of a reply.
            TypeAdapter(list[Content]).validate_python(said)
            GenerateContentConfig.model_validate(rest)
            return {**rest, "model": model, "contents": said}

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Raise the SDK's exceptions as ModelFailed."""
        account = self._account
        try:
            yield
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise timed_out(account) from error
        except errors.APIError as error:
            headers = {**_retry_info(error.details), **dict(getattr(error.response, "headers", None) or {})}
            # Not chained: what a provider says of a key would stand in the traceback.
            raise answered(account, error.code or 500, error.message or str(error), headers) from None
        except httpx2.HTTPError as error:
            raise unreachable(account, error) from error
        except (JSONDecodeError, UnicodeDecodeError, ValidationError, errors.UnknownApiResponseError) as error:
            raise garbage(account, f"not JSON: {error}") from error


def _arguments(body: Mapping[str, Any]) -> dict[str, Any]:
    """A flat body as the SDK's arguments: the model, the conversation, and all the rest as its config."""
    rest = {name: value for name, value in body.items() if name not in ("model", "contents")}
    # With the SDK's own calling of functions switched off: tools are declared here, never run.
    rest["automatic_function_calling"] = {"disable": True}
    return {"model": body["model"], "contents": body["contents"], "config": rest}


def _plain(response: GenerateContentResponse) -> Mapping[str, Any]:
    return response.model_dump(mode="json", by_alias=True, exclude_none=True)


def _retry_info(details: Any) -> dict[str, str]:
    """google.rpc.RetryInfo of an error, in the words of HTTP: Google has no Retry-After on its 429."""
    listed = details.get("error", {}).get("details", []) if isinstance(details, dict) else []
    for detail in listed:
        if isinstance(detail, dict) and str(detail.get("@type", "")).endswith("google.rpc.RetryInfo"):
            return {"retry-after": str(detail.get("retryDelay", "")).removesuffix("s")}
    return {}
