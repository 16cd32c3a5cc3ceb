"""OpenAI's responses: requests read as a chat, or passed on to a provider that speaks them itself."""

from collections.abc import Mapping
from typing import Any

import msgspec

from sia_events.model_gateway import completion
from sia_events.model_gateway.openai_wire import Temperature, Tokens, TopP, chat_question, error, read
from sia_events.model_gateway.responses_stream import CLOSING, ResponseEncoder, events, gather, response, usage
from sia_events.model_gateway.wire import (
    Ask,
    Encoder,
    PassingOn,
    Question,
    Refused,
    Wire,
    named_frame,
    native_body,
    native_for,
    require_no_links,
    require_own_tools,
    text_of,
)
from sia_events.shared.chunks import chunks
from sia_events.shared.ports import Chat, Models

OWN_TOOLS = ("function", "custom", "local_shell", "apply_patch")
ELSEWHERE = ("background", "prompt")
TEXTS = ("input_text", "output_text", "text")
ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


class ResponsesBody(msgspec.Struct):
    """What is read of a request; OpenAI's other fields are recorded and have no effect on another provider."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None


def as_messages(body: ResponsesBody) -> list[Mapping[str, Any]]:
    """The conversation as chat messages. Raises Refused for what has no equal there, an image say."""
    found: list[dict[str, Any]] = []
    if body.instructions:
        found.append({"role": "system", "content": body.instructions})
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for place, item in enumerate(items):
        where = f"input.{place}"
        match item.get("type", "message"):
            case "message" if str(item.get("role")) in ROLES:
                content = text_of(item.get("content"), TEXTS, where)
                found.append({"role": ROLES[item["role"]], "content": content})
            case "function_call":
                function = {"name": str(item.get("name")), "arguments": str(item.get("arguments"))}
                # Calls made in one turn are items of their own here, and parts of one message there.
                if not found or found[-1]["role"] != "assistant":
                    found.append({"role": "assistant", "content": None})
                call = {"id": str(item.get("call_id")), "type": "function", "function": function}
                found[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                said = text_of(item.get("output"), TEXTS, where)
                found.append({"role": "tool", "tool_call_id": str(item.get("call_id")), "content": said})
            case "message":
                raise Refused(400, f"{where}: the role is {item.get('role')!r}; there are {', '.join(ROLES)}")
            case other:
                raise Refused(400, f"{where}: items of type {other!r} are not served by the model's provider")
    return list(found)


def _question(port: Models, ask: Ask) -> Question:
    if native := native_for(port, ask, "responses"):
        require_own_tools(ask, OWN_TOOLS, ELSEWHERE)
        if ask.body.get("service_tier") not in (None, "auto", "default", "flex"):
            raise Refused(400, "`service_tier` is not served: it makes a call dearer than its price")
        require_no_links(ask.body.get("input"))
        whole, most = native_body(ask, "max_output_tokens")
        return Question(
            most,
            lambda: native.forward("responses", whole),
            lambda: native.forward_stream("responses", whole),
            gather,
            native=True,
        )
    body: ResponsesBody = read(ask.body, ResponsesBody)
    if body.previous_response_id or body.conversation:
        raise Refused(400, "the model's provider keeps no conversations; send all items of it as `input`")
    if body.background:
        raise Refused(400, "`background` is not served; wait for the reply, or read its stream")
    temperature, top_p = ask.sampling(body.temperature, body.top_p)
    chat = Chat(
        ask.model,
        ask.adapter,
        as_messages(body),
        temperature,
        top_p,
        ask.tokens(body.max_output_tokens),
        (),
        ask.seed,
        [_tool(tool) for tool in body.tools or ()],
        _tool_choice(body.tool_choice),
        _response_format((body.text or {}).get("format")),
    )
    return chat_question(port, chat)


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    if tool.get("type") != "function":
        raise Refused(400, f"the tool {tool.get('type')!r} is not served: it runs at OpenAI")
    told = {name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": told}


def _tool_choice(asked: str | Mapping[str, Any] | None) -> str | Mapping[str, Any] | None:
    if asked is None or isinstance(asked, str):
        return asked
    if asked.get("type") != "function":
        raise Refused(400, f"tool_choice {asked.get('type')!r} is not served; there are auto, none, required, function")
    return {"type": "function", "function": {"name": asked.get("name")}}


def _response_format(asked: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if asked is None or asked.get("type") == "text":
        return None
    if asked.get("type") != "json_schema":
        return asked
    return {"type": "json_schema", "json_schema": {name: asked[name] for name in asked if name != "type"}}


def _encoder(ask: Ask, native: bool) -> Encoder:
    return PassingOn(CLOSING) if native else ResponseEncoder(ask)


def _error_frame(status: int, message: str) -> bytes:
    # OpenAI's clients look for `error`, its documentation names the other fields.
    told = error(status, message)
    return named_frame({"type": "error", "message": message, "code": told["error"]["code"], "param": None, **told})


RESPONSES = Wire(
    name="responses",
    question=_question,
    native=completion.is_own,
    reply=lambda ask, reply: reply if completion.is_own(reply) else response(ask, reply),
    parts=completion.by_shape(chunks, events),
    encoder=_encoder,
    usage=completion.by_shape(completion.usage, usage),
    error=error,
    error_frame=_error_frame,
)
