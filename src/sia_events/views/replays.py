"""A replay as people see it, and as an object: what agreed, and the first difference."""

from typing import Any

from sia_events.shared.events import Event
from sia_events.shared.replay import Replayed
from sia_events.views.records import clean


def replay_summary(found: Replayed) -> dict[str, Any]:
    """{records, decisions, performed, pending, diverged, first_divergence}."""
    first = found.divergence
    return {
        "records": found.records,
        "decisions": found.decisions,
        "performed": found.performed,
        "pending": found.pending,
        "diverged": first is not None,
        "first_divergence": first
        and {
            "position": first.cause.position,
            "cause": str(first.cause.id),
            "type": first.cause.type,
            "service": first.service,
            "reason": first.reason,
            "recorded": [event.model_dump(mode="json") for event in first.recorded],
            "decided": [event.model_dump(mode="json") for event in first.decided],
        },
    }


def replay_text(found: Replayed) -> str:
    first = found.divergence
    if first is None:
        owed = f", {found.pending} still owed by an unfinished run" if found.pending else ""
        read = f"{found.performed} performances read from the log"
        return f"{found.records} records, {found.decisions} decisions agree, {read}{owed}"
    lines = [
        f"record {first.cause.position} of {found.records}: {first.service} about {first.cause.type}: {first.reason}"
    ]
    lines += [f"  recorded  {_event(event)}" for event in first.recorded] or ["  recorded  nothing"]
    lines += [f"  decided   {_event(event)}" for event in first.decided] or ["  decided   nothing"]
    return clean("\n".join(lines))


def _event(event: Event) -> str:
    return f"{type(event).__name__} {event.model_dump_json(exclude={'type'})}"
