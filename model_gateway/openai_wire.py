"""OpenAI's chat completions; choice calls and log-probabilities, which are ours in the same manner."""

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Annotated, Any

import msgspec

from sia_events.model_gateway import completion
from sia_events.model_gateway.wire import Ask, Body, Encoder, Question, Refused, Wire, data_frame, error_type
from sia_events.shared.chunks import chunks
from sia_events.shared.ports import Chat, Choice, Models, Text

Temperature = Annotated[float, msgspec.Meta(ge=0)]
TopP = Annotated[float, msgspec.Meta(gt=0, le=1)]
Tokens = Annotated[int, msgspec.Meta(ge=1)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]
CHOICE_TOKENS = 16


class ChatBody(msgspec.Struct):
    """What is read of a chat; OpenAI's other fields are recorded and have no effect."""

    messages: list[dict[str, Any]]
    temperature: Temperature | None = None
    top_p: TopP | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    stop: str | list[str] | None = None
    n: int | None = 1
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    functions: list[Any] | None = None


class LogprobsBody(msgspec.Struct):
    """How likely is this completion of this prompt, both in the model's own tokens?"""

    prompt_token_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1)]
    completion_token_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1)]


class ChoiceBody(msgspec.Struct):
    """Which of `choices` continues the conversation; `bias` is added to their log-probabilities, in nats."""

    messages: list[dict[str, Any]]
    choices: list[str] = []
    bias: list[float] | None = None
    temperature: Temperature = 0.0
    stream: bool = False


def read(body: Body, kind: Any) -> Any:
    """The body as a `kind`. Raises Refused with the field that is wrong."""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise Refused(400, str(error)) from error


def chat_question(port: Models, chat: Chat) -> Question:
    """A chat, asked of the `Models` port."""
    return Question(chat.max_tokens, lambda: port.chat(chat), lambda: port.stream(chat), completion.gather)


class ChunkEncoder:
    """Chunks as the provider sent them; how the reply ended and what was used are told at its close."""

    def __init__(self, ask: Ask, native: bool) -> None:
        options = ask.body.get("stream_options")
        self._wants_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        self._head: dict[str, Any] = {"id": ask.call, "object": "chat.completion.chunk", "created": 0}
        self._head["model"] = ask.model
        self._last: list[Body] = []

    def feed(self, part: Body) -> Iterable[bytes]:
        part = {name: value for name, value in part.items() if name != "usage"}
        self._head |= {name: part[name] for name in self._head if part.get(name)}
        if not part.get("choices"):
            return ()
        if self._last or any(choice.get("finish_reason") for choice in part["choices"]):
            self._last.append(part)
            return ()
        return (data_frame({**self._head, **part}),)

    def close(self, reply: Body) -> Iterable[bytes]:
        for part in self._last:
            yield data_frame({**self._head, **part})
        if self._wants_usage:
            yield data_frame({**self._head, "choices": [], "usage": reply.get("usage") or {}})
        yield b"data: [DONE]\n\n"


def error(status: int, message: str) -> Body:
    kind = error_type(status)
    return {"error": {"message": message, "type": kind, "param": None, "code": kind}}


def _chat(port: Models, ask: Ask) -> Question:
    body: ChatBody = read(ask.body, ChatBody)
    if body.n not in (None, 1):
        raise Refused(400, "n > 1 is not served; send the request n times, each is drawn anew")
    if body.functions is not None:
        raise Refused(400, "`functions` are not served; send them as `tools`")
    temperature, top_p = ask.sampling(body.temperature, body.top_p)
    chat = Chat(
        ask.model,
        ask.adapter,
        body.messages,
        temperature,
        top_p,
        ask.tokens(body.max_completion_tokens or body.max_tokens),
        [body.stop] if isinstance(body.stop, str) else body.stop or [],
        ask.seed,
        body.tools or (),
        body.tool_choice,
        body.response_format,
    )
    return chat_question(port, chat)


def _choice(port: Models, ask: Ask) -> Question:
    body: ChoiceBody = read(ask.body, ChoiceBody)
    if not body.choices:
        raise Refused(400, "a choice call needs a non-empty list of choices")
    if body.bias is not None and len(body.bias) != len(body.choices):
        raise Refused(400, f"{len(body.bias)} biases for {len(body.choices)} choices")
    if body.stream:
        raise Refused(400, "a choice call has no stream; ask for the whole reply")
    temperature = 1.0 if ask.claims.sample else body.temperature
    choice = Choice(ask.model, ask.adapter, body.messages, body.choices, body.bias, temperature, ask.seed)
    return Question(CHOICE_TOKENS, lambda: port.choose(choice), _no_parts, lambda parts: {})


def _logprobs(port: Models, ask: Ask) -> Question:
    if ask.claims.role != "trainer":
        raise Refused(403, "log-probabilities of given tokens are told to the trainer alone; ask for a choice")
    body: LogprobsBody = read(ask.body, LogprobsBody)
    text = Text(ask.model, ask.adapter, body.prompt_token_ids, body.completion_token_ids)

    async def whole() -> Body:
        told = await port.logprobs(text)
        return {"logprobs": told, "usage": completion.usage_of(len(text.prompt) + len(text.completion), 0)}

    return Question(1, whole, _no_parts, lambda parts: {})


async def _no_parts() -> AsyncIterator[Mapping[str, Any]]:
    raise AssertionError("what is scored has no parts")
    yield {}


def _encoder(ask: Ask, native: bool) -> Encoder:
    return ChunkEncoder(ask, native)


def _wire(name: str, question: Any) -> Wire:
    return Wire(
        name=name,
        question=question,
        native=lambda reply: False,
        reply=lambda ask, reply: reply,
        parts=chunks,
        encoder=_encoder,
        usage=completion.usage,
        error=error,
        error_frame=lambda status, message: data_frame(error(status, message)),
    )


CHAT = _wire("chat", _chat)
CHOICE = _wire("choice", _choice)
LOGPROBS = _wire("logprobs", _logprobs)
