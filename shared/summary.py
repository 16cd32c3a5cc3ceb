"""A run told in a few figures, for people and for programs; drawn from its records alone."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sia_events.shared.calls import journal_key
from sia_events.shared.events import (
    AgentProposed,
    AttemptFailed,
    Estimate,
    ExecutionLogged,
    FeedbackGiven,
    HarnessPatched,
    Scored,
    VersionAccepted,
)
from sia_events.shared.record import Record
from sia_events.shared.run import Run, fold


def row(records: Sequence[Record]) -> dict[str, Any]:
    """One line of `sia runs`: {run, task, status, generations, best, …}; the first agent is generation 0."""
    run = fold(records)
    return {
        "run": run.name,
        "parent": run.parent,
        "task": run.task.task if run.task else None,
        "status": run.status,
        "generations": run.generation,
        "best": run.incumbent,
        "outcome": run.finished.outcome if run.finished else None,
        "records": len(records),
        "started": records[0].time.isoformat() if records else None,
        "lever": run.settings.lever,
    }


def whole(records: Sequence[Record]) -> dict[str, Any]:
    """`sia show`: every version with its scores and verdict, the sealed test, what it cost.

    `generations` has an entry a version, candidates that were refused included; `scores` maps a split to
    {value, low, high, n}; `accepted` is None while the verdict is out. A gain is above zero for the better, whichever
    way the metric goes. `chance` is the score of one constant answer, where the task states it.
    """
    run = fold(records)
    sealed = run.finished.sealed if run.finished else None
    return {
        **row(records),
        "chance": run.task.floor if run.task else None,
        "held_out": run.task is not None and run.task.sizes.get("test", 0) > 1,
        "settings": run.settings.model_dump(mode="json"),
        "generations": [_version(run, name) for name in run.versions],
        "sealed": sealed
        and {
            "first": sealed.first.model_dump(),
            "final": sealed.final.model_dump(),
            "gain": sealed.comparison.gain,
            "low": sealed.comparison.low,
            "high": sealed.comparison.high,
            "p_value": sealed.comparison.p_value,
        },
        "levers": lever_gains(run),
        "cost": cost(records),
        "reason": run.finished.reason if run.finished else None,
        "service_failures": [f.model_dump(mode="json") for f in run.service_failures],
    }


def lever_gains(run: Run) -> dict[str, dict[str, Any]]:
    """What each lever gave on the gate: accepted versions, tried versions, summed gain."""
    gains: dict[str, dict[str, Any]] = {}
    for lever in ("harness", "weights"):
        versions = [v for v in run.versions.values() if v.lever == lever]
        accepted = [run.verdicts[v.name] for v in versions if isinstance(run.verdicts.get(v.name), VersionAccepted)]
        total = sum(verdict.comparison.gain for verdict in accepted if verdict.comparison)
        gains[lever] = {"tried": len(versions), "accepted": len(accepted), "gain": round(total, 6)}
    return gains


def cost(records: Sequence[Record]) -> dict[str, Any]:
    """Model calls, tokens, money and wall seconds, of the run and of what it shares with its parents.

    Attempts that failed have cost what they have cost; one that is under way counts when it ends.
    """
    ended: dict[tuple[str, str], ExecutionLogged | AttemptFailed] = {}
    for record in records:
        if isinstance(record.event, ExecutionLogged | AttemptFailed):
            # All tries of an attempt share a journal, and the one that knew the most calls knew all of them.
            key = record.run, journal_key(record.event.attempt)
            ended[key] = max(ended.get(key, record.event), record.event, key=lambda event: event.calls)
    written = [r.event.written for r in records if isinstance(r.event, AgentProposed | FeedbackGiven | HarnessPatched)]
    took = [*ended.values(), *filter(None, written)]
    priced = [each.usd for each in took if each.usd is not None]
    spans: dict[str, list[datetime]] = {}
    for record in records:
        spans.setdefault(record.run, []).append(record.time)
    # A branch stands idle behind its parent until somebody opens it: that time is nobody's.
    seconds = sum((times[-1] - times[0]).total_seconds() for times in spans.values())
    return {
        "model_calls": sum(each.calls for each in took),
        "tokens": sum(each.prompt_tokens + each.completion_tokens for each in took),
        "usd": round(sum(priced), 6) if len(priced) == len(took) else None,
        "seconds": round(seconds, 3),
    }


def _version(run: Run, name: str) -> dict[str, Any]:
    version, verdict = run.versions[name], run.verdicts.get(name)
    last: dict[str, Scored] = {s.split: s for s in run.scores.values() if s.version == name}
    return {
        "generation": version.generation,
        "version": name,
        "parent": version.parent,
        "lever": version.lever,
        "accepted": None if verdict is None else isinstance(verdict, VersionAccepted),
        "scores": {split: scored.score.model_dump() for split, scored in last.items()},
        "edits": list(version.edits),
        "verdict": verdict.reason if verdict else None,
        "harness": version.harness,
        "adapter": version.weights.adapter,
    }


def shown(estimate: Estimate | Mapping[str, Any]) -> str:
    """ "0.715 [0.669, 0.757]": a value with its 95 % interval."""
    e = estimate.model_dump() if isinstance(estimate, Estimate) else estimate
    return f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"
