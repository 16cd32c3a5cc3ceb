"""Rollouts out of the log: recorded model calls joined with the rewards of what they were made for. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from sia_events.shared.calls import ModelCall

WHOLE = ""


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One model call: a choice is one action, a completion an action a token.

    Only what the model itself wrote is acted on: what tools and people said stands in `prompt_ids`, on which no loss
    falls. `logprobs` are the behaviour policy's, of every choice or of every token of the completion; None where
    whoever answered told none. Token ids are those that were sampled; nothing is ever tokenised again.
    """

    kind: Literal["choice", "completion"]
    prompt_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    choice_ids: tuple[tuple[int, ...], ...] = ()
    index: int = 0
    bias: tuple[float, ...] | None = None
    completion_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0


class Sample(msgspec.Struct, frozen=True):
    """A whole attempt at an item: its calls in the order they were made, and the reward that they share.

    Samples of one `group` are tries at the same item by the same policy. `adapter` and `harness` are the digests of
    what acted, `lag` how many adapters it is behind the one that learns.
    """

    group: str
    item: str
    reward: float
    steps: tuple[Step, ...]
    adapter: str | None = None
    harness: str | None = None
    lag: int = 0


@dataclass(frozen=True)
class Source:
    """One attempt's calls and the rewards of its items, with the weights and the harness that acted.

    With a `group` the whole attempt is one sample of that group: all its calls share the reward, which is under WHOLE.
    """

    attempt: str
    calls: Sequence[ModelCall]
    rewards: Mapping[str, float]
    adapter: str | None = None
    harness: str | None = None
    lag: int = 0
    group: str | None = None


def gather(
    sources: Sequence[Source], *, max_lag: int = 0, context: int | None = None, needs_logprobs: bool = True
) -> tuple[list[Sample], Counter[str]]:
    """The samples to learn from, in the log's order, and how many calls or samples were left out, by reason.

    Calls: `other_start` was made by a start of the program that broke off, and is no part of what was rewarded;
    `no_item` is the harness's own business (calibration, say), `unrewarded` names an unknown item, the others are
    unfit: `other_weights`, `temperature_0` (an arg-max is no sample), `top_p` (cut off, so not what is learned),
    `constrained` (drawn under a grammar, of which the log-probs know nothing), `no_token_ids`, `no_logprobs`, `empty`,
    `too_long` (over `context` tokens). Samples: `stale` are more than `max_lag` adapters behind, `no_calls` had none
    that is fit.
    """
    found: list[Sample] = []
    counts: Counter[str] = Counter()
    for source in sources:
        tries: dict[str, list[ModelCall]] = {}
        for call in source.calls:
            if call.other_start:
                counts["other_start"] += 1
                continue
            item = WHOLE if source.group else call.item
            if item is None or item not in source.rewards:
                counts["no_item" if item is None else "unrewarded"] += 1
            else:
                tries.setdefault(item, []).append(call)
        if source.lag > max_lag:
            counts["stale"] += len(tries)
            continue
        for item, calls in tries.items():
            steps = []
            for call in sorted(calls, key=lambda call: (call.time, call.digest, call.n)):
                step = _step(call, rollout=source.group is not None)
                if unfit := _unfit(call, step, source, context, needs_logprobs):
                    counts[unfit] += 1
                else:
                    steps.append(step)
            if not steps:
                counts["no_calls"] += 1
                continue
            group = source.group or f"{source.attempt}/{item.split('#')[0]}"
            name, reward = source.attempt if source.group else item, source.rewards[item]
            found.append(Sample(group, name, reward, tuple(steps), source.adapter, source.harness, source.lag))
    return found, counts


def to_lines(found: Sequence[Sample]) -> bytes:
    return b"".join(msgspec.json.encode(sample) + b"\n" for sample in found)


def _step(call: ModelCall, rollout: bool) -> Step:
    assert call.reply is not None, "a trajectory has calls with a reply only"
    temperature, top_p = _sampling(call, rollout)
    prompt = tuple(call.reply.get("prompt_token_ids") or ())
    if call.kind == "choice":
        return Step(
            kind="choice",
            prompt_ids=prompt,
            logprobs=_numbers(call.reply.get("logprobs")),
            choice_ids=tuple(tuple(ids) for ids in call.reply.get("choice_token_ids") or ()),
            index=call.reply["index"],
            bias=_numbers(call.request.get("bias")),
            temperature=temperature,
        )
    said = call.reply["choices"][0] if call.reply.get("choices") else {}
    told = (said.get("logprobs") or {}).get("content")
    return Step(
        kind="completion",
        prompt_ids=prompt,
        logprobs=None if told is None else _numbers([token["logprob"] for token in told]),
        completion_ids=tuple(said.get("token_ids") or ()),
        temperature=temperature,
        top_p=top_p,
    )


def _sampling(call: ModelCall, rollout: bool) -> tuple[float, float]:
    """Temperature and top-p that the reply was drawn at. A `rollout`'s, and repeated items', are drawn at 1."""
    if rollout or (call.item is not None and "#" in call.item):
        return 1.0, 1.0
    usual = 0.0 if call.kind == "choice" else 1.0
    asked = (call.request.get("temperature"), call.request.get("top_p"))
    return usual if asked[0] is None else float(asked[0]), 1.0 if asked[1] is None else float(asked[1])


def _unfit(call: ModelCall, step: Step, source: Source, context: int | None, needs_logprobs: bool) -> str | None:
    """Why a call cannot be learned from, in the word that it is counted under; None when it can."""
    choice = step.kind == "choice"
    written = step.choice_ids if choice else (step.completion_ids,)
    actions = len(step.choice_ids if choice else step.completion_ids)
    if call.adapter != source.adapter:
        return "other_weights"
    if not step.temperature > 0:
        return "temperature_0"
    if step.top_p < 1:
        return "top_p"
    if needs_logprobs and not choice and _constrained(call.request):
        return "constrained"
    if not choice and not step.completion_ids and not call.completion_tokens:
        return "empty"
    if not step.prompt_ids or not written or not all(written):
        return "no_token_ids"
    if needs_logprobs and (step.logprobs is None or len(step.logprobs) != actions):
        return "no_logprobs"
    if context is not None and len(step.prompt_ids) + max(map(len, written)) > context:
        return "too_long"
    return None


def _constrained(asked: Mapping[str, Any]) -> bool:
    """Whether a chat asked for a reply that a grammar allows: its log-probs tell how likely it was among all others."""
    form, tool = asked.get("response_format") or {}, asked.get("tool_choice")
    return form.get("type", "text") != "text" or tool == "required" or isinstance(tool, Mapping)


def _numbers(values: Any) -> tuple[float, ...] | None:
    """Floats; None when there are none, or when one is null, as an infinity is told in JSON."""
    return None if values is None or None in values else tuple(float(value) for value in values)
