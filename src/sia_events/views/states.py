"""The folded state of a run at one position, as people see it and as an object."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel

from sia_events.shared.run import Run
from sia_events.shared.summary import shown
from sia_events.views.records import clean
from sia_events.views.tables import table


def state_object(run: Run) -> dict[str, Any]:
    """Every field of the fold in JSON's terms, and {status, position}."""
    return {"run": run.name, "position": run.records, "status": run.status, **_plain(run)}


def state_text(run: Run) -> str:
    """What the run stood at: its versions, and whatever was begun and not yet answered."""
    lines = [
        f"run {run.name} at position {run.records}: {run.status}, generation {run.generation}, "
        f"incumbent {run.incumbent or 'none yet'}"
    ]
    if run.parent:
        lines.append(f"branch of {run.parent}")
    if run.task:
        lines.append(f"task {run.task.task}, lever {run.settings.lever}, seed {run.settings.seed}")
    if run.versions:
        rows = [
            (
                v.generation,
                v.name,
                v.parent,
                v.lever,
                *(_score(run, v.name, split) for split in ("dev", "gate")),
                _verdict(run, v.name),
            )
            for v in run.versions.values()
        ]
        lines += ["", table(("gen", "version", "from", "lever", "dev", "gate", "verdict"), rows), ""]
    ended = {*run.executions, *run.failures}
    under_way = [name for name in run.attempts if name not in ended]
    unscored = [name for name in run.executions if name not in run.scores and name not in run.failures]
    said = {
        "attempts under way": under_way,
        "outputs not judged yet": unscored,
        "waits for approval of": [run.waiting.subject] if run.waiting else [],
        "paused": [run.paused] if run.paused is not None else [],
        "cancelled": [run.cancelled] if run.cancelled is not None else [],
        "steering": run.steering,
        "dead letters": [f"{failure.service}: {failure.error}" for failure in run.service_failures],
    }
    lines += [f"{name}: {', '.join(what)}" for name, what in said.items() if what]
    return clean("\n".join(lines))


def _score(run: Run, version: str, split: str) -> str:
    scored = run.scored(version, split)
    return shown(scored[-1].score) if scored else ""


def _verdict(run: Run, version: str) -> str:
    verdict = run.verdicts.get(version)
    return type(verdict).__name__.removeprefix("Version").lower() if verdict else "open"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
