"""Which attempts a version owes."""

from collections.abc import Sequence

from sia_events.shared.archive import best
from sia_events.shared.calls import journal_key
from sia_events.shared.events import (
    AgentProposed,
    AttemptFailed,
    AttemptRequested,
    Event,
    HarnessPatched,
    WeightsUpdated,
)
from sia_events.shared.run import Run, final


def owe_dev(run: Run, event: AgentProposed | HarnessPatched | WeightsUpdated) -> Sequence[Event]:
    """Every new version is tried on the dev split first; what comes after is the gate's to ask.

    Where a search has whole attempts for rollouts, a version goes on from the best that was found before it, as they
    do: the solution is what is looked for, and what was learned is how to go on from a good one.
    """
    search = run.settings.search == "archive" and run.task is not None and run.task.whole
    return [
        AttemptRequested(
            attempt=f"{event.version}.dev",
            version=event.version,
            split="dev",
            seed=run.settings.seed,
            starts=best(run) if search else (),
        )
    ]


def try_again(run: Run, failure: AttemptFailed) -> Sequence[Event]:
    """What the platform broke is tried again, a bounded number of times; what the candidate broke stays broken."""
    if final(run, failure) or run.finished:
        return []
    last = run.attempts[failure.attempt]
    again = f"{journal_key(last.attempt)}~{last.tries + 1}"
    return [last.model_copy(update={"attempt": again, "tries": last.tries + 1})]
