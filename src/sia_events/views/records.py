"""A record as people see it: on one line, and as news of a run as it goes."""

from sia_events.shared.events import (
    AgentProposed,
    AttemptFailed,
    AttemptRequested,
    Event,
    ExecutionLogged,
    FeedbackGiven,
    HarnessPatched,
    HarnessPatchRequested,
    KernelMeasured,
    ProposalFailed,
    RunBranched,
    RunFinished,
    RunStarted,
    Scored,
    ServiceFailed,
    TaskRegistered,
    VersionAccepted,
    VersionRejected,
    WeightsUpdated,
    WeightUpdateRequested,
)
from sia_events.shared.record import Record
from sia_events.shared.summary import shown

CONTROL = {c: None for c in (*range(32), 127, *range(128, 160)) if c not in (9, 10)}


def record_line(record: Record) -> str:
    """One record on one line: position, time, producer, type, what it says."""
    said = news(record.event) or _rest(record.event)
    at = f"{record.time:%H:%M:%S}.{record.time.microsecond // 1000:03d}"
    return clean(f"{record.position:>5}  {at}  {record.producer:<14}{record.type:<22}{said}")


def clean(text: str) -> str:
    """Text from models and agents without the characters that steer a terminal."""
    return text.translate(CONTROL)


def news(event: Event) -> str:
    """What a person following a run is told of an event; empty for what is of no news."""
    match event:
        case TaskRegistered():
            sizes = ", ".join(f"{split} {n}" for split, n in event.sizes.items())
            return f"task {event.task}: {event.title} ({event.metric}; {sizes})"
        case RunStarted():
            s = event.settings
            plan = f"{s.generations} generations, {s.candidates} candidates, lever {s.lever}, seed {s.seed}"
            return f"started: {plan}, {s.target_model}"
        case RunBranched():
            return (
                f"branch of {event.parent} at position {event.at}, generation {event.generation}: "
                f"{event.overrides or 'no other settings'}"
            )
        case AgentProposed():
            return f"{event.version}: {event.reason}"
        case HarnessPatched():
            return f"{event.version} from {event.parent}: {' + '.join(event.edits) or event.reason}"
        case WeightUpdateRequested():
            return f"learning from {event.parent}'s rollouts ({event.algorithm})"
        case WeightsUpdated():
            backend = "" if event.backend == "ours" else f" by {event.backend}"
            learned = f"adapter learned on {event.rollouts} rollouts{backend}, {event.seconds:.0f} s"
            return f"{event.version} from {event.parent}: {learned}"
        case Scored():
            return f"{event.version} on {event.split}: {shown(event.score)}"
        case AttemptFailed():
            return f"{event.version} on {event.split} failed: {event.kind}: {event.message}"
        case VersionAccepted():
            return f"{event.version} accepted: {event.reason}"
        case VersionRejected():
            return f"{event.version} rejected: {event.reason}"
        case FeedbackGiven():
            return f"generation {event.generation}: {event.lever}: {'; '.join(event.reasons)}"
        case ProposalFailed():
            return f"generation {event.generation}: no {event.lever} candidate: {event.reason}"
        case ServiceFailed():
            return f"{event.service} gave up after {event.tries} tries: {event.error}"
        case RunFinished():
            return f"finished: {event.outcome}: {event.reason}"
        case _:
            return ""


def _rest(event: Event) -> str:
    match event:
        case AttemptRequested():
            return f"{event.attempt}" + (f", {event.samples} samples an item" if event.samples > 1 else "")
        case HarnessPatchRequested():
            starts = [f"{s.version} (PUCT {s.puct:.3f})" for s in event.starts] or [event.parent]
            return f"generation {event.generation}: {event.candidates} candidates from {', '.join(starts)}"
        case KernelMeasured():
            said = f"{event.speedup:.3f} times as fast" if event.correct else "refused"
            why = event.reason.rstrip().rpartition("\n")[2]
            return f"{event.attempt}: {said}" + (f": {why}" if why else "")
        case ExecutionLogged():
            tokens = event.prompt_tokens + event.completion_tokens
            return f"{event.attempt}: {event.calls} calls, {tokens} tokens, {event.seconds:.1f} s"
        case _:
            return ", ".join(
                f"{k} {v}" for k, v in event.model_dump(exclude={"type"}).items() if isinstance(v, str | int)
            )
