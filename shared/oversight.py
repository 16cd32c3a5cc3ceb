"""Holding a run: what a service would decide while a run is held is decided when it goes on, and not before."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from sia_events.shared.events import BudgetChanged, BudgetExhausted, Event, RunPaused, RunResumed
from sia_events.shared.record import Record
from sia_events.shared.run import Run
from sia_events.shared.service import Decide


def overseen(decides: Mapping[type[Event], Decide]) -> Mapping[type[Event], Decide]:
    """The same table for runs that people pause and that run out of budget.

    While a run is held nothing is decided, so nothing is begun. The fold keeps the facts that came meanwhile; the
    record that lets the run go on is answered with what they call for by then.
    """

    def unless_held(decide: Decide) -> Decide:
        return lambda run, event: [] if run.held else decide(run, event)

    def caught_up(run: Run, event: RunResumed | BudgetChanged) -> Sequence[Event]:
        found: list[Event] = []
        for fact in run.released:
            if decide := decides.get(type(fact)):
                # Facts decided on the same state call for the same things: two scores may each close the round.
                found.extend(made for made in decide(run, fact) if made not in found)
        pauses = [made for made in found if isinstance(made, RunPaused)]
        return [made for made in found if made not in pauses[1:]]

    return {
        **{kind: unless_held(decide) for kind, decide in decides.items()},
        RunResumed: caught_up,
        BudgetChanged: caught_up,
    }


def active_minutes(history: Sequence[Record], now: datetime) -> float:
    """Minutes since the run itself was opened, without those for which it was paused or out of budget."""
    own = [record for record in history if record.run == history[-1].run] if history else []
    if not own:
        return 0.0
    total, since = 0.0, own[0].time
    paused = exhausted = False
    stopped: datetime | None = None
    for record in own:
        match record.event:
            case RunPaused() | RunResumed():
                paused = isinstance(record.event, RunPaused)
            case BudgetExhausted() | BudgetChanged():
                exhausted = isinstance(record.event, BudgetExhausted)
        if (paused or exhausted) and stopped is None:
            stopped = record.time
        elif not (paused or exhausted) and stopped is not None:
            total -= (record.time - stopped).total_seconds()
            stopped = None
    total += ((stopped or now) - since).total_seconds()
    return total / 60
