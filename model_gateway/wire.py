"""What a wire is: one provider's HTTP API as the gateway speaks it, and the values that every wire is made of."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import msgspec

from sia_events.model_gateway.token import Claims
from sia_events.shared.ports import Models, Native
from sia_events.shared.ports import Wire as ProviderWire

Body = Mapping[str, Any]

MAX_TOKENS = 65_536
DEFAULT_TOKENS = 8_192
# A model on this machine writes slowly and has a short context.
EMBEDDED = ("local/", "instant/")
EMBEDDED_MAX_TOKENS = 4096
EMBEDDED_DEFAULT_TOKENS = 128

ERROR_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    402: "budget_exhausted",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "gateway_error",
    502: "provider_error",
    503: "provider_away",
    504: "timeout_error",
}
"""The type of an error, by its HTTP status, on every wire; any other status is an `invalid_request_error`."""


class Refused(Exception):
    """A request that cannot be served as it is; `status` is what the caller gets, and nothing was paid."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Ask:
    """A request that may be served: for whom, what was sent, which model answers, and the call's name in the record."""

    claims: Claims
    body: Body
    model: str
    adapter: str | None
    call: str
    seed: int

    @property
    def embedded(self) -> bool:
        return self.model.startswith(EMBEDDED)

    def tokens(self, wanted: int | None) -> int:
        """How long the reply may be. Raises Refused for more than the model is let write."""
        most = EMBEDDED_MAX_TOKENS if self.embedded else MAX_TOKENS
        if wanted is None:
            return EMBEDDED_DEFAULT_TOKENS if self.embedded else DEFAULT_TOKENS
        if wanted > most:
            raise Refused(400, f"max_tokens {wanted} is over {most}")
        return wanted

    def sampling(self, temperature: float | None, top_p: float | None) -> tuple[float | None, float | None]:
        """Temperature and top_p as they go to the provider: a version's rollouts are drawn at 1, whatever is asked."""
        if self.claims.sample:
            return 1.0, 1.0
        # A hosted model may know no temperature at all, so what nobody asked for is not sent to it.
        other = 1.0 if self.embedded else None
        return other if temperature is None else temperature, other if top_p is None else top_p


@dataclass(frozen=True)
class Question:
    """What a provider is asked: for its whole reply, or for the parts of it as they come.

    `max_tokens` bounds the reply. `gather` puts the parts together and raises ModelFailed when they are no whole.
    A `native` provider speaks the wire itself: its parts are the wire's events, its reply is the wire's.
    """

    max_tokens: int
    whole: Callable[[], Awaitable[Body]]
    parts: Callable[[], AsyncIterator[Body]]
    gather: Callable[[Sequence[Body]], Body]
    native: bool = False


class Encoder(Protocol):
    """One reply as a stream of a wire's events, framed for the caller.

    What says that the reply has ended is left to `close`: it may only be said of a reply that is recorded.
    """

    def feed(self, part: Body) -> Iterable[bytes]: ...

    def close(self, reply: Body) -> Iterable[bytes]: ...


@dataclass(frozen=True)
class Wire:
    """One HTTP API: how its requests are read, and how replies, streams and errors look on it.

    A reply is kept as the model's own: OpenAI's chat.completion, or the wire's own shape from a native provider.
    `question` raises Refused for a request that cannot be served. `reply` is what a caller gets of a kept reply,
    `parts` takes one apart as a provider's stream would have, `native` tells which of the two shapes it has, `usage`
    is OpenAI's object of that name, with what was read from a cache and written to one in prompt_tokens_details.
    """

    name: str
    question: Callable[[Models, Ask], Question]
    native: Callable[[Body], bool]
    reply: Callable[[Ask, Body], Body]
    parts: Callable[[Body], Iterable[Body]]
    encoder: Callable[[Ask, bool], Encoder]
    usage: Callable[[Body], Body]
    error: Callable[[int, str], Body]
    error_frame: Callable[[int, str], bytes]


def error_type(status: int) -> str:
    return ERROR_TYPES.get(status, "invalid_request_error")


def data_frame(event: Body) -> bytes:
    """One server-sent event (WHATWG HTML, section 9.2) without a name."""
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def named_frame(event: Body) -> bytes:
    """One server-sent event named by its own type."""
    return b"event: " + str(event.get("type")).encode() + b"\n" + data_frame(event)


@dataclass
class PassingOn:
    """The Encoder of a native provider's events: handed on as they come, from the first of `closing` on held back."""

    closing: frozenset[str]

    def __post_init__(self) -> None:
        self._held: list[bytes] = []

    def feed(self, part: Body) -> Iterable[bytes]:
        frame = named_frame(part)
        if self._held or part.get("type") in self.closing:
            self._held.append(frame)
            return ()
        return (frame,)

    def close(self, reply: Body) -> Iterable[bytes]:
        return self._held


def text_of(content: Any, kinds: tuple[str, ...], where: str) -> str:
    """The text of `content`: a string, or blocks of these kinds. Raises Refused for anything else, an image say."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(400, f"{where} is neither text nor a list of blocks")
    texts = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in kinds or not isinstance(block.get("text"), str):
            raise Refused(400, f"{where}: blocks of type {kind!r} are not served here; send {' or '.join(kinds)}")
        texts.append(block["text"])
    return "".join(texts)


def native_body(ask: Ask, limit: str) -> tuple[dict[str, Any], int]:
    """The request as it goes on to a native provider, with its own name of the model, and the reply's bound.

    `limit` is the wire's name of that bound: it is always set, so that no call can cost more than was reserved for it.
    """
    wanted = ask.body.get(limit)
    if wanted is not None and (not isinstance(wanted, int) or wanted < 1):
        raise Refused(400, f"{limit} must be a whole number above 0")
    most = ask.tokens(wanted)
    body = {name: value for name, value in ask.body.items() if name != "stream"}
    return body | {"model": ask.model.partition("/")[2], limit: most}, most


def require_own_tools(ask: Ask, own: tuple[str, ...], elsewhere: tuple[str, ...]) -> None:
    """Raises Refused for what a provider would do beside answering: an agent in a box has no network.

    `own` begin the types of the tools that the caller runs itself, `elsewhere` are fields that reach further, or that
    put a call off or make it dearer than its price.
    """
    tools = ask.body.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused(400, "tools is no list of objects")
    for tool in tools:
        if not str(tool.get("type") or "custom").startswith(own):
            raise Refused(400, f"the tool {tool['type']!r} is not served: it runs at the provider, which has a network")
    if there := [name for name in elsewhere if ask.body.get(name)]:
        raise Refused(400, f"`{there[0]}` is not served")


def require_no_links(content: Any) -> None:
    """Raises Refused for a block that the provider would fetch from an address."""
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict):
            source = block.get("source")
            told = [block.get("image_url"), block.get("file_url")]
            told += [source.get("url")] if isinstance(source, dict) else []
            if any(isinstance(url, str) and not url.startswith("data:") for url in told):
                raise Refused(400, "a block with an address is not served; send the content itself")
            for name in ("content", "output"):
                require_no_links(block.get(name))


def native_for(port: Models, ask: Ask, name: ProviderWire) -> Native | None:
    """The provider as one that speaks the wire itself, if it does.

    Not for rollouts: how those are drawn is the platform's to say, and what was drawn has to come back token by token.
    """
    speaks = name in getattr(port, "wires", ()) and not ask.claims.sample
    return cast(Native, port) if speaks else None
