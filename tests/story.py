"""Events as a run would have them, with everything filled in that a test does not care about."""

from typing import Any

from sia_events.shared.events import (
    AgentProposed,
    AttemptFailed,
    AttemptRequested,
    Estimate,
    Evidence,
    ExecutionLogged,
    FeedbackGiven,
    FeedbackRequested,
    HarnessPatched,
    RunSettings,
    RunStarted,
    Scored,
    TaskRegistered,
    VersionAccepted,
    Weights,
    WeightsUpdated,
)

D = "a" * 64
BASE = Weights(model="local/m")


def registered(**changes: Any) -> TaskRegistered:
    return TaskRegistered(
        **{
            "task": "words",
            "title": "kinds",
            "metric": "accuracy",
            "maximize": True,
            "spec": D,
            "datasets": {"train": D, "dev": D, "gate": D, "test": D},
            "answers": D,
            "reference": D,
            "sizes": {"train": 4, "dev": 4, "gate": 8, "test": 8},
            "floor": 0.125,
            **changes,
        }
    )


def started(**settings: Any) -> RunStarted:
    return RunStarted(settings=RunSettings(**{"generations": 2, "candidates": 2, **settings}), code="test")


def proposed(version: str = "g0a") -> AgentProposed:
    return AgentProposed(version=version, candidate=0, harness=D, weights=BASE, reason="first")


def asked(version: str, split: str, tries: int = 0, **more: Any) -> AttemptRequested:
    name = f"{version}.{split}" + (f"~{tries}" if tries else "")
    return AttemptRequested(**{"attempt": name, "version": version, "split": split, "tries": tries, "seed": 0, **more})


def logged(version: str, split: str) -> ExecutionLogged:
    return ExecutionLogged(
        attempt=f"{version}.{split}",
        version=version,
        split=split,  # type: ignore[arg-type]
        outputs=D,
        trajectory=D,
        calls=8,
        prompt_tokens=80,
        completion_tokens=8,
        seconds=1.0,
    )


def scored(version: str, split: str, items: str, attempt: str | None = None, **more: Any) -> Scored:
    """`items` is one digit an item: 1 right, 0 wrong."""
    scores = tuple(float(c) for c in items)
    mean = sum(scores) / len(scores)
    return Scored(
        **{
            "attempt": attempt or f"{version}.{split}",
            "version": version,
            "split": split,
            "score": Estimate(value=mean, low=0, high=1, n=len(scores)),
            "items": scores,
            "failures": {},
            "skew": 0.2,
            **more,
        }
    )


def failed(version: str, split: str, kind: str = "crash", tries: int = 0) -> AttemptFailed:
    attempt = f"{version}.{split}" + (f"~{tries}" if tries else "")
    return AttemptFailed(attempt=attempt, version=version, split=split, kind=kind, message="boom")  # type: ignore[arg-type]


def accepted(version: str, over: str | None = None) -> VersionAccepted:
    return VersionAccepted(version=version, over=over, comparison=None, reason="first")


def patched(version: str, parent: str = "g0a", **more: Any) -> HarnessPatched:
    generation, candidate = int(version[1:-1]), ord(version[-1]) - ord("a")
    return HarnessPatched(
        **{
            "version": version,
            "generation": generation,
            "candidate": candidate,
            "parent": parent,
            "harness": D,
            "weights": BASE,
            "edits": ("choose",),
            "reason": "try",
            **more,
        }
    )


def trained(version: str, parent: str, **more: Any) -> WeightsUpdated:
    return WeightsUpdated(
        **{
            "version": version,
            "generation": int(version[1:-1]),
            "parent": parent,
            "harness": D,
            "weights": Weights(model="local/m", adapter="b" * 64),
            "algorithm": "reinforce",
            "rollouts": 8,
            "metrics": {},
            "seconds": 1.0,
            **more,
        }
    )


def feedback_asked(generation: int, incumbent: str = "g0a") -> FeedbackRequested:
    return FeedbackRequested(generation=generation, incumbent=incumbent)


def fed_back(generation: int, lever: str = "harness", incumbent: str = "g0a", **more: Any) -> FeedbackGiven:
    evidence = Evidence(
        incumbent=incumbent,
        dev_score=0.5,
        invalid_rate=0,
        skew=0,
        last_harness_gain=None,
        last_weights_gain=None,
        harness_tries=0,
        weights_tries=0,
        generations_left=1,
    )
    return FeedbackGiven(
        **{
            "generation": generation,
            "incumbent": incumbent,
            "lever": lever,
            "algorithm": "reinforce" if lever == "weights" else None,
            "reasons": ("r",),
            "evidence": evidence,
            **more,
        }
    )


OPENING = (registered(), started(), proposed())
FIRST = (*OPENING, asked("g0a", "dev"), logged("g0a", "dev"), scored("g0a", "dev", "1000"), asked("g0a", "gate"))
ACCEPTED = (*FIRST, logged("g0a", "gate"), scored("g0a", "gate", "10000000"), accepted("g0a"))
SECOND = (
    *ACCEPTED,
    feedback_asked(1),
    fed_back(1),
    patched("g1a"),
    patched("g1b"),
    asked("g1a", "dev"),
    asked("g1b", "dev"),
)
