"""The fold of a run: what its records amount to so far. Pure; every decision is taken on this and nothing else."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sia_events.shared.calls import journal_key
from sia_events.shared.events import (
    AgentProposed,
    ApprovalGiven,
    ApprovalRefused,
    ApprovalRequested,
    AttemptFailed,
    AttemptRequested,
    BudgetChanged,
    BudgetExhausted,
    Event,
    ExecutionLogged,
    FeedbackGiven,
    FeedbackRequested,
    HarnessPatched,
    HarnessPatchRequested,
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
    Start,
    TaskRegistered,
    VersionAccepted,
    VersionRejected,
    Weights,
    WeightsUpdated,
)
from sia_events.shared.record import Record

Verdict = VersionAccepted | VersionRejected
Status = Literal["running", "waiting", "paused", "finished", "cancelled"]


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
    """The state after some record. Mappings are replaced, never changed, so an earlier state stays what it was.

    `withheld` are the facts that came while the run was held, for whom nothing was decided yet; `released` are they in
    the one state in which the run goes on again. `expanded` names the versions, and the rollouts, that candidates or
    rollouts were to start from, once a generation each.
    """

    name: str = ""
    parent: str | None = None
    task: TaskRegistered | None = None
    settings: RunSettings = field(default_factory=RunSettings)
    paused: str | None = None
    exhausted: BudgetExhausted | None = None
    cancelled: str | None = None
    waiting: ApprovalRequested | None = None
    withheld: tuple[Event, ...] = ()
    released: tuple[Event, ...] = ()
    failures_in_a_row: int = 0
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
    levers_pulled: frozenset[int] = frozenset()
    expanded: tuple[str, ...] = ()
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
        """The version that the sealed test compares the final one with: the first that was accepted."""
        return next((v.version for v in self.verdicts.values() if isinstance(v, VersionAccepted)), None)

    @property
    def held(self) -> bool:
        """Whether nothing new may be begun."""
        return self.paused is not None or self.exhausted is not None or self.cancelled is not None

    @property
    def status(self) -> Status:
        if self.finished:
            return "finished"
        if self.cancelled is not None:
            return "cancelled"
        if self.held:
            return "paused"
        return "waiting" if self.waiting else "running"


def final(run: Run, failure: AttemptFailed) -> bool:
    """Whether a failed attempt will not be tried again: the candidate's own fault, or our tries are used up."""
    if failure.kind == "budget":
        return False
    name = journal_key(failure.attempt)
    unpaid = sum(f.kind == "budget" and journal_key(f.attempt) == name for f in run.failures.values())
    tries = run.attempts[failure.attempt].tries + 1 - unpaid
    return failure.kind != "infrastructure" or tries >= run.settings.attempt_tries


def in_a_row(run: Run, failure: AttemptFailed) -> bool:
    """Whether a failure counts among those that, many in a row, hold the run.

    Want of budget does not; nor does what a rollout of a whole attempt brought on itself: it was drawn, as answers are.
    """
    asked = run.attempts.get(failure.attempt)
    drawn = asked is not None and asked.group is not None and failure.kind != "infrastructure"
    return failure.kind != "budget" and not drawn


def _changed(run: Run, **changes: Any) -> Run:
    """The state with some fields changed: what `dataclasses.replace` does, at a thirtieth of its time."""
    new = object.__new__(Run)
    new.__dict__.update(run.__dict__, **changes)
    assert len(new.__dict__) == len(run.__dict__), f"a state has not all of {', '.join(changes)}"
    return new


def evolve(run: Run, record: Record) -> Run:
    """The state after one more record. Total: a fact without a rule here changes only the count."""
    held = run.held
    run = _changed(run, name=record.run, records=run.records + 1, released=())
    rule = EVOLVE.get(type(record.event))
    run = rule(run, record.event) if rule else run
    if not held:
        return run
    if run.held:
        return _changed(run, withheld=(*run.withheld, record.event))
    return _changed(run, withheld=(), released=run.withheld)


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
    # A candidate that a person enters opens its generation; every other comes behind the feedback that did.
    generation = max(run.generation, version.generation)
    return _changed(run, generation=generation, versions={**run.versions, event.version: version})


def _accepted(run: Run, event: VersionAccepted) -> Run:
    return _changed(run, incumbent=event.version, verdicts={**run.verdicts, event.version: event})


def _requested(run: Run, event: AttemptRequested) -> Run:
    before, run = run.attempts, _changed(run, attempts={**run.attempts, event.attempt: event})
    if event.split != "train":
        return run
    siblings = event.group is not None and any(each.group == event.group for each in before.values())
    expanded = run.expanded if event.tries or siblings else (*run.expanded, *_started_from(event.starts, event.version))
    return _changed(run, levers_pulled=run.levers_pulled | {run.generation}, expanded=expanded)


def _patching(run: Run, event: HarnessPatchRequested) -> Run:
    expanded = (*run.expanded, *_started_from(event.starts, event.parent))
    return _changed(run, levers_pulled=run.levers_pulled | {event.generation}, expanded=expanded)


def _started_from(starts: tuple[Start, ...], otherwise: str) -> tuple[str, ...]:
    return tuple(start.state for start in starts) or (otherwise,)


def _advised(run: Run, event: FeedbackGiven) -> Run:
    # Feedback that a person gives opens its generation; any other was asked for by what did.
    return _changed(run, generation=max(run.generation, event.generation), feedback=(*run.feedback, event))


def _barren(run: Run, event: ProposalFailed) -> Run:
    return _changed(run, barren=(*run.barren, event), levers_pulled=run.levers_pulled | {event.generation})


def _failed(run: Run, event: AttemptFailed) -> Run:
    row = run.failures_in_a_row + in_a_row(run, event)
    return _changed(run, failures={**run.failures, event.attempt: event}, failures_in_a_row=row)


def _with_budget(run: Run, event: BudgetChanged) -> RunSettings:
    return run.settings.model_copy(update={"budget": event.budget})


# A branch is asked for by a person, who has seen how far its parent came and why it stopped.
_GOING: dict[str, Any] = {"paused": None, "exhausted": None, "cancelled": None, "waiting": None, "withheld": ()}

EVOLVE: dict[type[Event], Callable[[Run, Any], Run]] = {
    TaskRegistered: lambda run, e: _changed(run, task=e),
    RunStarted: lambda run, e: _changed(run, settings=e.settings),
    RunBranched: lambda run, e: _changed(run, parent=e.parent, settings=e.settings, finished=None, **_GOING),
    AgentProposed: _versioned,
    HarnessPatched: _versioned,
    WeightsUpdated: _versioned,
    AttemptRequested: _requested,
    HarnessPatchRequested: _patching,
    ExecutionLogged: lambda run, e: _changed(run, executions={**run.executions, e.attempt: e}),
    AttemptFailed: _failed,
    Scored: lambda run, e: _changed(run, scores={**run.scores, e.attempt: e}, failures_in_a_row=0),
    VersionAccepted: _accepted,
    VersionRejected: lambda run, e: _changed(run, verdicts={**run.verdicts, e.version: e}),
    FeedbackRequested: lambda run, e: _changed(run, generation=e.generation),
    FeedbackGiven: _advised,
    ProposalFailed: _barren,
    ServiceFailed: lambda run, e: _changed(run, service_failures=(*run.service_failures, e)),
    ApprovalRequested: lambda run, e: _changed(run, waiting=e),
    ApprovalGiven: lambda run, e: _changed(run, waiting=None),
    ApprovalRefused: lambda run, e: _changed(run, waiting=None),
    RunPaused: lambda run, e: _changed(run, paused=e.reason),
    RunResumed: lambda run, e: _changed(run, paused=None, failures_in_a_row=0),
    BudgetExhausted: lambda run, e: _changed(run, exhausted=e),
    BudgetChanged: lambda run, e: _changed(run, exhausted=None, settings=_with_budget(run, e)),
    RunSteered: lambda run, e: _changed(run, steering=(*run.steering, e.text)),
    RunCancelled: lambda run, e: _changed(run, cancelled=e.reason),
    # Earlier releases could record a second end behind the first.
    RunFinished: lambda run, e: _changed(run, finished=run.finished or e),
}
