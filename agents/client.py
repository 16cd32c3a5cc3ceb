"""Model calls of the meta- and the feedback-agent: chat through the gateway, each start under a token of its own."""

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from typing import Any, Protocol

import httpx

from sia_events.shared.calls import AWAY, decode_call, journal_key, spent
from sia_events.shared.ports import Brief, BudgetSpent, ModelAway, Ports, ProviderAway, WritingFailed

MAX_TOKENS = 16_384
# A model on this machine has a short context.
EMBEDDED, EMBEDDED_MAX_TOKENS = ("local/", "instant/"), 1024
MAX_REPLY = 16_000_000
# Behind the gateway a call may wait for its turn, be tried again, and then take as long as a long reply takes.
CALL_S = 3600.0


@dataclass(frozen=True)
class Reply:
    """What a model said. `calls` are OpenAI's tool_calls, `finish` is OpenAI's finish_reason."""

    text: str
    calls: tuple[Mapping[str, Any], ...]
    finish: str
    refusal: str


class Ask(Protocol):
    async def __call__(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Reply:
        """The model's reply to OpenAI's `messages`.

        Raises BudgetSpent, ProviderAway, ModelAway, and WritingFailed where asking again cannot help.
        """
        ...


@asynccontextmanager
async def asking(brief: Brief, ports: Ports) -> AsyncIterator[Ask]:
    """A way to ask the brief's model. The same requests in the same order, in a later start, get the recorded replies.

    `brief.key` is "ROLE.VERSION": the attempt that the calls are recorded under, and the version they are for.
    """
    start = secrets.token_hex(8)
    transport = httpx.AsyncHTTPTransport(uds=str(ports.door.socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=CALL_S) as http:

        async def ask(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Reply:
            limit = EMBEDDED_MAX_TOKENS if brief.model.startswith(EMBEDDED) else MAX_TOKENS
            body: dict[str, Any] = {"model": brief.model, "messages": list(messages), "max_tokens": limit}
            if tools:
                body["tools"] = list(tools)
            claims = brief.claims(start, ports.clock.now() + timedelta(seconds=CALL_S))
            headers = {"Authorization": f"Bearer {ports.door.token(claims)}"}
            try:
                response = await http.post("/v1/chat/completions", json=body, headers=headers)
            except httpx.HTTPError as error:
                said = f"the gateway lost a call of {brief.key} to {brief.model}: {type(error).__name__}: {error}"
                raise ModelAway(said) from error
            return _read(response, brief)

        yield ask


async def spending(brief: Brief, ports: Ports) -> dict[str, Any]:
    """What the brief's calls took so far, earlier starts' too: {calls, prompt_tokens, completion_tokens, usd}."""
    envelopes = await ports.bus.traces(brief.run, "model_call", journal_key(brief.key))
    return spent(decode_call(line) for envelope in envelopes for line in envelope.lines)


def _read(response: httpx.Response, brief: Brief) -> Reply:
    status = response.status_code
    if status != HTTPStatus.OK:
        said = f"{brief.model} did not answer {brief.key} ({status}): {_message(response)}"
        if status == HTTPStatus.PAYMENT_REQUIRED:
            raise BudgetSpent(said)
        if status in AWAY.values():
            raise ProviderAway(said)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise ModelAway(said)
        raise WritingFailed(said)
    if len(response.content) > MAX_REPLY:
        raise WritingFailed(f"{brief.model} sent {len(response.content):,} bytes; up to {MAX_REPLY:,} are read")
    try:
        choice = response.json()["choices"][0]
        message = choice["message"]
        return Reply(
            text=_words(message.get("content")),
            calls=tuple(message.get("tool_calls") or ()),
            finish=choice.get("finish_reason") or "stop",
            refusal=message.get("refusal") or "",
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise WritingFailed(f"the reply of {brief.model} to {brief.key} holds no message: {error!r}") from error


def _words(content: Any) -> str:
    """A message's text; some endpoints send parts, the model's thinking among them."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    return content or ""


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])[:500]
    except (ValueError, LookupError, TypeError):
        return response.text[:500]
