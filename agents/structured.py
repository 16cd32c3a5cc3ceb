"""One structured model call: a reply that has to be of a form, and one more that may mend what was wrong with it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from sia_events.agents.client import Ask, Reply
from sia_events.shared.ports import WritingFailed

T = TypeVar("T")

# How much of an unusable reply its author is shown again.
SHOWN = 100_000


class Unusable(Exception):
    """A reply that breaks what was asked for; `problems` say how, in words its author can act on."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


async def structured(ask: Ask, system: str, prompt: str, read: Callable[[str], T]) -> tuple[T, bytes]:
    """What `read` makes of the model's reply, and the conversation as JSON lines.

    Where `read` raises Unusable, or the reply is empty or was cut off, the model is told so once. Raises WritingFailed
    when its second reply cannot be used either, and at once when the model refuses.
    """
    messages: list[Mapping[str, Any]] = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    said = list(messages)
    try:
        for again in (True, False):
            reply = await ask(messages)
            said.append({"role": "assistant", "content": reply.text, "finish_reason": reply.finish})
            try:
                return read(_whole(reply)), as_lines(said)
            except Unusable as unusable:
                if not again:
                    raise WritingFailed(f"the reply and its repair cannot be used: {unusable}") from unusable
                mend = [*_echo(reply.text), {"role": "user", "content": _complaint(unusable.problems)}]
                messages += mend
                said += mend[-1:]
    except WritingFailed as failed:
        raise WritingFailed(str(failed), as_lines(said)) from failed
    raise AssertionError("the second reply is read or refused")


def as_lines(messages: Sequence[Mapping[str, Any]]) -> bytes:
    """A conversation as JSON lines."""
    return b"".join(msgspec.json.encode(message) + b"\n" for message in messages)


def refused(reply: Reply) -> str | None:
    """How the model or its provider refused to answer, if one did."""
    if reply.refusal or reply.finish == "content_filter":
        return f"the model refused: {(reply.refusal or reply.text or 'its provider filtered the reply')[:300]}"
    return None


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, or that stands in it alone, in a fence or between other words."""
    start, end = text.find("{"), text.rfind("}") + 1
    try:
        # Not strict: a model that writes code into a string forgets to escape a line's end.
        found = json.loads(text[start:end], strict=False) if 0 <= start < end else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def fenced(text: str, language: str) -> list[str]:
    """The contents of the blocks in Markdown that are fenced as `language`."""
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```\s*$", text, re.MULTILINE | re.DOTALL)


def _whole(reply: Reply) -> str:
    if why := refused(reply):
        raise WritingFailed(why)
    if reply.finish == "length":
        raise Unusable("the reply was cut off at its limit of tokens; answer with less")
    if not reply.text.strip():
        raise Unusable("the reply was empty")
    return reply.text


def _echo(text: str) -> list[Mapping[str, Any]]:
    # Some providers take no empty message.
    if not text.strip():
        return []
    cut = f"\n[{len(text) - SHOWN:,} more characters are left out here]" if len(text) > SHOWN else ""
    return [{"role": "assistant", "content": text[:SHOWN] + cut}]


def _complaint(problems: Sequence[str]) -> str:
    listed = "\n".join(f"- {problem}" for problem in problems)
    return f"This reply cannot be used:\n{listed}\n\nMend that and send the whole reply again, in the form asked for."
