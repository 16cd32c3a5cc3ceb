"""OpenAI's response object, the events of its stream, and how each is made of the other and of a completion."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sia_events.model_gateway import completion
from sia_events.model_gateway.wire import Ask, Body, named_frame
from sia_events.shared.ports import ModelFailed

CLOSING = frozenset({"response.completed", "response.incomplete", "response.failed"})
ENDS = {"length": "max_output_tokens", "content_filter": "content_filter"}
ECHOED = ("instructions", "metadata", "max_output_tokens", "temperature", "top_p", "text")


def response(ask: Ask, reply: Body) -> Body:
    """A chat.completion as a response."""
    text, calls, finish = completion.message_of(reply)
    output = [_message(ask, text)] if text else []
    for number, call in enumerate(calls):
        output.append(_call(ask, number, call["id"], call["function"]["name"], call["function"]["arguments"]))
    cut = ENDS.get(finish)
    return {
        **_opened(ask),
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": cut} if cut else None,
        "output": output,
        "usage": _usage(completion.usage(reply)),
    }


def usage(reply: Body) -> Body:
    """OpenAI's usage of a chat, of a response."""
    told = reply.get("usage") or {}
    cached = (told.get("input_tokens_details") or {}).get("cached_tokens") or 0
    return completion.usage_of(told.get("input_tokens") or 0, told.get("output_tokens") or 0, cached)


def events(reply: Body) -> Iterator[Body]:
    """The stream of a response that is there as a whole: each item at once, its text and arguments in one piece."""
    opened = {**reply, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    told: list[Body] = [{"type": f"response.{name}", "response": opened} for name in ("created", "in_progress")]
    for place, item in enumerate(reply["output"]):
        begun = dict(item)
        pieces: list[Body] = []
        if item["type"] == "message":
            begun["content"] = []
            for number, part in enumerate(item["content"]):
                pieces += _told_whole({"item_id": item["id"], "output_index": place, "content_index": number}, part)
        elif item["type"] == "function_call":
            begun["arguments"] = ""
            pieces += _arguments({"item_id": item.get("id"), "output_index": place}, item, [item["arguments"]])
        told.append({"type": "response.output_item.added", "output_index": place, "item": begun})
        told += pieces
        told.append({"type": "response.output_item.done", "output_index": place, "item": item})
    told.append({"type": f"response.{reply['status']}", "response": reply})
    for number, event in enumerate(told):
        yield {**event, "sequence_number": number}


def gather(parts: Sequence[Body]) -> Body:
    """The response that a stream ends with. Raises ModelFailed when it has no end, or ends in an error."""
    last = parts[-1] if parts else {}
    if last.get("type") in ("response.completed", "response.incomplete"):
        return last["response"]
    if last.get("type") in ("response.failed", "error"):
        said = last.get("message") or (last.get("response") or {}).get("error")
        raise ModelFailed(502, f"the provider ended its stream with an error: {said}")
    raise ModelFailed(502, f"the provider's stream broke off after {len(parts)} events", "garbage")


class ResponseEncoder:
    """Chunks of a chat completion as the events of a response, each as soon as its chunk is there."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._sent = 0
        self._text: str | None = None
        self._text_place = 0
        self._calls: dict[int, dict[str, Any]] = {}

    def feed(self, part: Body) -> Iterable[bytes]:
        return self._framed(self._events(part))

    def close(self, reply: Body) -> Iterable[bytes]:
        whole = {**response(self._ask, reply), "output": [item for _, item in sorted(self._items(), key=_place)]}
        last = {"type": f"response.{whole['status']}", "response": whole}
        return self._framed([*self._begin(), *self._ended(), last])

    def _framed(self, events: Iterable[Body]) -> Iterator[bytes]:
        for event in events:
            yield named_frame({**event, "sequence_number": self._sent})
            self._sent += 1

    def _events(self, part: Body) -> Iterator[Body]:
        yield from self._begin()
        for choice in part.get("choices") or ():
            delta = choice.get("delta") or {}
            if said := delta.get("content") or delta.get("refusal"):
                if self._text is None:
                    self._text, self._text_place = "", len(self._calls)
                    item = {**_message(self._ask, ""), "status": "in_progress", "content": []}
                    yield {"type": "response.output_item.added", "output_index": self._text_place, "item": item}
                    yield {"type": "response.content_part.added", **self._text_at(), "part": _text("")}
                self._text += said
                yield {"type": "response.output_text.delta", **self._text_at(), "delta": said, "logprobs": []}
            for call in delta.get("tool_calls") or ():
                yield from self._called(call.get("index", 0), call)

    def _called(self, index: int, part: Body) -> Iterator[Body]:
        function = part.get("function") or {}
        if index not in self._calls:
            number = len(self._calls)
            item = _call(self._ask, number, part.get("id") or "", function.get("name") or "", "")
            self._calls[index] = {"place": number + (self._text is not None), "item": item}
            begun = {**item, "status": "in_progress"}
            yield {"type": "response.output_item.added", "output_index": self._calls[index]["place"], "item": begun}
        call = self._calls[index]
        if written := function.get("arguments"):
            call["item"]["arguments"] += written
            at = {"item_id": call["item"]["id"], "output_index": call["place"]}
            yield {"type": "response.function_call_arguments.delta", **at, "delta": written}

    def _ended(self) -> Iterator[Body]:
        """How every item ends."""
        for place, item in self._items():
            if item["type"] == "message":
                yield {"type": "response.output_text.done", **self._text_at(), "text": self._text, "logprobs": []}
                yield {"type": "response.content_part.done", **self._text_at(), "part": item["content"][0]}
            else:
                yield from _arguments({"item_id": item["id"], "output_index": place}, item, ())
            yield {"type": "response.output_item.done", "output_index": place, "item": item}

    def _items(self) -> Iterator[tuple[int, Body]]:
        """What was said and called, each with its place in the output."""
        if self._text is not None:
            yield self._text_place, _message(self._ask, self._text)
        for call in self._calls.values():
            yield call["place"], call["item"]

    def _begin(self) -> Iterator[Body]:
        if not self._sent:
            for name in ("created", "in_progress"):
                yield {"type": f"response.{name}", "response": _opened(self._ask)}

    def _text_at(self) -> dict[str, Any]:
        item = _message(self._ask, "")["id"]
        return {"item_id": item, "output_index": self._text_place, "content_index": 0}


def _opened(ask: Ask) -> dict[str, Any]:
    """A response at its beginning. Its time is left at 0: a reply must not depend on when it is read."""
    return {
        "id": f"resp_{ask.call.replace('-', '')}",
        "object": "response",
        "created_at": 0,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": ask.model,
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": ask.body.get("tool_choice") or "auto",
        "tools": ask.body.get("tools") or [],
        "usage": None,
        **{name: ask.body.get(name) for name in ECHOED},
    }


def _message(ask: Ask, text: str) -> dict[str, Any]:
    head = {"type": "message", "id": f"msg_{ask.call.replace('-', '')}", "role": "assistant", "status": "completed"}
    return {**head, "content": [_text(text)]}


def _text(text: str) -> Body:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(ask: Ask, number: int, call: str, name: str, arguments: str) -> dict[str, Any]:
    head = {"type": "function_call", "id": f"fc_{ask.call.replace('-', '')}_{number}", "status": "completed"}
    return {**head, "call_id": call, "name": name, "arguments": arguments}


def _place(told: tuple[int, Body]) -> int:
    return told[0]


def _told_whole(at: Body, part: Body) -> Iterator[Body]:
    kind, name = ("refusal", "refusal") if part["type"] == "refusal" else ("output_text", "text")
    yield {"type": "response.content_part.added", **at, "part": {**part, name: ""}}
    yield {"type": f"response.{kind}.delta", **at, "delta": part[name], "logprobs": []}
    yield {"type": f"response.{kind}.done", **at, name: part[name], "logprobs": []}
    yield {"type": "response.content_part.done", **at, "part": part}


def _arguments(at: Body, item: Body, pieces: Sequence[str]) -> Iterator[Body]:
    for piece in pieces:
        yield {"type": "response.function_call_arguments.delta", **at, "delta": piece}
    whole = {"name": item["name"], "arguments": item["arguments"]}
    yield {"type": "response.function_call_arguments.done", **at, **whole}


def _usage(told: Body) -> Body:
    prompt, written = told.get("prompt_tokens") or 0, told.get("completion_tokens") or 0
    reasoning = (told.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": completion.cached(told)},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + written,
    }
