"""The fold of a run: what its records amount to so far. Pure; every decision is taken on this and nothing else."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sia_events.shared.events import (
    AgentProposed,
    AttemptFailed,
    AttemptRequested,
    Event,
    ExecutionLogged,
    FeedbackGiven,
    FeedbackRequested,
    HarnessPatched,
    Lever,
    ProposalFailed,
    RunBranched,
    RunCancelled,
    RunFinished,
    RunPaused,
    RunResumed,
    RunSettings,
    RunStarted,
    RunSteered,
    Scored,
    ServiceFailed,
    TaskRegistered,
    VersionAccepted,
    VersionRejected,
    Weights,
    WeightsUpdated,
)
from sia_events.shared.record import Record

Verdict = VersionAccepted | VersionRejected
Status = Literal["running", "paused", "finished", "cancelled"]


@dataclass(frozen=True)
class Version:
    """One (harness, weights) pair and where it came from. `lever` is None for a first version."""

    name: str
    generation: int
    parent: str | None
    lever: Lever | None
    harness: str
    weights: Weights
    edits: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Run:
    """The state after some record. Mappings are replaced, never changed, so an earlier state stays what it was."""

    name: str = ""
    parent: str | None = None
    task: TaskRegistered | None = None
    settings: RunSettings = field(default_factory=RunSettings)
    status: Status = "running"
    generation: int = 0
    incumbent: str | None = None
    versions: Mapping[str, Version] = field(default_factory=dict)
    attempts: Mapping[str, AttemptRequested] = field(default_factory=dict)
    executions: Mapping[str, ExecutionLogged] = field(default_factory=dict)
    scores: Mapping[str, Scored] = field(default_factory=dict)
    failures: Mapping[str, AttemptFailed] = field(default_factory=dict)
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    feedback: tuple[FeedbackGiven, ...] = ()
    barren: tuple[ProposalFailed, ...] = ()
    service_failures: tuple[ServiceFailed, ...] = ()
    steering: tuple[str, ...] = ()
    finished: RunFinished | None = None
    records: int = 0

    def of_generation(self, generation: int) -> tuple[Version, ...]:
        """That generation's versions, in the order they were proposed."""
        return tuple(v for v in self.versions.values() if v.generation == generation)

    def scored(self, version: str, split: str) -> tuple[Scored, ...]:
        """The version's scores on a split, oldest first."""
        return tuple(s for s in self.scores.values() if s.version == version and s.split == split)

    def failed(self, version: str, split: str) -> AttemptFailed | None:
        """The failure that ended the version's attempts on a split for good, if one did."""
        for failure in self.failures.values():
            if failure.version == version and failure.split == split and final(self, failure):
                return failure
        return None

    @property
    def first(self) -> str | None:
        """The version that the sealed test compares the final one with."""
        return next(iter(self.versions), None)


def final(run: Run, failure: AttemptFailed) -> bool:
    """Whether a failed attempt will not be tried again: the candidate's own fault, or our tries are used up."""
    tries = run.attempts[failure.attempt].tries + 1
    return failure.kind != "infrastructure" or tries >= run.settings.attempt_tries


def evolve(run: Run, record: Record) -> Run:
    """The state after one more record. Total: a fact without a rule here changes only the count."""
    run = replace(run, name=record.run, records=run.records + 1)
    rule = EVOLVE.get(type(record.event))
    return rule(run, record.event) if rule else run


def fold(records: Iterable[Record], run: Run | None = None) -> Run:
    """The state after all of `records`, starting from `run`."""
    run = run or Run()
    for record in records:
        run = evolve(run, record)
    return run


def _versioned(run: Run, event: AgentProposed | HarnessPatched | WeightsUpdated) -> Run:
    lever: dict[type[Event], Lever] = {HarnessPatched: "harness", WeightsUpdated: "weights"}
    version = Version(
        name=event.version,
        generation=0 if isinstance(event, AgentProposed) else event.generation,
        parent=None if isinstance(event, AgentProposed) else event.parent,
        lever=lever.get(type(event)),
        harness=event.harness,
        weights=event.weights,
        edits=event.edits if isinstance(event, HarnessPatched) else (),
        reason=event.algorithm if isinstance(event, WeightsUpdated) else event.reason,
    )
    return replace(run, versions={**run.versions, event.version: version})


def _accepted(run: Run, event: VersionAccepted) -> Run:
    return replace(run, incumbent=event.version, verdicts={**run.verdicts, event.version: event})


EVOLVE: dict[type[Event], Callable[[Run, Any], Run]] = {
    TaskRegistered: lambda run, e: replace(run, task=e),
    RunStarted: lambda run, e: replace(run, settings=e.settings),
    RunBranched: lambda run, e: replace(run, parent=e.parent, settings=e.settings, status="running", finished=None),
    AgentProposed: _versioned,
    HarnessPatched: _versioned,
    WeightsUpdated: _versioned,
    AttemptRequested: lambda run, e: replace(run, attempts={**run.attempts, e.attempt: e}),
    ExecutionLogged: lambda run, e: replace(run, executions={**run.executions, e.attempt: e}),
    AttemptFailed: lambda run, e: replace(run, failures={**run.failures, e.attempt: e}),
    Scored: lambda run, e: replace(run, scores={**run.scores, e.attempt: e}),
    VersionAccepted: _accepted,
    VersionRejected: lambda run, e: replace(run, verdicts={**run.verdicts, e.version: e}),
    FeedbackRequested: lambda run, e: replace(run, generation=e.generation),
    FeedbackGiven: lambda run, e: replace(run, feedback=(*run.feedback, e)),
    ProposalFailed: lambda run, e: replace(run, barren=(*run.barren, e)),
    ServiceFailed: lambda run, e: replace(run, service_failures=(*run.service_failures, e)),
    RunPaused: lambda run, e: replace(run, status="paused"),
    RunResumed: lambda run, e: replace(run, status="running"),
    RunSteered: lambda run, e: replace(run, steering=(*run.steering, e.text)),
    RunCancelled: lambda run, e: replace(run, status="cancelled"),
    RunFinished: lambda run, e: replace(run, status="finished", finished=e),
}
