"""One call of a model: found in the journal, or asked for within the budget, and on disk before it counts."""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid5

import msgspec
import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_before_delay, wait_exponential, wait_random

from sia_events.model_gateway import completion
from sia_events.model_gateway.budget import OverBudget
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.ledger import Ledger
from sia_events.model_gateway.reading import Reading
from sia_events.model_gateway.token import Claims
from sia_events.model_gateway.wire import Ask, Body, Question, Refused, Wire
from sia_events.shared.calls import ModelCall, journal_key
from sia_events.shared.failpoints import reach
from sia_events.shared.ports import Clock, ModelFailed, Models
from sia_events.shared.record import NAMESPACE

# How a reply is delivered; a call that is asked for again in the other way is the same call.
DELIVERY = ("stream", "stream_options")
# What no change of the request would mend: the run was set up with it.
NOT_THE_CALLERS = ("no_key", "unknown_model", "rate_limited", "timeout")
# The embedded model takes a few seconds to start.
QUIET_S, COMPLAINTS_S = 5.0, 20.0
# How many faults are remembered to have been recorded.
KEPT = 1024

log = structlog.get_logger()
_backoff = wait_exponential(multiplier=0.2, max=5) + wait_random(0, 0.5)


class Calls:
    """All calls of this gateway. A call that is being read is joined, not made a second time."""

    def __init__(
        self, journal: Journal, models: Callable[[str], Models], clock: Clock, ledger: Ledger, patience: float
    ) -> None:
        self._journal = journal
        self._models = models
        self._clock = clock
        self._ledger = ledger
        self._patience = patience
        self._under_way: dict[tuple[str, ...], tuple[Reading, asyncio.Task[None]]] = {}
        self._complained: dict[str, float] = {}
        self._told: OrderedDict[tuple[str, str, str], None] = OrderedDict()

    async def read(self, wire: Wire, claims: Claims, body: Body, streamed: bool) -> Reading:
        """The reply to a request, from the journal where it is recorded. Raises Refused for a model of others."""
        model, adapter = allowed(claims, body.get("model"))
        asked = {name: value for name, value in body.items() if name not in DELIVERY}
        digest = hashlib.sha256(msgspec.json.encode([wire.name, asked], order="sorted")).hexdigest()
        recorded = await self._journal.open(claims.run, claims.attempt)
        n = self._journal.number(claims.run, claims.start, digest)
        seed = int.from_bytes(hashlib.sha256(f"{claims.seed}/{digest}/{n}".encode()).digest()[:4]) >> 1
        name = str(uuid5(NAMESPACE, f"{claims.run}/{claims.attempt}/{digest}/{n}"))
        if known := recorded.get((digest, n)):
            reading = Reading(Ask(claims, body, model, adapter, known.call, seed))
            assert known.reply is not None, "the journal gives out replies"
            reading.native = wire.native(known.reply)
            reading.end(known)
            return reading
        key = (claims.run, journal_key(claims.attempt), digest, str(n))
        if key not in self._under_way:
            self._require_room(claims, len(recorded))
            reading = Reading(Ask(claims, body, model, adapter, name, seed))
            reading_on = asyncio.create_task(self._read(wire, reading, digest, n, streamed))
            self._under_way[key] = reading, reading_on
            reading_on.add_done_callback(lambda _: self._under_way.pop(key))
        return self._under_way[key][0]

    def _require_room(self, claims: Claims, recorded: int) -> None:
        """Raises Refused when the attempt has made all the calls that it may make."""
        if claims.calls is None:
            return
        mine = (claims.run, journal_key(claims.attempt))
        if recorded + sum(key[:2] == mine for key in self._under_way) >= claims.calls:
            raise Refused(429, f"this attempt may make {claims.calls} model calls and has made them; none is left")

    async def _read(self, wire: Wire, reading: Reading, digest: str, n: int, streamed: bool) -> None:
        try:
            reading.end(await self._call(wire, reading, digest, n, streamed))
        except Refused as refused:
            reading.end(None, refused)
        except asyncio.CancelledError:
            reading.end(None)
            raise
        except Exception as error:
            # Whoever follows it raises this; there may be nobody left who does.
            log.error("a model call was lost", call=reading.ask.call, error=f"{type(error).__name__}: {error}")
            reading.end(None, error)

    async def _call(self, wire: Wire, reading: Reading, digest: str, n: int, streamed: bool) -> ModelCall:
        """Ask the provider and record what came of it."""
        ask, started, at = reading.ask, time.monotonic(), self._clock.now()
        claims, metadata = ask.claims, ask.body.get("metadata")
        item = metadata.get("item") if isinstance(metadata, dict) else None
        came = await self._outcome(wire, reading, streamed)
        call = ModelCall(
            call=ask.call,
            attempt=claims.attempt,
            version=claims.version,
            role=claims.role,
            kind="choice" if wire.name == "choice" else "chat",
            model=ask.model,
            adapter=ask.adapter,
            item=item if isinstance(item, str) else None,
            digest=digest,
            n=n,
            seed=ask.seed,
            request=dict(ask.body),
            reply=None if came.reply is None else dict(came.reply),
            error=came.error,
            fault=came.fault,
            prompt_tokens=came.usage.get("prompt_tokens") or 0,
            completion_tokens=came.usage.get("completion_tokens") or 0,
            usd=came.usd,
            seconds=round(time.monotonic() - started, 4),
            time=at.isoformat().replace("+00:00", "Z"),
        )
        # An agent that asks on and on for what it does not get fills no disk: one record says it.
        if came.reply is not None or came.usage or self._first(claims, came.fault):
            reach("model_gateway before recording a call")
            await self._journal.record(claims.run, call)
            reach("model_gateway after recording a call")
        return call

    async def _outcome(self, wire: Wire, reading: Reading, streamed: bool) -> "_Outcome":
        """Set aside, ask, settle. Raises Refused for a request that cannot be served."""
        ask, worst = reading.ask, worst_prompt(reading.ask.body)
        try:
            question = wire.question(self._models(ask.model), ask)
            reading.native = question.native
            held = await self._ledger.reserve(ask.claims.run, ask.model, worst, question.max_tokens)
        except OverBudget as over:
            return _Outcome(error=str(over), fault="budget")
        except ModelFailed as failed:
            return _Outcome(error=str(failed), fault=failed.kind)
        reply, usage, failure = None, None, None
        try:
            reply = await self._patiently(question, reading, streamed)
            # Who tells no count is held to the most that it can have been: money spent is never counted as none.
            usage = wire.usage(reply)
            if not usage.get("prompt_tokens") and not usage.get("completion_tokens"):
                usage = completion.usage_of(worst, question.max_tokens)
        except ModelFailed as failed:
            failure = failed
            # What had come is paid for, and who broke off told no count: a part has a token at least.
            usage = completion.usage_of(worst, len(reading.parts)) if reading.parts else None
        finally:
            usd = await self._ledger.settle(held, usage)
        if failure is None:
            return _Outcome(reply, usage=usage or {}, usd=usd)
        if not reading.parts and _is_the_callers(failure):
            raise Refused(failure.status, str(failure)) from failure
        return _Outcome(error=str(failure), fault=failure.kind, usage=usage or {}, usd=usd if usage else 0.0)

    def _tell(self, ask: Ask, state: RetryCallState) -> None:
        """Say that a provider keeps us waiting, seldom and for all its calls: who follows would take it for a hang."""
        now = time.monotonic()
        long, lately = (state.seconds_since_start or 0.0) > QUIET_S, self._complained.get(ask.model, float("-inf"))
        if state.outcome and long and now > lately + COMPLAINTS_S:
            self._complained[ask.model] = now
            why = str(state.outcome.exception())
            log.warning("a model does not answer, and is asked again", model=ask.model, why=why)

    async def _patiently(self, question: Question, reading: Reading, streamed: bool) -> Body:
        """Ask again, ever more slowly, while the fault is the provider's and nothing of a reply has come.

        A provider that says when to come back is asked then, unless that is later than we have patience for.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: not reading.parts and _passes(error)),
            stop=stop_before_delay(self._patience),
            wait=_pause,
            before_sleep=lambda state: self._tell(reading.ask, state),
            reraise=True,
        )
        async for go in retrying:
            with go:
                if not streamed:
                    return await question.whole()
                async for part in question.parts():
                    reading.add(part)
                return question.gather(reading.parts)
        raise AssertionError("retrying ends with a reply or a raise")

    def _first(self, claims: Claims, fault: str) -> bool:
        """Whether this start of the program has not been told of this fault before."""
        told = (claims.run, claims.start, fault)
        if told in self._told:
            return False
        self._told[told] = None
        while len(self._told) > KEPT:
            self._told.popitem(last=False)
        return True


@dataclass(frozen=True)
class _Outcome:
    """What came of a call. `usage` is empty where nothing was used."""

    reply: Body | None = None
    error: str | None = None
    fault: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)
    usd: float | None = 0.0


def allowed(claims: Claims, asked: Any) -> tuple[str, str | None]:
    """Model and adapter that answer who asks for `asked`, with or without its provider's name. Raises Refused."""
    if asked is None or asked in _names(claims.model):
        return claims.model, claims.adapter
    for model in claims.models:
        if asked in _names(model):
            return model, None
    if claims.any_model:
        return claims.model, claims.adapter
    may = ", ".join((claims.model, *claims.models))
    raise Refused(403, f"{claims.attempt} may not use the model {asked!r}; it may use {may} (SIA_MODEL names its own)")


def worst_prompt(body: Body) -> int:
    """At most how many tokens the prompt is, told before anybody counted: two bytes of the request a token, and 16."""
    return len(msgspec.json.encode(body)) // 2 + 16


def _names(model: str) -> tuple[str, str]:
    return model, model.partition("/")[2]


def _passes(error: BaseException) -> bool:
    """Whether the same request may well be answered later."""
    return (
        isinstance(error, ModelFailed)
        and (error.status >= 500 or error.status in (408, 429))
        and error.kind not in ("garbage", "unsupported")
    )


def _is_the_callers(failed: ModelFailed) -> bool:
    """Whether the request was at fault, and not the provider or how the run was set up."""
    return 400 <= failed.status < 500 and failed.status not in (408, 429) and failed.kind not in NOT_THE_CALLERS


def _pause(state: RetryCallState) -> float:
    failed = state.outcome.exception() if state.outcome else None
    asked_for = failed.retry_after if isinstance(failed, ModelFailed) else None
    return max(_backoff(state), asked_for or 0.0)
