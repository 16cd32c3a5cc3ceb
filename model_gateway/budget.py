"""The run's budget: what a call may cost at most is reserved before it is made, and settled when it is over."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import structlog

from sia_events.shared.calls import decode_call
from sia_events.shared.events import Budget, BudgetExhausted, RunPaused
from sia_events.shared.oversight import active_minutes
from sia_events.shared.ports import Bus, Clock, ModelFailed
from sia_events.shared.record import Draft, Record, answers, derived_id
from sia_events.shared.run import Run, fold

LOOK_S = 1.0
WARN_AT = (0.5, 0.8)
RATE_S = 60.0

Limit = Literal["usd", "minutes", "tokens", "calls"]
# US dollars of a call: the model, and OpenAI's usage object. None where nobody knows the price.
Price = Callable[[str, Mapping[str, Any]], float | None]

log = structlog.get_logger()


class OverBudget(Exception):
    """The call would pass a limit of its run: it must not be made."""

    def __init__(self, limit: Limit, allowed: float, spent: float) -> None:
        super().__init__(
            f"the run's budget of {allowed:g} {limit} is used up ({spent:g} spent): this call was not made. "
            f"What was recorded is kept. sia budget RUN --{limit} MORE goes on."
        )
        self.limit, self.allowed, self.spent = limit, allowed, spent


@dataclass(frozen=True)
class Spend:
    """What calls took, or are held to take at most."""

    usd: float = 0.0
    tokens: int = 0
    calls: int = 0

    def __add__(self, other: "Spend") -> "Spend":
        return Spend(self.usd + other.usd, self.tokens + other.tokens, self.calls + other.calls)

    def __sub__(self, other: "Spend") -> "Spend":
        return Spend(self.usd - other.usd, self.tokens - other.tokens, self.calls - other.calls)


@dataclass(frozen=True)
class Reservation:
    """Room held for one call until it is settled."""

    run: str
    model: str
    worst: Spend


@dataclass
class _Account:
    spent: Spend
    held: Spend = Spend()
    limits: Budget = field(default_factory=Budget)
    history: Sequence[Record] = ()
    state: Run = field(default_factory=Run)
    looked: float = float("-inf")
    rate: float | None = None
    recent: deque[tuple[float, float]] = field(default_factory=deque)
    warned: set[tuple[Limit, float]] = field(default_factory=set)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)


class Ledger:
    """What the runs of this gateway have spent. One gateway answers a run, so its books are all there is.

    Limits are read again from the run's history at most once in LOOK_S. What was spent before this process began is
    counted from the recorded calls. Calls answered from the journal cost nothing.
    """

    def __init__(self, bus: Bus, clock: Clock, price: Price) -> None:
        self._bus = bus
        self._clock = clock
        self._price = price
        self._accounts: dict[str, _Account] = {}
        self._opening = asyncio.Lock()

    async def look(self, run: str) -> None:
        await self._account(run)

    async def reserve(self, run: str, model: str, prompt_tokens: int, max_tokens: int) -> Reservation:
        """Room for a call of at most so many tokens. It waits while calls under way hold what is left.

        Raises OverBudget, after recording it in the run, when even an idle run could not make the call; ModelFailed
        where money is limited and the model has no price.
        """
        account = await self._account(run)
        usd = self._price(model, {"prompt_tokens": prompt_tokens, "completion_tokens": max_tokens})
        if usd is None and account.limits.usd is not None:
            raise ModelFailed(
                400,
                f"the run has a limit in dollars, and {model} has no price: nothing was called. "
                f'Give it one under [prices."{model}"] in config.toml, or limit tokens or calls instead.',
                "refused",
            )
        worst = Spend(usd or 0.0, prompt_tokens + max_tokens, 1)
        async with account.news:
            while over := self._over(account, worst):
                if account.held == Spend() or over == "minutes":
                    if await self._look(run, account):
                        continue  # somebody may have said meanwhile that there is more
                    raise await self._exhausted(run, account, over)
                await account.news.wait()
            account.held += worst
        return Reservation(run, model, worst)

    async def settle(self, reservation: Reservation, usage: Mapping[str, Any] | None) -> float | None:
        """Give the room back and count what was really used; `usage` None: no reply, nothing is counted as spent.

        Returns the call's US dollars, None where the model has no price.
        """
        account = self._accounts[reservation.run]
        async with account.news:
            account.held -= reservation.worst
            if account.held.calls == 0:
                account.held = Spend()  # sums of floats leave a rest
            usd: float | None = 0.0
            if usage is not None:
                usd = self._price(reservation.model, usage)
                account.spent += Spend(usd or 0.0, _tokens(usage), 1)
                self._warn(reservation.run, account)
            account.news.notify_all()
        if usd and account.rate is not None:
            await self._watch_rate(reservation.run, account, usd)
        return usd

    async def _account(self, run: str) -> _Account:
        async with self._opening:
            if run not in self._accounts:
                self._accounts[run] = _Account(await self._recorded(run))
            account = self._accounts[run]
            if time.monotonic() - account.looked > LOOK_S:
                await self._look(run, account)
            return account

    async def _look(self, run: str, account: _Account) -> bool:
        """Read the run's limits again; whether there was any news."""
        history = await self._bus.history(run)
        account.looked, known = time.monotonic(), len(account.history)
        if len(history) == known:
            return False
        account.history, account.state = history, fold(history[known:], account.state)
        settings = account.state.settings
        account.limits, account.rate = settings.budget, settings.pause_usd_per_minute
        return True

    async def _recorded(self, run: str) -> Spend:
        spent = Spend()
        for envelope in await self._bus.traces(run, "model_call", None):
            for call in map(decode_call, envelope.lines):
                # A reply that broke off is paid for too.
                if call.reply is not None or call.completion_tokens:
                    spent += Spend(call.usd or 0.0, call.prompt_tokens + call.completion_tokens, 1)
        return spent

    def _over(self, account: _Account, worst: Spend) -> Limit | None:
        """The first limit that a call of `worst` would pass."""
        # Minutes are counted from all the run's records: only where they are limited.
        if account.limits.minutes is not None and self._minutes(account) >= account.limits.minutes:
            return "minutes"
        total = account.spent + account.held + worst
        for limit in ("usd", "tokens", "calls"):
            allowed = getattr(account.limits, limit)
            if allowed is not None and getattr(total, limit) > allowed:
                return limit
        return None

    def _minutes(self, account: _Account) -> float:
        return active_minutes(account.history, self._clock.now())

    async def _exhausted(self, run: str, account: _Account, limit: Limit) -> OverBudget:
        """The refusal, once it stands in the run. The same limit is recorded once, however many calls meet it."""
        spent = self._minutes(account) if limit == "minutes" else getattr(account.spent, limit)
        over = OverBudget(limit, getattr(account.limits, limit), round(spent, 6))
        if account.history:
            cause = _last_word(account.history)
            event = BudgetExhausted(limit=limit, allowed=over.allowed, spent=over.spent)
            name = derived_id(run, cause.id, "model_gateway", f"exhausted {limit}")
            await self._bus.append(run, [Draft(event, "model_gateway", cause.id, cause.correlation, name)])
        return over

    async def _watch_rate(self, run: str, account: _Account, usd: float) -> None:
        """Hold the run when the last minute cost more than it may."""
        now = time.monotonic()
        account.recent.append((now, usd))
        while account.recent[0][0] < now - RATE_S:
            account.recent.popleft()
        spent = round(sum(each for _, each in account.recent), 9)  # sums of floats have a rest
        if account.rate is not None and spent > account.rate and account.history:
            reason = f"{spent:.2f} US dollars in {RATE_S:.0f} s of model calls: over {account.rate:g} a minute"
            account.recent.clear()
            cause = account.history[-1]
            drafts = answers(run, cause, "model_gateway", [RunPaused(reason=reason)])
            await self._bus.append(run, drafts)

    def _warn(self, run: str, account: _Account) -> None:
        for limit in ("usd", "tokens", "calls"):
            allowed = getattr(account.limits, limit)
            share = getattr(account.spent, limit) / allowed if allowed else 0.0
            for mark in WARN_AT:
                if share >= mark and (limit, mark) not in account.warned:
                    account.warned.add((limit, mark))
                    log.warning(f"{mark:.0%} of the run's budget is spent", run=run, limit=limit, allowed=allowed)


def _tokens(usage: Mapping[str, Any]) -> int:
    return int(usage.get("prompt_tokens") or 0) + int(usage.get("completion_tokens") or 0)


def _last_word(history: Sequence[Record]) -> Record:
    """The last record that said how much may be spent."""
    said = [r for r in history if r.cause is None or r.type in ("RunStarted", "RunBranched", "BudgetChanged")]
    return said[-1] if said else history[0]
