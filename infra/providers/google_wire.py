"""OpenAI's chat completions in the words of Google's generateContent, and back: pure translation."""

import json
from base64 import urlsafe_b64decode
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sia_events.infra.providers.chat_parts import Untranslatable, arguments_of, function_of, text_of
from sia_events.shared.ports import Chat

# Every function call in a request must have the signature it came with. Where an agent did not keep it, this word,
# which Google documents for calls that its models did not make, is taken instead.
UNSIGNED = b"skip_thought_signature_validator"
BLOCKED = ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY", "LANGUAGE")


def contents(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation without its system messages. Raises Untranslatable."""
    said: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in messages:
        role = message.get("role")
        if role in ("system", "developer"):
            continue
        if role == "tool":
            parts = [_result(message, names)]
        elif role in ("user", "assistant"):
            text = text_of(message.get("content")) or message.get("refusal") or ""
            parts: list[dict[str, Any]] = [{"text": text}] if text else []
            for call in message.get("tool_calls") or ():
                names[call["id"]] = call["function"]["name"]
                parts.append(_used(call))
        else:
            raise Untranslatable(f"a message of the role {role!r}")
        speaker = "model" if role == "assistant" else "user"
        if said and said[-1]["role"] == speaker:
            said[-1]["parts"] += parts
        elif parts:
            said.append({"role": speaker, "parts": parts})
    return said


def _result(message: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    call = message.get("tool_call_id", "")
    if call not in names:
        raise Untranslatable(f"the result of a tool call {call!r} that no message before it makes")
    response = {"result": text_of(message.get("content"))}
    return {"function_response": {"id": call, "name": names[call], "response": response}}


def _used(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    kept = ((call.get("extra_content") or {}).get("google") or {}).get("thought_signature")
    used = {"id": call["id"], "name": function["name"], "args": arguments_of(function)}
    return {"function_call": used, "thought_signature": urlsafe_b64decode(kept) if kept else UNSIGNED}


def config(call: Chat) -> dict[str, Any]:
    """What goes with the conversation: the system message, limits, sampling, tools. Raises Untranslatable."""
    system = "\n\n".join(text_of(m.get("content")) for m in call.messages if m.get("role") in ("system", "developer"))
    optional = {
        "system_instruction": system or None,
        "temperature": call.temperature,
        "top_p": None if call.top_p == 1 else call.top_p,
        "stop_sequences": list(call.stop) or None,
        "tools": [{"function_declarations": [_declared(tool) for tool in call.tools]}] if call.tools else None,
        "tool_config": _tool_config(call.tool_choice) if call.tool_choice is not None and call.tools else None,
        **_format(call.response_format),
    }
    required = {"max_output_tokens": call.max_tokens, "seed": call.seed}
    return {**required, **{name: value for name, value in optional.items() if value is not None}}


def _declared(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = function_of(tool)
    named = {"name": function["name"], "description": function.get("description", "")}
    return {**named, "parameters_json_schema": function.get("parameters") or {"type": "object"}}


def _tool_config(choice: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(choice, str):
        modes = {"auto": "AUTO", "none": "NONE", "required": "ANY"}
        if choice not in modes:
            raise Untranslatable(f"the tool choice {choice!r}")
        return {"function_calling_config": {"mode": modes[choice]}}
    name = function_of(choice)["name"]
    return {"function_calling_config": {"mode": "ANY", "allowed_function_names": [name]}}


def _format(wanted: Mapping[str, Any] | None) -> dict[str, Any]:
    kind = "text" if wanted is None else wanted.get("type")
    if wanted is None or kind == "text":
        return {}
    as_json = {"response_mime_type": "application/json"}
    match kind:
        case "json_object":
            return as_json
        case "json_schema":
            return {**as_json, "response_json_schema": wanted["json_schema"]["schema"]}
    raise Untranslatable(f"the response format {kind!r}")


def reply(response: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A chat.completion object of a whole response. Raises ValueError where it holds neither answer nor refusal."""
    turn = _Turn()
    turn.take(response)
    if turn.finish is None:
        raise ValueError("neither a candidate that came to its end nor a reason why there is none")
    message: dict[str, Any] = {"role": "assistant", "content": turn.text or None, "refusal": turn.refusal}
    if turn.calls:
        message["tool_calls"] = [{name: call[name] for name in call if name != "index"} for call in turn.calls]
    choice = {"index": 0, "message": message, "finish_reason": turn.finish, "logprobs": None}
    return {**_head(response, model, "chat.completion"), "choices": [choice], "usage": usage_of(turn.usage)}


class Chunks:
    """The parts of a streamed response as OpenAI's chunks; `finished` once the model has come to its end."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._turn = _Turn()
        self._begun = False

    @property
    def finished(self) -> bool:
        return self._turn.finish is not None

    def of(self, response: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        text, calls = len(self._turn.text), len(self._turn.calls)
        self._turn.take(response)
        head = _head(response, self._model, "chat.completion.chunk")
        delta: dict[str, Any] = {} if self._begun else {"role": "assistant", "content": ""}
        if said := self._turn.text[text:]:
            delta["content"] = said
        if made := self._turn.calls[calls:]:
            delta["tool_calls"] = made
        if self._turn.refusal:
            delta["refusal"] = self._turn.refusal
        self._begun = True
        if delta:
            yield {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}

    def end(self) -> Iterator[Mapping[str, Any]]:
        """How it finished, and the usage."""
        head = _head({}, self._model, "chat.completion.chunk")
        yield {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": self._turn.finish}]}
        yield {**head, "choices": [], "usage": usage_of(self._turn.usage)}


class _Turn:
    """What the model has said so far."""

    def __init__(self) -> None:
        self.text = ""
        self.calls: list[dict[str, Any]] = []
        self.refusal: str | None = None
        self.finish: str | None = None
        self.usage: Mapping[str, Any] = {}

    def take(self, response: Mapping[str, Any]) -> None:
        self.usage = response.get("usageMetadata") or self.usage
        if blocked := (response.get("promptFeedback") or {}).get("blockReason"):
            self._refuse(blocked)
        for candidate in (response.get("candidates") or ())[:1]:
            for part in (candidate.get("content") or {}).get("parts") or ():
                if "functionCall" in part:
                    self._call(part)
                elif not part.get("thought"):
                    self.text += part.get("text", "")
            reason = candidate.get("finishReason")
            if reason in BLOCKED:
                self._refuse(reason)
            elif reason:
                self.finish = "tool_calls" if self.calls else {"MAX_TOKENS": "length"}.get(reason, "stop")

    def _refuse(self, reason: str) -> None:
        self.finish, self.refusal = "content_filter", f"the provider declined: {reason}"

    def _call(self, part: Mapping[str, Any]) -> None:
        used, number = part["functionCall"], len(self.calls)
        function = {"name": used["name"], "arguments": json.dumps(used.get("args") or {})}
        call = {"index": number, "id": used.get("id") or f"call_{number}", "type": "function", "function": function}
        if signature := part.get("thoughtSignature"):
            call["extra_content"] = {"google": {"thought_signature": signature}}
        self.calls.append(call)


def usage_of(usage: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's usage. Google counts thinking beside the answer; both are billed as output."""
    prompt = usage.get("promptTokenCount") or 0
    completion = (usage.get("candidatesTokenCount") or 0) + (usage.get("thoughtsTokenCount") or 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": usage.get("cachedContentTokenCount") or 0},
    }


def _head(response: Mapping[str, Any], model: str, kind: str) -> dict[str, Any]:
    return {"id": response.get("responseId", ""), "object": kind, "created": 0, "model": model}
