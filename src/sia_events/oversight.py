"""The verbs by which a person has a say in a run under way: each is one event, whoever runs the services."""

import getpass
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pydantic import ValidationError

from sia_events import app
from sia_events.catching_up import settled
from sia_events.errors import Unusable
from sia_events.log_here import require_ours
from sia_events.roles import require_prices
from sia_events.shared.events import (
    ApprovalGiven,
    ApprovalRefused,
    ApprovalRequested,
    Budget,
    BudgetChanged,
    Event,
    RunCancelled,
    RunPaused,
    RunResumed,
    RunSteered,
)
from sia_events.shared.ports import Bus
from sia_events.shared.record import Record, answers
from sia_events.shared.run import Run, fold
from sia_events.shared.settings import Settings

# What a person says, given the run as it is; raises Unusable where there is nothing to say it to.
Say = Callable[[Run], Event]


async def say(settings: Settings, run: str, word: Say) -> dict[str, Any]:
    """Record what a person has to say on a run; returns {run, event, position, status}. Raises Unusable."""
    async with _bus(settings, f"say {run}") as bus:
        name = _resolved(await bus.runs(), run)
        history = await bus.history(name)
        state = fold(history)
        if state.finished or state.cancelled is not None:
            raise Unusable(f"run {name} is {state.status}; there is nothing left to say to it")
        event = word(state)
        if isinstance(event, BudgetChanged) and not settings.nats_url:
            require_prices(settings, state.settings.model_copy(update={"budget": event.budget}))
        (record,) = await bus.append(name, answers(name, _cause(history, event), "cli", [event]))
        if record.event != event:
            raise Unusable(f"somebody was quicker: run {name} has {record.type} there already; sia log {name}")
        status = fold(await bus.history(name)).status
    return {"run": name, "event": record.type, "position": record.position, "status": status}


def approve(by: str | None) -> Say:
    return lambda run: ApprovalGiven(subject=_awaited(run).subject, by=by or getpass.getuser())


def refuse(by: str | None, reason: str) -> Say:
    return lambda run: ApprovalRefused(subject=_awaited(run).subject, by=by or getpass.getuser(), reason=reason)


def pause(reason: str) -> Say:
    def word(run: Run) -> Event:
        if run.paused is not None:
            raise Unusable(f"run {run.name} is paused already: {run.paused}")
        return RunPaused(reason=reason)

    return word


def resume(reason: str) -> Say:
    def word(run: Run) -> Event:
        if run.exhausted:
            raise Unusable(
                f"run {run.name} has used up its budget of {run.exhausted.allowed:g} {run.exhausted.limit}; "
                f"give it more: sia budget {run.name} --{run.exhausted.limit} MORE"
            )
        if run.paused is None:
            raise Unusable(f"run {run.name} is not paused; sia run --resume {run.name} goes on with a stopped run")
        return RunResumed(reason=reason)

    return word


def steer(text: str) -> Say:
    return lambda run: RunSteered(text=text)


def cancel(reason: str) -> Say:
    return lambda run: RunCancelled(reason=reason)


def budget(**limits: float | None) -> Say:
    """Other limits, those that are named; the others stay."""

    def word(run: Run) -> Event:
        named = {name: limit for name, limit in limits.items() if limit is not None}
        if not named:
            raise Unusable("name a limit: --usd, --minutes, --tokens or --calls; nothing was written")
        try:
            return BudgetChanged(budget=Budget.model_validate({**run.settings.budget.model_dump(), **named}))
        except ValidationError as error:
            first = error.errors()[0]
            raise Unusable(f"--{first['loc'][0]}: {first['msg']}, not {first['input']!r}") from error

    return word


def _awaited(run: Run) -> ApprovalRequested:
    if run.waiting is None:
        raise Unusable(f"run {run.name} waits for no approval; it is {run.status}")
    return run.waiting


def _cause(history: Sequence[Record], event: Event) -> Record:
    """What the word answers: a request for approval, so that it is answered once; else whatever came last."""
    if isinstance(event, ApprovalGiven | ApprovalRefused):
        return next(r for r in reversed(history) if isinstance(r.event, ApprovalRequested))
    return history[-1]


def _resolved(runs: Sequence[str], name: str) -> str:
    if name in runs:
        return name
    found = [run for run in runs if run.startswith(name)]
    if len(found) == 1:
        return found[0]
    which = f"several runs begin with {name!r}: {', '.join(found)}" if found else f"no run {name!r}"
    raise Unusable(f"{which}; sia runs lists them")


@asynccontextmanager
async def _bus(settings: Settings, purpose: str) -> AsyncIterator[Bus]:
    """The bus of whoever runs this home's services, or our own for the moment that one append takes."""
    running = await settled(settings)
    async with app.stores_of_home(settings, purpose, running is not None) as node:
        await require_ours(settings, node.streams)
        yield node.bus
