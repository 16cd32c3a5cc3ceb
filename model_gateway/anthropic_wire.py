"""Anthropic's messages: requests read as a chat, or passed on to a provider that speaks them itself."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from sia_events.model_gateway import completion
from sia_events.model_gateway.anthropic_stream import CLOSING, MessageEncoder, events, gather, message, usage
from sia_events.model_gateway.openai_wire import Temperature, Tokens, TopP, chat_question, read
from sia_events.model_gateway.wire import (
    Ask,
    Body,
    Encoder,
    PassingOn,
    Question,
    Refused,
    Wire,
    error_type,
    named_frame,
    native_body,
    native_for,
    require_no_links,
    require_own_tools,
    text_of,
)
from sia_events.shared.chunks import chunks
from sia_events.shared.ports import Chat, Models

# Tools of Anthropic's own making that the caller runs, and its own.
OWN_TOOLS = ("custom", "bash_", "text_editor_", "memory_", "computer_")
ELSEWHERE = ("mcp_servers", "container", "speed")
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class MessagesBody(msgspec.Struct):
    """What is read of a request; Anthropic's other fields are recorded and have no effect on another provider."""

    messages: list[dict[str, Any]]
    max_tokens: Tokens
    system: str | list[dict[str, Any]] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    stop_sequences: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None


def as_messages(body: MessagesBody) -> list[Mapping[str, Any]]:
    """The conversation as OpenAI's messages. Raises Refused for what has no equal there, an image say."""
    found: list[Mapping[str, Any]] = []
    if body.system:
        found.append({"role": "system", "content": text_of(body.system, ("text",), "system")})
    for place, said in enumerate(body.messages):
        where, content = f"messages.{place}", said.get("content")
        if said.get("role") not in ("user", "assistant", "system"):
            raise Refused(400, f"{where}: the role is {said.get('role')!r}; it must be 'user' or 'assistant'")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise Refused(400, f"{where} is neither text nor a list of blocks")
        if said["role"] == "system":  # in the midst of a conversation, as newer clients have it
            found.append({"role": "system", "content": text_of(blocks, ("text",), where)})
        else:
            found += _assistant(blocks, where) if said["role"] == "assistant" else _user(blocks, where)
    return found


def error(status: int, message: str) -> Body:
    return {"type": "error", "error": {"type": error_type(status), "message": message}}


def _user(blocks: list[Any], where: str) -> Iterable[Mapping[str, Any]]:
    text: list[Any] = []
    for block in blocks:
        if block.get("type") != "tool_result":
            text.append(block)
            continue
        said = text_of(block.get("content") or "", ("text",), f"{where}, tool_result")
        content = f"error: {said}" if block.get("is_error") else said
        yield {"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": content}
    if text:
        yield {"role": "user", "content": text_of(text, ("text",), where)}


def _assistant(blocks: list[Any], where: str) -> Iterable[Mapping[str, Any]]:
    used = [block for block in blocks if block.get("type") == "tool_use"]
    text = text_of([block for block in blocks if block.get("type") != "tool_use"], ("text",), where)
    calls = []
    for block in used:
        function = {"name": str(block.get("name")), "arguments": msgspec.json.encode(block.get("input") or {}).decode()}
        calls.append({"id": str(block.get("id")), "type": "function", "function": function})
    yield {"role": "assistant", "content": text or None, **({"tool_calls": calls} if calls else {})}


def _tools(tools: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    found = []
    for tool in tools:
        if tool.get("type", "custom") != "custom":
            raise Refused(400, f"the tool {tool.get('type')!r} is not served: it runs at Anthropic")
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema") or {"type": "object"}}
        if described := tool.get("description"):
            function["description"] = described
        found.append({"type": "function", "function": function})
    return found


def _tool_choice(asked: dict[str, Any] | None) -> str | Mapping[str, Any] | None:
    if asked is None:
        return None
    kind = asked.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": asked.get("name")}}
    if not isinstance(kind, str) or kind not in TOOL_CHOICES:
        raise Refused(400, f"tool_choice {kind!r} is unknown; there are auto, any, none and tool")
    return TOOL_CHOICES[kind]


def _require_names(betas: Any) -> None:
    """Raises Refused for what cannot go into a header, where betas go: it would fail as a broken connection does."""
    named = isinstance(betas, list) and all(isinstance(name, str) for name in betas)
    if not named or not all(name.isascii() and name.isprintable() for name in betas):
        raise Refused(400, "betas is no list of names of beta features")


def _question(port: Models, ask: Ask) -> Question:
    if native := native_for(port, ask, "anthropic"):
        require_own_tools(ask, OWN_TOOLS, ELSEWHERE)
        require_no_links(ask.body.get("messages"))
        _require_names(ask.body.get("betas") or [])
        whole, most = native_body(ask, "max_tokens")
        # Our own note of the item that a call is made for; Anthropic refuses fields it does not know.
        if isinstance(noted := whole.get("metadata"), dict):
            whole["metadata"] = {name: value for name, value in noted.items() if name != "item"}
        return Question(
            most,
            lambda: native.forward("anthropic", whole),
            lambda: native.forward_stream("anthropic", whole),
            gather,
            native=True,
        )
    body: MessagesBody = read(ask.body, MessagesBody)
    temperature, top_p = ask.sampling(body.temperature, body.top_p)
    chat = Chat(
        ask.model,
        ask.adapter,
        as_messages(body),
        temperature,
        top_p,
        ask.tokens(body.max_tokens),
        body.stop_sequences or [],
        ask.seed,
        _tools(body.tools or []),
        _tool_choice(body.tool_choice),
    )
    return chat_question(port, chat)


def _encoder(ask: Ask, native: bool) -> Encoder:
    return PassingOn(CLOSING) if native else MessageEncoder(ask)


MESSAGES = Wire(
    name="messages",
    question=_question,
    native=completion.is_own,
    reply=lambda ask, reply: reply if completion.is_own(reply) else message(ask, reply),
    parts=completion.by_shape(chunks, events),
    encoder=_encoder,
    usage=completion.by_shape(completion.usage, usage),
    error=error,
    error_frame=lambda status, message: named_frame(error(status, message)),
)
