"""One call of a model: found in the journal, or asked for within the budget, and on disk before it counts."""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid5

import msgspec
import structlog

from sia_events.model_gateway import completion
from sia_events.model_gateway.budget import OverBudget
from sia_events.model_gateway.held import Held
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.ledger import Ledger
from sia_events.model_gateway.patience import Patience, is_the_callers
from sia_events.model_gateway.reading import Reading
from sia_events.model_gateway.token import Claims
from sia_events.model_gateway.wire import Ask, Body, Question, Refused, Wire
from sia_events.shared.calls import AWAY, GivenAgain, ModelCall, journal_key
from sia_events.shared.failpoints import reach
from sia_events.shared.ports import Clock, ModelFailed, Models
from sia_events.shared.record import NAMESPACE

# How a reply is delivered; a call that is asked for again in the other way is the same call.
DELIVERY = ("stream", "stream_options")
# What is no chat, by its wire; every other wire is one.
KINDS: Mapping[str, Literal["choice", "logprobs"]] = {"choice": "choice", "logprobs": "logprobs"}
# How many faults are remembered to have been recorded.
KEPT = 1024
# What a provider may add to a prompt of its own, in tokens.
ADDED = 16
ENDING = "the gateway is ending: this call was not made"

log = structlog.get_logger()


class Calls:
    """All calls of this gateway. A call that is being read is joined, not made a second time.

    `models` finds what answers for a model name, "provider/model", and raises ModelFailed where nothing does. A
    provider that is away is asked again for `patience` seconds. What the journal makes a program wait for is in `held`.
    """

    def __init__(
        self, journal: Journal, models: Callable[[str], Models], clock: Clock, ledger: Ledger, patience: float
    ) -> None:
        self._journal = journal
        self._models = models
        self._clock = clock
        self._ledger = ledger
        self._patience = Patience(patience)
        self.held = Held()
        self._under_way: dict[tuple[str, ...], tuple[Reading, asyncio.Task[None]]] = {}
        self._told: OrderedDict[tuple[str, str, str], ModelCall] = OrderedDict()
        self._ending = False

    async def read(self, wire: Wire, claims: Claims, body: Body, streamed: bool, again: bool = False) -> Reading:
        """The reply to a request, from the journal where it is recorded; `again`: a client says that it sent it before.

        Raises Refused for a model of others.
        """
        model, adapter = allowed(claims, body.get("model"))
        asked = {name: value for name, value in body.items() if name not in DELIVERY}
        digest = hashlib.sha256(msgspec.json.encode([wire.name, asked], order="sorted")).hexdigest()
        with self.held.waiting(claims.run, claims.start):
            recorded = await self._journal.open(claims.run, claims.attempt)
        same = (claims.run, journal_key(claims.attempt), digest)
        under_way = [int(key[-1]) for key in self._under_way if key[:-1] == same]
        n = self._journal.number(claims.run, claims.start, digest, again, under_way)
        seed = int.from_bytes(hashlib.sha256(f"{claims.seed}/{digest}/{n}".encode()).digest()[:4]) >> 1
        name = str(uuid5(NAMESPACE, f"{claims.run}/{claims.attempt}/{digest}/{n}"))
        known = recorded.get((digest, n))
        reading = Reading(Ask(claims, body, model, adapter, known.call if known else name, seed))
        key = (*same, str(n))
        if known:
            assert known.reply is not None, "the journal gives out replies"
            reading.native = wire.native(known.reply)
            reading.end(known)
            await self._note(claims, known.start, digest, n)
            return reading
        if key in self._under_way:
            reading, _ = self._under_way[key]
            self.held.join(claims.run, claims.start, reading.ask.claims.start)
        elif refused := self._refused(claims, len(recorded)):
            reading.end(refused)
        elif away := self._away(claims):
            reading.end(away)
        else:
            self._begin(key, reading, lambda: self._call(wire, reading, digest, n, streamed))
        reading.if_unanswered(lambda: self._journal.give_back(claims.run, claims.start, digest, n))
        await self._note(claims, reading.ask.claims.start, digest, n)
        return reading

    async def end(self, seconds: float) -> None:
        """Take no new call, and wait so long for the replies that are under way: they are paid for, and recorded.

        What still waits for room in the budget, or for a provider that is away, is given up at once.
        """
        self._ending = True
        for reading, task in list(self._under_way.values()):
            if not reading.asked:
                task.cancel()
        tasks = {task for reading, task in self._under_way.values() if reading.asked}
        if not tasks:
            return
        log.warning("waiting for replies under way; interrupt again to end at once", calls=len(tasks), seconds=seconds)
        try:
            _, tasks = await asyncio.wait(tasks, timeout=seconds)
        finally:
            for task in tasks:
                task.cancel()
        if tasks:
            log.warning("replies did not come in time: they are asked, and paid for, again", calls=len(tasks))

    def _begin(self, key: tuple[str, ...], reading: Reading, call: Callable[[], Awaitable[ModelCall]]) -> None:
        def over(end: ModelCall | Exception) -> None:
            # In this order: who is told of the end and asks once more must not be given it again.
            del self._under_way[key]
            reading.end(end)

        async def read() -> None:
            try:
                end = await call()
            except Refused as refused:
                end = refused
            except Exception as error:
                # Whoever follows it raises this; there may be nobody left who does.
                log.error("a model call was lost", call=reading.ask.call, error=f"{type(error).__name__}: {error}")
                end = error
            over(end)

        def look(task: asyncio.Task[None]) -> None:
            if task.cancelled():
                over(Refused(500, ENDING))

        task = asyncio.create_task(read())
        task.add_done_callback(look)
        self._under_way[key] = reading, task

    async def _note(self, claims: Claims, asked_by: str, digest: str, n: int) -> None:
        """Put on record that an agent is given the reply to a call that another start of it has made."""
        if claims.role == "target" and asked_by != claims.start:
            with self.held.waiting(claims.run, claims.start):
                await self._journal.given_again(claims.run, claims.attempt, GivenAgain(claims.start, digest, n))

    def _refused(self, claims: Claims, recorded: int) -> Refused | None:
        """Why no new call is made: the gateway is ending, or the attempt has made all that it may make."""
        if self._ending:
            return Refused(500, ENDING)
        mine = (claims.run, journal_key(claims.attempt))
        if claims.calls is not None and recorded + sum(key[:2] == mine for key in self._under_way) >= claims.calls:
            return Refused(429, f"this attempt may make {claims.calls} model calls and has made them; none is left")
        return None

    def _away(self, claims: Claims) -> ModelCall | None:
        """The call of this start that was waited for in vain: what it asks since fails as that did, without a wait."""
        found = (self._told.get((claims.run, claims.start, fault)) for fault in AWAY)
        return next((call for call in found if call), None)

    async def _call(self, wire: Wire, reading: Reading, digest: str, n: int, streamed: bool) -> ModelCall:
        """Ask the provider and record what came of it."""
        ask, started, at = reading.ask, time.monotonic(), self._clock.now()
        claims, metadata = ask.claims, ask.body.get("metadata")
        item = metadata.get("item") if isinstance(metadata, dict) else None
        reach("model_gateway before asking a model")
        came = await self._outcome(wire, reading, streamed)
        call = ModelCall(
            call=ask.call,
            attempt=claims.attempt,
            start=claims.start,
            version=claims.version,
            role=claims.role,
            kind=KINDS.get(wire.name, "chat"),
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
        paid = came.reply is not None or came.usage
        if self._ending and not paid:
            # Not recorded and not blamed on anybody: with this status the box counts it as lost.
            raise Refused(500, ENDING)
        with self.held.waiting(claims.run, claims.start):
            if paid or await self._is_news(claims, call):
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
            with self.held.waiting(ask.claims.run, ask.claims.start):
                await self._ledger.look(ask.claims.run)
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
            with self.held.waiting(ask.claims.run, ask.claims.start):
                usd = await self._ledger.settle(held, usage)
        if failure is None:
            return _Outcome(reply, usage=usage or {}, usd=usd)
        if not reading.parts and is_the_callers(failure):
            raise Refused(failure.status, str(failure)) from failure
        # Nobody was waited for when a reply broke off: it may well come whole the next time.
        fault = "garbage" if reading.parts and failure.kind in AWAY else failure.kind
        return _Outcome(error=str(failure), fault=fault, usage=usage or {}, usd=usd if usage else 0.0)

    async def _patiently(self, question: Question, reading: Reading, streamed: bool) -> Body:
        """Ask again while the fault is the provider's and nothing of a reply has come, unless the gateway is ending."""

        def rests() -> None:
            reading.asked = False

        def goes_on() -> bool:
            return not (reading.parts or self._ending)

        async def ask() -> Body:
            reading.asked = True
            if not streamed:
                return await question.whole()
            async for part in question.parts():
                reading.add(part)
            return question.gather(reading.parts)

        return await self._patience.asked(reading.ask.model, ask, goes_on, rests)

    async def _is_news(self, claims: Claims, failed: ModelCall) -> bool:
        """Whether this start of the program has no such fault on record, but of calls that were answered since."""
        name, recorded = (claims.run, claims.start, failed.fault), await self._journal.open(claims.run, claims.attempt)
        if (told := self._told.get(name)) and (told.digest, told.n) not in recorded:
            return False
        self._told[name] = failed
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
    """At most how many tokens the prompt is, told before anybody counted: a byte of its UTF-8 is one at most."""
    return len(msgspec.json.encode(body)) + ADDED


def _names(model: str) -> tuple[str, str]:
    return model, model.partition("/")[2]
