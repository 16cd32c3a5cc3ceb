"""The one door to every model: OpenAI chat completions and the choice call in, each call recorded before its reply."""

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any
from uuid import uuid5

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.token import Claims, TokenRefused, read_token
from sia_events.shared.calls import ModelCall
from sia_events.shared.failpoints import reach
from sia_events.shared.ports import Chat, Choice, Clock, ModelFailed, Models
from sia_events.shared.record import NAMESPACE

PATIENCE_S = 120.0
MAX_BODY = 2_000_000
MAX_TOKENS = 4096


class Refused(Exception):
    """A request that cannot be served as it is; `status` is what the caller gets."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def gateway(journal: Journal, models: Callable[[str], Models], secret: str, clock: Clock) -> Starlette:
    """The gateway as an ASGI application; whoever made the journal closes it behind the last request.

    `models` finds what answers for a model name, "provider/model".
    Whatever model name a request carries, the version's own model and adapter answer: the token decides, not the agent.
    """

    async def chat(request: Request) -> Response:
        return await _serve(request, "chat")

    async def choice(request: Request) -> Response:
        return await _serve(request, "choice")

    async def _serve(request: Request, kind: str) -> Response:
        try:
            claims = _claims(request, secret)
            body = await _body(request)
            call = await _answer(kind, claims, body)
        except Refused as refused:
            error = {"message": str(refused), "type": "invalid_request_error", "code": refused.status}
            return JSONResponse({"error": error}, refused.status)
        if call.reply is None:
            return JSONResponse({"error": {"message": call.error, "type": "provider_error", "code": 502}}, 502)
        return Response(msgspec.json.encode(call.reply), media_type="application/json")

    async def _answer(kind: str, claims: Claims, body: Mapping[str, Any]) -> ModelCall:
        metadata = body.get("metadata") or {}
        item = metadata.get("item") if isinstance(metadata, dict) else None
        digest = hashlib.sha256(msgspec.json.encode([kind, body], order="sorted")).hexdigest()
        recorded = await journal.open(claims.run, claims.attempt)
        n = journal.number(claims.run, claims.start, digest)
        if known := recorded.get((digest, n)):
            return known
        seed = int.from_bytes(hashlib.sha256(f"{claims.seed}/{digest}/{n}".encode()).digest()[:4]) >> 1
        port = models(claims.model)
        ask = _choice(port, claims, body, seed) if kind == "choice" else _chat(port, claims, body, seed)
        started, at = time.monotonic(), clock.now()
        reply, error = None, None
        try:
            reply = await _patiently(ask)
        except ModelFailed as failed:
            if failed.status < 500:
                raise Refused(failed.status, str(failed)) from failed
            error = str(failed)
        usage = (reply or {}).get("usage", {})
        call = ModelCall(
            call=str(uuid5(NAMESPACE, f"{claims.run}/{claims.attempt}/{digest}/{n}")),
            attempt=claims.attempt,
            version=claims.version,
            kind="choice" if kind == "choice" else "chat",
            model=claims.model,
            adapter=claims.adapter,
            item=item if isinstance(item, str) else None,
            digest=digest,
            n=n,
            seed=seed,
            request=dict(body),
            reply=None if reply is None else dict(reply),
            error=error,
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            seconds=round(time.monotonic() - started, 4),
            time=at.isoformat(),
        )
        reach("model_gateway before recording a call")
        await journal.record(claims.run, call)
        reach("model_gateway after recording a call")
        return call

    async def listing(request: Request) -> Response:
        claims = _claims(request, secret)
        return JSONResponse({"object": "list", "data": [{"id": claims.model, "object": "model"}]})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/choice", choice, methods=["POST"]),
            Route("/v1/models", listing),
        ],
        exception_handlers={Refused: lambda _, error: JSONResponse({"error": {"message": str(error)}}, error.status)},  # type: ignore[attr-defined]
    )


async def _patiently(ask: Callable[[], Any]) -> Mapping[str, Any]:
    """Ask again, ever more slowly, while the fault is the provider's; a killed server has time to come back."""
    retrying = AsyncRetrying(
        retry=retry_if_exception(lambda e: isinstance(e, ModelFailed) and e.status >= 500),
        stop=stop_after_delay(PATIENCE_S),
        wait=wait_exponential_jitter(multiplier=0.2, max=5),
        reraise=True,
    )
    async for go in retrying:
        with go:
            return await ask()
    raise AssertionError("retrying ends with a reply or a raise")


def _claims(request: Request, secret: str) -> Claims:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    token = token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    try:
        return read_token(token, secret)
    except TokenRefused as refused:
        raise Refused(401, str(refused)) from refused


async def _body(request: Request) -> Mapping[str, Any]:
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY:
            raise Refused(413, f"request larger than {MAX_BODY:,} bytes")
    try:
        return msgspec.json.decode(bytes(raw), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise Refused(400, f"the request is no JSON object: {error}") from error


class _Asked(msgspec.Struct):
    """What is read of a request; OpenAI's other fields are recorded and have no effect."""

    messages: list[dict[str, Any]]
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    n: int = 1
    choices: list[str] | None = None
    bias: list[float] | None = None


def _asked(body: Mapping[str, Any]) -> _Asked:
    try:
        asked = msgspec.convert(body, _Asked)
    except msgspec.ValidationError as error:
        raise Refused(400, str(error)) from error
    if asked.stream or asked.n != 1:
        raise Refused(400, "stream and n > 1 are not served; ask for one whole reply at a time")
    return asked


def _chat(port: Models, claims: Claims, body: Mapping[str, Any], seed: int) -> Callable[[], Any]:
    asked = _asked(body)
    wanted = asked.max_completion_tokens or asked.max_tokens or 128
    if wanted > MAX_TOKENS:
        raise Refused(400, f"max_tokens {wanted} is over {MAX_TOKENS}")
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    temperature, top_p = (1.0, 1.0) if claims.sample else (asked.temperature, asked.top_p)
    call = Chat(claims.model, claims.adapter, asked.messages, temperature, top_p, wanted, stop, seed)
    return lambda: port.chat(call)


def _choice(port: Models, claims: Claims, body: Mapping[str, Any], seed: int) -> Callable[[], Any]:
    asked = _asked(body)
    if not asked.choices:
        raise Refused(400, "a choice call needs a non-empty list of choices")
    if asked.bias is not None and len(asked.bias) != len(asked.choices):
        raise Refused(400, f"{len(asked.bias)} biases for {len(asked.choices)} choices")
    temperature = 1.0 if claims.sample else float(body.get("temperature", 0.0))
    call = Choice(claims.model, claims.adapter, asked.messages, asked.choices, asked.bias, temperature, seed)
    return lambda: port.choose(call)
