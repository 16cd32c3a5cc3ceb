"""The one door to every model: who asks is told by a token, what is asked comes on one of three wires."""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sia_events.model_gateway.anthropic_wire import MESSAGES
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.openai_wire import CHAT, CHOICE, LOGPROBS
from sia_events.model_gateway.reading import Reading
from sia_events.model_gateway.responses_wire import RESPONSES
from sia_events.model_gateway.token import Claims, TokenRefused, read_token
from sia_events.model_gateway.wire import Refused, Wire
from sia_events.shared.calls import AWAY, ModelCall
from sia_events.shared.ports import BusFull, BusUnreachable, Clock

MAX_BODY = 2_000_000
BYTES_A_TOKEN = 4
STATUS: Mapping[str, int] = {"budget": 402, **AWAY}
"""What a caller gets for a call that has no reply, by its fault; 502 for every other."""

LOST = (BusUnreachable, BusFull)
UNRECORDED = 500  # with this status the box counts a call as lost
# What the SDKs of OpenAI and Anthropic send along: how often they have sent this request already.
RETRIES = "x-stainless-retry-count"

log = structlog.get_logger()


def gateway(calls: Calls, secret: str, clock: Clock) -> Starlette:
    """The gateway as an ASGI application; whoever made `calls` ends them, and then closes their journal.

    A token, signed with `secret`, says which models its holder may ask for. Every call is in the journal before the end
    of its reply is given away, and one that is there is not made again.
    """

    def served(wire: Wire) -> Callable[[Request], Any]:
        async def serve(request: Request) -> Response:
            claims = _claims(request, secret, clock)
            body = await _body(request)
            if wire is MESSAGES and (betas := request.headers.get("anthropic-beta")):
                # Anthropic's clients name beta features in a header; in the record they belong to the request.
                body = {**body, "betas": betas.split(",")}
            streamed = body.get("stream") is True and wire not in (CHOICE, LOGPROBS)
            again = request.headers.get(RETRIES, "0") != "0"
            reading = await calls.read(wire, claims, body, streamed, again)
            if not streamed:
                return _whole(wire, reading, await reading.call())
            await reading.begun()
            if not reading.parts and (call := await reading.call()).reply is None:
                return _whole(wire, reading, call)
            return StreamingResponse(_frames(wire, reading), media_type="text/event-stream")

        return serve

    async def count(request: Request) -> Response:
        """An estimate, since nobody is asked: a token is about four bytes of the request."""
        _claims(request, secret, clock)
        return JSONResponse({"input_tokens": len(msgspec.json.encode(await _body(request))) // BYTES_A_TOKEN})

    async def listing(request: Request) -> Response:
        """The models that the caller may ask for, as OpenAI's and Anthropic's clients both read them."""
        claims = _claims(request, secret, clock)
        own = {"object": "model", "type": "model", "created": 0, "created_at": "1970-01-01T00:00:00Z"}
        names = (claims.model, *claims.models)
        data = [{"id": name, "display_name": name, "owned_by": name.partition("/")[0], **own} for name in names]
        page = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
        return JSONResponse({"object": "list", "data": data, **page})

    async def held_up(request: Request) -> Response:
        """How many seconds at most the caller waited for its journal; told when it waits for nothing of it any more."""
        claims = _claims(request, secret, clock)
        try:
            return JSONResponse({"seconds": await calls.held.longest(claims.run, claims.start)})
        except Exception as error:
            raise Refused(503, f"not all of its calls are on record: {type(error).__name__}: {error}") from error

    return Starlette(
        routes=[
            Route("/v1/chat/completions", served(CHAT), methods=["POST"]),
            Route("/v1/choice", served(CHOICE), methods=["POST"]),
            Route("/v1/logprobs", served(LOGPROBS), methods=["POST"]),
            Route("/v1/responses", served(RESPONSES), methods=["POST"]),
            Route("/v1/messages", served(MESSAGES), methods=["POST"]),
            Route("/v1/messages/count_tokens", count, methods=["POST"]),
            Route("/v1/models", listing),
            Route("/v1/held_up", held_up),
        ],
        exception_handlers={Refused: _refused, HTTPException: _no_such_page, **dict.fromkeys(LOST, _lost)},
    )


def _whole(wire: Wire, reading: Reading, call: ModelCall) -> Response:
    if call.reply is None:
        status = _status(call)
        return JSONResponse(wire.error(status, call.error or ""), status)
    return Response(msgspec.json.encode(wire.reply(reading.ask, call.reply)), media_type="application/json")


async def _frames(wire: Wire, reading: Reading) -> AsyncIterator[bytes]:
    """The reply as it comes; how it ended is told when it is recorded."""
    encoder = wire.encoder(reading.ask, reading.native)
    async for part in reading.follow():
        for frame in encoder.feed(part):
            yield frame
    try:
        call = await reading.call()
    except LOST as error:
        yield wire.error_frame(UNRECORDED, str(error))
        return
    if call.reply is None:
        yield wire.error_frame(_status(call), call.error or "")
        return
    if not reading.parts:
        for part in wire.parts(call.reply):
            for frame in encoder.feed(part):
                yield frame
    for frame in encoder.close(call.reply):
        yield frame


def _status(call: ModelCall) -> int:
    return STATUS.get(call.fault, 502)


def _wire_of(request: Request) -> Wire:
    return MESSAGES if request.url.path.startswith("/v1/messages") else CHAT


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    log.debug("a request was refused", path=request.url.path, status=error.status, reason=str(error))
    return JSONResponse(_wire_of(request).error(error.status, str(error)), error.status)


async def _lost(request: Request, error: Exception) -> Response:
    """The stream is away or full: what was answered is on no record, and so is given to nobody. The log says which."""
    return JSONResponse(_wire_of(request).error(UNRECORDED, str(error)), UNRECORDED)


async def _no_such_page(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(_wire_of(request).error(error.status_code, said), error.status_code)


def _claims(request: Request, secret: str, clock: Clock) -> Claims:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    token = token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    try:
        return read_token(token, secret, clock.now())
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
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(400, f"the request is no JSON object: {error}") from error
