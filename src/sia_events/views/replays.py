"""Replays as people see them, and as objects: what agreed, and each difference as recorded against decided."""

from collections.abc import Mapping
from typing import Any

from sia_events.shared.code import code
from sia_events.shared.events import Event
from sia_events.shared.replay import Divergence, Replayed
from sia_events.views.records import clean
from sia_events.views.tables import table


def replay_summary(found: Replayed) -> dict[str, Any]:
    """{records, decisions, performed, pending, diverged, first_divergence, divergences}."""
    divergences = [_divergence(each) for each in found.divergences]
    return {
        "records": found.records,
        "decisions": found.decisions,
        "performed": found.performed,
        "pending": found.pending,
        "diverged": bool(divergences),
        "first_divergence": divergences[0] if divergences else None,
        "divergences": divergences,
    }


def replays_summary(found: Mapping[str, Replayed | str]) -> list[dict[str, Any]]:
    """A `replay_summary` a run, with its name; {run, unreadable} for one that cannot be read."""
    return [
        {"run": run, "unreadable": each} if isinstance(each, str) else {"run": run, **replay_summary(each)}
        for run, each in found.items()
    ]


def replay_text(found: Replayed) -> str:
    if not found.divergences:
        owed = f", {found.pending} still owed by an unfinished run" if found.pending else ""
        read = f"{found.performed} performances read from the log"
        return f"{found.records} records, {found.decisions} decisions agree, {read}{owed}"
    return clean("\n".join(_divergence_text(each) for each in found.divergences))


def replays_text(found: Mapping[str, Replayed | str]) -> str:
    """A row a run, and behind them what differs."""
    if not found:
        return "no runs yet: sia run words starts one"
    rows = [
        (run, "", "", f"cannot be read: {each}")
        if isinstance(each, str)
        else (run, each.records, each.decisions, "DIVERGED" if each.divergences else "agrees")
        for run, each in found.items()
    ]
    parts = [table(("run", "records", "decisions", "replay"), rows)]
    parts += [
        f"\nrun {run}\n{replay_text(each)}"
        for run, each in found.items()
        if isinstance(each, Replayed) and each.divergence
    ]
    return clean("\n".join(parts))


def _divergence(found: Divergence) -> dict[str, Any]:
    return {
        "position": found.cause.position,
        "run": found.cause.run,
        "cause": str(found.cause.id),
        "type": found.cause.type,
        "service": found.service,
        "reason": found.reason,
        "recorded_by": found.code,
        "decided_by": code(),
        "recorded": [event.model_dump(mode="json") for event in found.recorded],
        "decided": [event.model_dump(mode="json") for event in found.decided],
    }


def _divergence_text(found: Divergence) -> str:
    lines = [f"record {found.cause.position}: {found.service} about {found.cause.type}: {found.reason}"]
    lines += _side("recorded", found.code or "unknown code", found.recorded)
    lines += _side("decided", code(), found.decided)
    return "\n".join(lines)


def _side(word: str, by: str, events: tuple[Event, ...]) -> list[str]:
    said = [f"{type(event).__name__} {event.model_dump_json(exclude={'type'})}" for event in events] or ["nothing"]
    return [f"  {word} by {by}", *(f"    {each}" for each in said)]
