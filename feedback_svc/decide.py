"""The loop's policy: which candidate meets the gate, what the gate says, and what the next generation owes. Pure."""

from collections.abc import Iterator, Sequence
from typing import Any

from sia_events.feedback_svc.algorithm import learning
from sia_events.feedback_svc.gate import compare_on, hopeless, proven
from sia_events.feedback_svc.search import patches, rollouts
from sia_events.shared.calls import journal_key
from sia_events.shared.events import (
    ApprovalGiven,
    ApprovalRefused,
    ApprovalRequested,
    AttemptFailed,
    AttemptRequested,
    Comparison,
    Event,
    FeedbackGiven,
    FeedbackRequested,
    ProposalFailed,
    RolloutSource,
    RunFinished,
    RunPaused,
    Scored,
    Sealed,
    Split,
    VersionAccepted,
    VersionRejected,
    WeightUpdateRequested,
    WholeAttempt,
)
from sia_events.shared.run import Run, Version, final, in_a_row


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
    """A failure that will not be tried again settles its attempt as a score does; many in a row hold the run."""
    paused: list[Event] = []
    if in_a_row(run, failure) and _too_many_failed(run):
        last = next(each for each in reversed(run.failures.values()) if in_a_row(run, each))
        paused.append(RunPaused(reason=f"{run.failures_in_a_row} attempts failed in a row, the last: {last.message}"))
    return [*paused, *_settle(run, failure)]


def _too_many_failed(run: Run) -> bool:
    """Whether the limit was reached by this failure, or by those that came while the run was held."""
    new = sum(isinstance(fact, AttemptFailed) and in_a_row(run, fact) for fact in run.released) or 1
    most = run.settings.pause_after_failures
    return 0 < most <= run.failures_in_a_row < most + new


def _settle(run: Run, failure: AttemptFailed) -> Sequence[Event]:
    if not final(run, failure) or run.finished:
        return []
    version = run.versions[failure.version]
    match failure.split:
        case "dev":
            return _close_dev(run, version.generation)
        case "gate":
            return [_reject(run, version, None, f"failed on the gate: {failure.message}")]
        case "train":
            if run.attempts[failure.attempt].group is not None:
                return _learn_from_whole(run, version)
            return [_barren(run, "weights", f"no rollouts: {failure.message}")]
        case "test":
            if _ended_by(run) != failure.attempt:
                return []
            reason = f"the sealed test of {version.name} failed: {failure.message}"
            return [RunFinished(outcome="failed", best=run.incumbent, sealed=None, reason=reason)]


def _ended_by(run: Run) -> str:
    """The attempt whose failure is the end: the first of the sealed test, however many fail side by side."""
    return next(name for name, failure in run.failures.items() if failure.split == "test" and final(run, failure))


def on_verdict(run: Run, verdict: VersionAccepted | VersionRejected) -> Sequence[Event]:
    """When every candidate of the generation has its verdict: another generation, or the sealed test."""
    return _go_on(run, run.versions[verdict.version].generation)


def on_barren(run: Run, failed: ProposalFailed) -> Sequence[Event]:
    """A generation without a candidate is closed too."""
    return _go_on(run, failed.generation)


def on_feedback(run: Run, feedback: FeedbackGiven) -> Sequence[Event]:
    """Pull the lever that was chosen, or ask a person first where the run's autonomy ends."""
    autonomy = run.settings.autonomy
    if autonomy == "approve-each" or (autonomy == "approve-weights" and feedback.lever == "weights"):
        reason = f"{feedback.lever}, from {feedback.incumbent}: {'; '.join(feedback.reasons)}"
        return [ApprovalRequested(subject=_subject(feedback), reason=reason)]
    return _pull(run, feedback)


def on_approval(run: Run, given: ApprovalGiven) -> Sequence[Event]:
    """What a person let through goes on."""
    feedback = _asked_about(run, given)
    return _pull(run, feedback) if feedback else []


def on_refusal(run: Run, refused: ApprovalRefused) -> Sequence[Event]:
    """What a person refused closes its generation, as a lever without a candidate does."""
    feedback = _asked_about(run, refused)
    return [_barren(run, feedback.lever, f"refused by {refused.by}: {refused.reason}")] if feedback else []


def _subject(feedback: FeedbackGiven) -> str:
    return f"g{feedback.generation}"


def _asked_about(run: Run, answer: ApprovalGiven | ApprovalRefused) -> FeedbackGiven | None:
    """The choice that awaited this answer; None where it has been acted on, or was about something else."""
    last = run.feedback[-1] if run.feedback else None
    if last is None or answer.subject != _subject(last) or last.generation in run.levers_pulled:
        return None
    return last


def _pull(run: Run, feedback: FeedbackGiven) -> Sequence[Event]:
    """Ask for patches, or for rollouts to learn from."""
    return [patches(run, feedback)] if feedback.lever == "harness" else rollouts(run, feedback)


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
    better = 1 if run.task is None or run.task.maximize else -1
    best = max(scored, key=lambda v: better * _dev(run, v))
    for v in scored:
        if v is not best:
            out.append(_reject(run, v, None, f"{_dev(run, v):.3f} on dev; {best.name} has {_dev(run, best):.3f}"))
    if run.incumbent:
        against = compare_on(run, "dev", run.incumbent, best.name)
        assert against is not None, "an incumbent has a dev score, as every version that met the gate"
        if hopeless(against):
            why = f"worse than {run.incumbent} on dev by {-against.gain:.3f}: no look at the gate"
            return [*out, _reject(run, best, None, why)]
    return [*out, _attempt(run, best.name, "gate")]


def _meet_gate(run: Run, candidate: Version) -> Sequence[Event]:
    if run.incumbent is None:
        return [VersionAccepted(version=candidate.name, over=None, comparison=None, reason="the first agent")]
    if candidate.name in run.verdicts or candidate.name == run.incumbent:
        return []
    comparison = compare_on(run, "gate", run.incumbent, candidate.name)
    assert comparison is not None, "the incumbent met the gate before its candidate did"
    # Every generation looks at the same gate items, so each look gets its share of the error allowed to the run.
    alpha = run.settings.alpha / max(1, run.settings.generations)
    if proven(comparison, alpha):
        most = run.settings.pause_on_gain
        wary: list[Event] = []
        if most is not None and comparison.gain > most:
            # Recorded first: the verdict then comes to a held run, and what follows from it waits for a person.
            wary.append(RunPaused(reason=f"{candidate.name} gained {comparison.gain:+.3f} on the gate: over {most:g}"))
        return [
            *wary,
            VersionAccepted(
                version=candidate.name,
                over=run.incumbent,
                comparison=comparison,
                reason=f"better by {comparison.gain:.3f} on the same {comparison.n} items, "
                f"p = {comparison.p_value:.2g} < {alpha:.2g}",
            ),
        ]
    why = f"no proven gain: {comparison.gain:+.3f}, p = {comparison.p_value:.2g}"
    return [_reject(run, candidate, comparison, why)]


def _learn(run: Run, scored: Scored) -> Sequence[Event]:
    if run.attempts[scored.attempt].group is not None:
        return _learn_from_whole(run, run.versions[scored.version])
    assert scored.rewards is not None, "a train score keeps its rewards"
    logged = run.executions[scored.attempt]
    return [
        _update(run, scored.version, trajectory=logged.trajectory, rewards=scored.rewards, older=_older(run, scored))
    ]


def _update(run: Run, parent: str, **rollouts: Any) -> WeightUpdateRequested:
    algorithm = run.feedback[-1].algorithm
    assert algorithm is not None, "the weights are chosen with an algorithm"
    return WeightUpdateRequested(
        generation=run.generation,
        parent=parent,
        algorithm=algorithm,
        epochs=run.settings.epochs,
        seed=run.settings.seed,
        learning=learning(run.settings, algorithm),
        **rollouts,
    )


def _older(run: Run, scored: Scored) -> tuple[RolloutSource, ...]:
    """Earlier rollouts under the same harness, at most `learning.max_lag` adapters behind, the newest first.

    The lag is counted along the version's ancestors. 0 as the most asks for the rollouts of this generation alone.
    """
    if not run.settings.learning.max_lag:
        return ()
    return tuple(
        RolloutSource(
            attempt=earlier.attempt,
            version=version.name,
            trajectory=run.executions[earlier.attempt].trajectory,
            rewards=earlier.rewards,
            lag=lag,
        )
        for version, lag in _acted_alike(run, run.versions[scored.version])
        for earlier in reversed(run.scored(version.name, "train"))
        if earlier.rewards is not None and earlier.attempt != scored.attempt
    )


def _acted_alike(run: Run, version: Version) -> Iterator[tuple[Version, int]]:
    """The version, and its ancestors under the same harness that are at most `learning.max_lag` adapters behind."""
    harness, lag = version.harness, 0
    while lag <= run.settings.learning.max_lag:
        if version.harness == harness:
            yield version, lag
        if version.parent is None:
            break
        parent = run.versions[version.parent]
        version, lag = parent, lag + (parent.weights != version.weights)


def _learn_from_whole(run: Run, version: Version) -> Sequence[Event]:
    """Once every whole attempt of this generation has its score or failure: learn from those that have a reward."""
    roots = {
        journal_key(name)
        for name, asked in run.attempts.items()
        if asked.group is not None and name.startswith(f"{version.name}.train.g{run.generation}.")
    }
    settled = {journal_key(name) for name in run.scores}
    settled |= {journal_key(name) for name, failure in run.failures.items() if final(run, failure)}
    if roots - settled:
        return []
    found = [
        each
        for made, lag in _acted_alike(run, version)
        for each in whole_attempts(run, made, lag)
        if run.settings.learning.max_lag or journal_key(each.attempt) in roots
    ]
    if not any(journal_key(each.attempt) in roots for each in found):
        last = next(failure for failure in reversed(run.failures.values()) if journal_key(failure.attempt) in roots)
        return [_barren(run, "weights", f"no rollouts: all {len(roots)} failed, the last: {last.message}")]
    return [_update(run, version.name, whole=tuple(found))]


def whole_attempts(run: Run, version: Version, lag: int) -> Sequence[WholeAttempt]:
    """The version's rollouts that are worth something known, in the order they were asked for.

    What the evaluator refused is worth the least of its siblings, and nothing at most where more is better: an agent is
    not to learn that refused outputs cost nothing. What broke off has no trajectory and is left out.
    """
    rollouts = {name: asked for name, asked in run.attempts.items() if asked.version == version.name and asked.group}
    sign = 1.0 if run.task is None or run.task.maximize else -1.0
    rewards = {name: sign * run.scores[name].score.value for name in rollouts if name in run.scores}
    least: dict[str | None, float] = {each.group: 0.0 for each in rollouts.values()} if sign > 0 else {}
    for name, reward in rewards.items():
        group = rollouts[name].group
        least[group] = min(reward, least.get(group, reward))
    for name, failure in run.failures.items():
        if name in rollouts and name in run.executions and failure.kind == "invalid_output":
            group = rollouts[name].group
            if group in least:
                rewards[name] = least[group]
    return [
        WholeAttempt(
            attempt=name,
            version=version.name,
            group=asked.group,
            trajectory=run.executions[name].trajectory,
            reward=rewards[name],
            lag=lag,
        )
        for name, asked in rollouts.items()
        if asked.group is not None and name in rewards
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
    comparison = compare_on(run, "test", run.first, run.incumbent)
    if comparison is None:
        return []
    first, final = (run.scored(name, "test")[-1].score for name in (run.first, run.incumbent))
    sealed = Sealed(first=first, final=final, comparison=comparison)
    improved = proven(comparison, run.settings.alpha)
    gain = f"{comparison.gain:+.3f} on {comparison.n} sealed test items, p = {comparison.p_value:.2g}"
    reason = f"{run.incumbent} over {run.first}: {gain}" if improved else f"no gain could be shown: {gain}"
    return [
        RunFinished(
            outcome="improved" if improved else "no proven gain", best=run.incumbent, sealed=sealed, reason=reason
        )
    ]


def _attempt(run: Run, version: str, split: Split) -> AttemptRequested:
    """On a split that is judged, from what the version started from on dev, where it did."""
    dev = run.attempts.get(f"{version}.dev")
    return AttemptRequested(
        attempt=f"{version}.{split}",
        version=version,
        split=split,
        seed=run.settings.seed,
        starts=dev.starts if dev else (),
    )


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
