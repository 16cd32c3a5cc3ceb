"""One model call as it is recorded: a line of the trace stream, of a trajectory and of the table `model_calls`."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

AWAY: Mapping[str, int] = {"unavailable": 503, "rate_limited": 429, "timeout": 504, "no_key": 503}
"""The faults that neither the agent nor another try at once would mend, and the HTTP status that a caller is told them
by: the gateway has waited for the provider already, or the provider does not take the key."""


class ModelCall(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request, its reply, and on whose behalf. `error` stands where a reply would, when the provider had none.

    `request` is what the agent sent (without its credentials), `reply` the body it got, with token ids and
    log-probs. `fault` is the kind of an error (`FailedCall`, or "budget": refused by us). `usd` is None where nobody
    knows the model's price. `digest` is the SHA-256 of the request; with `n`, the how-manieth reply to it this is, it
    names the call in its attempt, which is how a repeated handler finds the recorded reply. `start` is the start of the
    attempt's program that asked. In a trajectory, a call of `other_start` was made by one that broke off, and its reply
    not given to the one whose outputs were taken.
    """

    call: str
    attempt: str
    start: str = ""
    version: str
    role: str = "target"
    kind: Literal["chat", "choice", "logprobs"]
    model: str
    adapter: str | None = None
    item: str | None = None
    digest: str
    n: int
    seed: int
    request: dict[str, Any]
    reply: dict[str, Any] | None = None
    error: str | None = None
    fault: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float | None = 0.0
    seconds: float = 0.0
    time: str = ""
    other_start: bool = False


class GivenAgain(msgspec.Struct, frozen=True):
    """That a `start` of an attempt's program was given the reply to a call of an earlier one, by that call's name."""

    start: str
    digest: str
    n: int


def spent(calls: Iterable[ModelCall]) -> dict[str, Any]:
    """What calls took: {calls, prompt_tokens, completion_tokens, usd}; usd None as soon as one has no price."""
    made = [call for call in calls if call.fault != "budget"]
    unpriced = any(call.usd is None for call in made)
    return {
        "calls": len(made),
        "prompt_tokens": sum(call.prompt_tokens for call in made),
        "completion_tokens": sum(call.completion_tokens for call in made),
        "usd": None if unpriced else round(sum(call.usd or 0.0 for call in made), 9),
    }


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(ModelCall)


def encode_call(call: ModelCall) -> bytes:
    return _encoder.encode(call)


def decode_call(line: bytes) -> ModelCall:
    """Raises msgspec.ValidationError for a line that is no model call."""
    return _decoder.decode(line)


def journal_key(attempt: str) -> str:
    """What an attempt's calls are kept under: all tries of one attempt share a journal, so none pays again."""
    return attempt.split("~")[0]
