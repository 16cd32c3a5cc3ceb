"""Proof that an adapter reached the sampler: fixed texts, scored by whoever serves it and by the learner."""

import asyncio
import secrets
from collections.abc import Sequence
from datetime import timedelta
from http import HTTPStatus
from typing import Any

import httpx

from sia_events.shared.calls import AWAY
from sia_events.shared.events import Probe, Weights
from sia_events.shared.ports import BudgetSpent, Ports, ProviderAway

Text = tuple[tuple[int, ...], tuple[int, ...]]
Scores = Sequence[Sequence[float]]

EXACT, ROUGH = (1e-3, 1e-4), (1.0, 0.1)
"""Nats by which server and learner may differ, at one token and on average over all: what rounding makes of nothing.

The embedded model is float32 on both sides; another server's numbers may be bfloat16. In bfloat16 the embedded model is
0.03 off on average, 0.19 at most, at 400 tokens that it sampled; 0.07 and 0.43 at words that it finds unlikely.
"""
CALL_S = 600.0
SAID = 500


class AdapterNotServed(Exception):
    """Whoever serves the adapter's name does not serve its weights. Nothing was accepted; the adapter is kept."""


async def probe(
    ports: Ports,
    run: str,
    key: str,
    weights: Weights,
    before: Weights,
    texts: Sequence[Text],
    own: Scores,
) -> Probe:
    """Score `texts`, (prompt ids, completion ids), under `weights` and under what they started from, `before`.

    `own` are the learner's log-probs under the finished adapter, of each completion's tokens, in nats at temperature 1.
    The calls go through the gateway as every other and are recorded under "trainer.KEY". They are made anew each time:
    what is asked is what is served now. Raises AdapterNotServed when a token is too far from the learner's, when their
    sum is further off than rounding and half of what was learned, when what is served is nearer to `before` than to
    what was learned, or did not move at all; BudgetSpent; ProviderAway.
    """
    tokens = sum(len(completion) for _, completion in texts)
    if not tokens:
        raise ValueError("a probe needs a text at least")
    after, start = await _scored(ports, run, key, weights, texts), await _scored(ports, run, key, before, texts)
    apart, moved, learned = _apart(after, own), _apart(after, start), _apart(own, start)
    furthest, rounding = EXACT if weights.model.startswith("local/") else ROUGH
    off, served, meant, blur = sum(apart), sum(moved), sum(learned), rounding * tokens
    # Rounding may hide how far a small update moved, but not that it moved at all.
    unmoved = served == 0 and max(learned) > EXACT[1]
    nearer_the_start = meant > blur and off > served
    if unmoved or nearer_the_start or off > meant / 2 + blur or not max(apart) <= furthest:
        name = (weights.adapter or "none")[:12]
        stayed = served < meant / 2
        what = "what it started from is served in its place" if stayed else "other weights are served under its name"
        raise AdapterNotServed(
            f"adapter {name} of {weights.model} did not reach the sampler: {what}. The {tokens} tokens of {len(texts)} "
            f"texts are {off / tokens:.2g} nats from the learner's on average, {max(apart):.2g} at most (up to "
            f"{furthest:g} are let pass); they moved by {served / tokens:.2g} where it is served and by "
            f"{meant / tokens:.2g} where it was learned. The adapter is kept and was not accepted; start the model's "
            "server again, then: sia run --resume RUN."
        )
    return Probe(texts=len(texts), tokens=tokens, apart=round(max(apart), 6), moved=round(max(moved), 6))


async def within_budget(ports: Ports, run: str, key: str, weights: Weights, text: Text) -> None:
    """Return where the run may go on by its budget, as the gateway keeps the books; else raises BudgetSpent.

    It is asked to score `text`, which costs next to nothing. Raises ProviderAway and AdapterNotServed too.
    """
    await _scored(ports, run, key, weights, [text])


def _apart(one: Scores, other: Scores) -> list[float]:
    """By how much each token differs. Infinite where the two do not speak of the same tokens, or a score is none."""
    if [len(scores) for scores in one] != [len(scores) for scores in other]:
        return [float("inf")]
    apart = [abs(a - b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)]
    return [value if value == value else float("inf") for value in apart]


def claims(run: str, key: str, weights: Weights) -> dict[str, Any]:
    """What a token for probes says, but for their start and when they have to be over."""
    return {
        "run": run,
        "attempt": f"trainer.{key}",
        "version": key,
        "role": "trainer",
        "model": weights.model,
        "adapter": weights.adapter,
        "sample": False,
        "seed": 0,
    }


async def _scored(ports: Ports, run: str, key: str, weights: Weights, texts: Sequence[Text]) -> Scores:
    start = secrets.token_hex(8)
    expires = ports.clock.now() + timedelta(seconds=CALL_S)
    told = {**claims(run, key, weights), "start": start, "expires": expires.timestamp()}
    transport = httpx.AsyncHTTPTransport(uds=str(ports.door.socket))
    token = {"Authorization": f"Bearer {ports.door.token(told)}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=CALL_S, headers=token) as http:

        async def score(text: Text) -> Sequence[float]:
            # The start tells these calls from those of an earlier try, whose replies the journal has.
            body = {"prompt_token_ids": text[0], "completion_token_ids": text[1], "metadata": {"probe": start}}
            return _read(await http.post("/v1/logprobs", json=body), weights)

        try:
            return await asyncio.gather(*(score(text) for text in texts))
        except httpx.HTTPError as error:
            said = f"the gateway lost a probe of {weights.model}: {type(error).__name__}: {error}"
            raise AdapterNotServed(said) from error


def _read(response: httpx.Response, weights: Weights) -> Sequence[float]:
    name = f"{weights.model} with adapter {(weights.adapter or 'none')[:12]}"
    try:
        reply: Any = response.json()
        if response.status_code == HTTPStatus.OK:
            return reply["logprobs"]
        message = reply["error"]["message"]
    except (ValueError, LookupError, TypeError):
        # Not the gateway's words: something before it, or one that broke down.
        message = response.text[:SAID]
    said = f"{name} did not answer the probe ({response.status_code}): {message}"
    if response.status_code == HTTPStatus.PAYMENT_REQUIRED:
        raise BudgetSpent(said)
    raise ProviderAway(said) if response.status_code in AWAY.values() else AdapterNotServed(said)
