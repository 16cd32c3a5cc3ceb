"""How likely given tokens are: asked and told in vLLM's form, which the embedded model's server speaks too.

Every token is asked about as the next one behind what stands before it, with `logprob_token_ids`, as vLLM has it since
May 2026. Its `prompt_logprobs` would tell a whole text at once, and break the server down as soon as two of them are
computed together where LoRA is on (vLLM issues 16668 and 29955, seen on 0.32.0).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from sia_events.shared.ports import ModelFailed

Tokens = tuple[int, ...]
Next = tuple[Tokens, int]
"""A token, and all that stands before it."""

PATH = "/v1/completions"
TOKENS, PROMPTS = 128, 512
"""How many tokens, and how many prompts, one request may be about: vLLM's bounds are 128 and 1024."""
PLAIN: Mapping[str, Any] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""A model folder may bring other sampling along; with these, what is drawn is drawn from what the log-probs tell."""


async def scores(
    ask: Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]],
    model: str,
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
) -> list[tuple[float, ...]]:
    """The log-prob, in nats, of every token of each of `completions` behind `prompt`.

    `ask` gets the reply to a request body, and may be asked several at once. Raises ModelFailed for a reply that does
    not tell.
    """
    wanted = [[((*prompt, *whole[:at]), token) for at, token in enumerate(whole)] for whole in completions]
    parts = batches(dict.fromkeys(each for whole in wanted for each in whole))
    replies = await asyncio.gather(*(ask(request(model, part)) for part in parts))
    told: dict[Next, float] = {}
    for part, reply in zip(parts, replies, strict=True):
        told |= read(part, reply)
    return [tuple(told[each] for each in whole) for whole in wanted]


def batches(wanted: Iterable[Next]) -> list[dict[Tokens, set[int]]]:
    """What is wanted, by what stands before it, in parts that one request each may be about."""
    parts: list[dict[Tokens, set[int]]] = []
    asked: set[int] = set()
    for before, token in wanted:
        if not parts or len(asked | {token}) > TOKENS or (before not in parts[-1] and len(parts[-1]) == PROMPTS):
            parts.append({})
            asked = set()
        parts[-1].setdefault(before, set()).add(token)
        asked.add(token)
    return parts


def request(model: str, part: Mapping[Tokens, set[int]]) -> dict[str, Any]:
    """The body that asks about a part. vLLM writes a token behind each prompt; which, is not read."""
    return {
        "model": model,
        "prompt": [list(before) for before in part],
        "max_tokens": 1,
        "temperature": 1.0,
        "logprobs": 1,
        "logprob_token_ids": sorted(set().union(*part.values())),
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
        **PLAIN,
    }


def read(part: Mapping[Tokens, set[int]], reply: Mapping[str, Any]) -> dict[Next, float]:
    try:
        tables = {choice["index"]: choice["logprobs"]["top_logprobs"][0] for choice in reply["choices"]}
        told = {
            (before, token): float(tables[at][f"token_id:{token}"])
            for at, (before, tokens) in enumerate(part.items())
            for token in tokens
        }
    except (LookupError, TypeError, ValueError) as error:
        said = f"no log-prob of a token that was asked about ({error!r}); vLLM tells them since May 2026"
        raise ModelFailed(502, said, "garbage") from error
    if not all(map(isfinite, told.values())):
        raise ModelFailed(502, "a log-prob that is no finite number", "garbage")
    return told
