"""The loop's policy: which candidate meets the gate, what the gate says, and what the next generation owes. Pure."""

from collections.abc import Sequence

from sia_events.feedback_svc.gate import compare, hopeless, proven
from sia_events.shared.events import (
    AttemptFailed,
    AttemptRequested,
    Comparison,
    Event,
    FeedbackGiven,
    FeedbackRequested,
    HarnessPatchRequested,
    ProposalFailed,
    RunFinished,
    Scored,
    Sealed,
    Split,
    VersionAccepted,
    VersionRejected,
    WeightUpdateRequested,
)
from sia_events.shared.run import Run, Version, final


def on_score(run: Run, scored: Scored) -> Sequence[Event]:
    """A score closes the dev round, meets the gate, feeds the trainer, or is the sealed test's."""
    match scored.split:
        case "dev":
            return _close_dev(run, run.versions[scored.version].generation)
        case "gate":
            return _meet_gate(run, run.versions[scored.version])
        case "train":
            return _learn(run, scored)
        case "test":
            return _finish(run)


def on_failure(run: Run, failure: AttemptFailed) -> Sequence[Event]:
    """A failure that will not be tried again settles its attempt as surely as a score does."""
    if not final(run, failure) or run.finished:
        return []
    version = run.versions[failure.version]
    match failure.split:
        case "dev":
            return _close_dev(run, version.generation)
        case "gate":
            return [_reject(run, version, None, f"failed on the gate: {failure.message}")]
        case "train":
            return [_barren(run, "weights", f"no rollouts: {failure.message}")]
        case "test":
            reason = f"the sealed test of {version.name} failed: {failure.message}"
            return [RunFinished(outcome="failed", best=run.incumbent, sealed=None, reason=reason)]


def on_verdict(run: Run, verdict: VersionAccepted | VersionRejected) -> Sequence[Event]:
    """When every candidate of the generation has its verdict: another generation, or the sealed test."""
    return _go_on(run, run.versions[verdict.version].generation)


def on_barren(run: Run, failed: ProposalFailed) -> Sequence[Event]:
    """A generation without a candidate is closed too."""
    return _go_on(run, failed.generation)


def on_feedback(run: Run, feedback: FeedbackGiven) -> Sequence[Event]:
    """Pull the lever that was chosen: ask for patches, or for rollouts to learn from."""
    settings = run.settings
    if feedback.lever == "harness":
        return [
            HarnessPatchRequested(
                generation=feedback.generation,
                parent=feedback.incumbent,
                candidates=settings.candidates,
                seed=settings.seed,
            )
        ]
    return [
        AttemptRequested(
            attempt=f"{feedback.incumbent}.train.g{feedback.generation}",
            version=feedback.incumbent,
            split="train",
            items=settings.rollout_items,
            samples=settings.rollout_samples,
            seed=settings.seed + feedback.generation,
        )
    ]


def _close_dev(run: Run, generation: int) -> Sequence[Event]:
    """Once every candidate has its dev score or failure: the best one meets the gate, the others are out."""
    if generation != run.generation:
        return []
    candidates = [v for v in run.of_generation(generation) if v.name not in run.verdicts]
    if any(not run.scored(v.name, "dev") and run.failed(v.name, "dev") is None for v in candidates):
        return []
    scored = [v for v in candidates if run.scored(v.name, "dev")]
    out = [
        _reject(run, v, None, f"failed on dev: {failure.kind}: {failure.message}")
        for v in candidates
        if (failure := run.failed(v.name, "dev")) and not run.scored(v.name, "dev")
    ]
    if not scored:
        return out
    best = max(scored, key=lambda v: _dev(run, v) if _maximize(run) else -_dev(run, v))
    for v in scored:
        if v is not best:
            out.append(_reject(run, v, None, f"{_dev(run, v):.3f} on dev; {best.name} has {_dev(run, best):.3f}"))
    if run.incumbent:
        before, after = (_items(run, run.scored(name, "dev")[-1]) for name in (run.incumbent, best.name))
        if hopeless(against := compare(before, after)):
            why = f"worse than {run.incumbent} on dev by {-against.gain:.3f}: no look at the gate"
            return [*out, _reject(run, best, None, why)]
    return [*out, _attempt(run, best.name, "gate")]


def _meet_gate(run: Run, candidate: Version) -> Sequence[Event]:
    if run.incumbent is None:
        return [VersionAccepted(version=candidate.name, over=None, comparison=None, reason="the first agent")]
    if candidate.name in run.verdicts or candidate.name == run.incumbent:
        return []
    before, after = (_items(run, run.scored(name, "gate")[-1]) for name in (run.incumbent, candidate.name))
    comparison = compare(before, after)
    # Every generation looks at the same gate items, so each look gets its share of the error allowed to the run.
    alpha = run.settings.alpha / run.settings.generations
    if proven(comparison, alpha):
        return [
            VersionAccepted(
                version=candidate.name,
                over=run.incumbent,
                comparison=comparison,
                reason=f"better by {comparison.gain:.3f} on the same {comparison.n} items, "
                f"p = {comparison.p_value:.2g} < {alpha:.2g}",
            )
        ]
    why = f"no proven gain: {comparison.gain:+.3f}, p = {comparison.p_value:.2g}"
    return [_reject(run, candidate, comparison, why)]


def _learn(run: Run, scored: Scored) -> Sequence[Event]:
    assert scored.rewards is not None, "a train score keeps its rewards"
    return [
        WeightUpdateRequested(
            generation=run.generation,
            parent=scored.version,
            algorithm=run.settings.algorithm,
            trajectory=run.executions[scored.attempt].trajectory,
            rewards=scored.rewards,
            epochs=run.settings.epochs,
            seed=run.settings.seed,
        )
    ]


def _go_on(run: Run, generation: int) -> Sequence[Event]:
    if generation != run.generation or any(v.name not in run.verdicts for v in run.of_generation(generation)):
        return []
    if run.incumbent is None:
        why = "; ".join(verdict.reason for verdict in run.verdicts.values())
        return [RunFinished(outcome="failed", best=None, sealed=None, reason=f"no first agent runs: {why}")]
    if generation < run.settings.generations:
        return [FeedbackRequested(generation=generation + 1, incumbent=run.incumbent)]
    assert run.first is not None
    return [_attempt(run, name, "test") for name in dict.fromkeys((run.first, run.incumbent))]


def _finish(run: Run) -> Sequence[Event]:
    assert run.first is not None and run.incumbent is not None
    first, last = run.scored(run.first, "test"), run.scored(run.incumbent, "test")
    if not first or not last:
        return []
    comparison = compare(_items(run, first[0]), _items(run, last[0]))
    sealed = Sealed(first=first[0].score, final=last[0].score, comparison=comparison)
    improved = proven(comparison, run.settings.alpha)
    gain = f"{comparison.gain:+.3f} on {comparison.n} sealed test items, p = {comparison.p_value:.2g}"
    reason = f"{run.incumbent} over {run.first}: {gain}" if improved else f"no gain could be shown: {gain}"
    return [
        RunFinished(
            outcome="improved" if improved else "no proven gain", best=run.incumbent, sealed=sealed, reason=reason
        )
    ]


def _attempt(run: Run, version: str, split: Split) -> AttemptRequested:
    return AttemptRequested(attempt=f"{version}.{split}", version=version, split=split, seed=run.settings.seed)


def _reject(run: Run, version: Version, comparison: Comparison | None, reason: str) -> VersionRejected:
    return VersionRejected(version=version.name, over=run.incumbent, comparison=comparison, reason=reason)


def _barren(run: Run, lever: str, reason: str) -> ProposalFailed:
    assert run.incumbent is not None
    return ProposalFailed(
        generation=run.generation,
        parent=run.incumbent,
        lever="weights" if lever == "weights" else "harness",
        reason=reason,
    )


def _dev(run: Run, version: Version) -> float:
    return run.scored(version.name, "dev")[-1].score.value


def _maximize(run: Run) -> bool:
    return run.task is None or run.task.maximize


def _items(run: Run, scored: Scored) -> tuple[float, ...]:
    """Per-item scores with the sign under which more is better."""
    return scored.items if _maximize(run) else tuple(-item for item in scored.items)
