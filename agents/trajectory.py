"""An attempt on dev in words: outcomes counted, items that went badly, and the trajectories chosen to be read."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sia_events.agents.evidence import Attempt, Chosen, PublicFeedback
from sia_events.agents.fit import Part, cut, fenced
from sia_events.shared.calls import ModelCall

TEXT_CHARS = 600
ASKED_CHARS = 900
REPLY_CHARS = 500
CALLS = 2
CHOICES = 4
ITEM_CHARS = 120
OUTPUTS = 20
ITEMS_HEAD = (
    "| item | outcome | the agent's output | tokens | seconds | text |\n| --- | --- | --- | --- | --- | --- |\n"
)


def outcomes(attempt: Attempt) -> list[Part]:
    """Outcomes counted, and which outputs they came with where there are few."""
    counts = Counter(one.outcome for one in attempt.feedback)
    counted = ", ".join(f"{outcome} {times}" for outcome, times in counts.most_common())
    where = f"{attempt.version} on {len(attempt.feedback)} items (record {attempt.record})"
    parts = [Part(f"{where}: {counted}.", "outcomes", 0, (attempt.record,))]
    outputs = Counter(one.output for one in attempt.feedback if one.output)
    right = Counter(one.output for one in attempt.feedback if one.outcome == "right")
    if outputs and len(outputs) <= OUTPUTS:
        told = ", ".join(f"{_one_line(out)} {times} ({right[out]} right)" for out, times in outputs.most_common())
        parts.append(Part(f"What it put out, and how often: {told}.", "outputs", 1))
    return parts


def bad_items(attempt: Attempt) -> list[Part]:
    """A row an item that did not go well; items that did are only counted, since their outputs are the answers."""
    bad = [one for one in attempt.feedback if one.outcome not in ("right", "above")]
    told = [one for one in bad if one.output or attempt.items.get(one.item)]
    return [
        Part(
            f"| {one.item} | {one.outcome} | {_one_line(one.output)} | {one.tokens} | {one.seconds:.1f} "
            f"| {_one_line(attempt.items.get(one.item, ''))} |",
            one.item,
            place,
            (attempt.record,),
        )
        for place, one in enumerate(told)
    ]


def trajectories(attempt: Attempt, chosen: Sequence[Chosen]) -> list[Part]:
    """The chosen items as parts, and of the calls that name no item of the split the longest and the first.

    An item of which neither text nor output nor calls are known, as where a task keeps its items to itself, is no part.
    """
    feedback = {one.item: one for one in attempt.feedback}
    by_item: dict[str | None, list[ModelCall]] = {}
    for call in attempt.calls:
        by_item.setdefault(call.item if call.item in attempt.items else None, []).append(call)
    parts = [
        Part(_item(attempt, one, feedback[one.item], by_item.get(one.item, [])), one.item, place, (attempt.record,))
        for place, one in enumerate(chosen)
        if attempt.items.get(one.item) or feedback[one.item].output or one.item in by_item
    ]
    untagged = by_item.get(None, [])
    if untagged:
        longest = max(untagged, key=lambda call: call.prompt_tokens + call.completion_tokens)
        samples = [longest] if longest is untagged[0] else [longest, untagged[0]]
        head = f"### {len(untagged)} calls that name no item of dev; the longest and the first"
        body = "\n\n".join(_call(call) for call in samples)
        parts.append(Part(f"{head}\n\n{body}", "calls without an item", len(parts), (attempt.record,)))
    return parts


def _item(attempt: Attempt, chosen: Chosen, seen: PublicFeedback, calls: Sequence[ModelCall]) -> str:
    text = attempt.items.get(seen.item, "")
    shown = [_call(call) for call in calls[:CALLS]]
    where = f"{seen.tokens:,} tokens, {seen.seconds:.1f} s, calls: {len(calls)}"
    lines = [
        f"### Item {seen.item}: {'; '.join(chosen.reasons)}",
        f"Outcome: {seen.outcome}. {where}; whole in blob {attempt.trajectory[:12]}, record {attempt.record}.",
        *(() if any(text in call for call in shown) else ("The item:\n" + fenced(cut(text, TEXT_CHARS)),)),
        *shown,
        "The agent's output:\n" + fenced(seen.output) if seen.output else "The agent put out nothing for it.",
    ]
    if len(calls) > CALLS:
        lines.insert(-1, f"{len(calls) - CALLS} more calls for this item are in the blob.")
    return "\n\n".join(lines)


def _call(call: ModelCall) -> str:
    asked = "\n".join(f"{_role(message)}: {_text(message)}" for message in call.request.get("messages", ()))
    if tools := call.request.get("tools"):
        asked += f"\n({len(tools)} tools offered)"
    reply = f"error: {call.error}" if call.reply is None else _reply(call.reply, call.request)
    figures = f"{call.prompt_tokens:,} tokens in, {call.completion_tokens:,} out, {call.seconds:.1f} s"
    question, answer = fenced(cut(asked, ASKED_CHARS)), fenced(cut(reply, REPLY_CHARS))
    return f"A {call.kind} call ({figures}):\n{question}\nIts reply:\n{answer}"


def _reply(reply: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    if "choice" in reply:
        choices, logprobs = request.get("choices", ()), reply.get("logprobs") or ()
        ranked = sorted(zip(choices, logprobs, strict=False), key=lambda pair: -pair[1])[:CHOICES]
        likely = ", ".join(f"{choice!r} {logprob:.2f}" for choice, logprob in ranked)
        return f"chose {reply['choice']!r}" + (f"; log-probs {likely}" if likely else "")
    for choice in reply.get("choices", ()):
        message = choice.get("message", {})
        ended = f"\n(ended by {choice['finish_reason']})" if choice.get("finish_reason") not in (None, "stop") else ""
        return _text(message) + ended
    return _text(reply)


def _role(message: Mapping[str, Any]) -> str:
    return str(message.get("role", "?"))


def _text(message: Mapping[str, Any]) -> str:
    """A message's words, and its tool calls as JSON; content blocks are joined."""
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(block.get("text", f"[{block.get('type')}]")) for block in content)
    calls = "".join(f"\ncalls {msgspec.json.encode(call).decode()}" for call in message.get("tool_calls") or ())
    return re.sub(r"\n{3,}", "\n\n", f"{content or ''}{calls}")


def _one_line(text: str) -> str:
    flat = " ".join(text.replace("|", "/").replace("`", "'").split())
    return f"`{flat if len(flat) <= ITEM_CHARS else flat[: ITEM_CHARS - 1] + '…'}`" if flat else ""
