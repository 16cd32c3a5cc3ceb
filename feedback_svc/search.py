"""Where a generation's candidates, or its rollouts, start from, by the run's search. Pure."""

from collections.abc import Sequence

from sia_events.shared.archive import starts
from sia_events.shared.events import (
    AttemptRequested,
    FeedbackGiven,
    HarnessPatchRequested,
    VersionAccepted,
    Weights,
)
from sia_events.shared.run import Run, Version

SIBLINGS_APART = 1_000_003
ASKED_AT_ONCE = 500  # of one answer's records, of which an append takes a thousand


def patches(run: Run, feedback: FeedbackGiven) -> HarnessPatchRequested:
    """The request for a generation's candidates.

    `line` starts all of them from the incumbent, `archive` from versions that PUCT picks, accepted or not. `best-of-k`
    starts them from the first agent, each time anew: the control that reuses nothing.
    """
    settings = run.settings
    chosen = starts(run, settings.candidates, settings.candidates) if settings.search == "archive" else ()
    parent = run.first if settings.search == "best-of-k" else feedback.incumbent
    assert parent is not None, "feedback is given behind the first verdict"
    return HarnessPatchRequested(
        generation=feedback.generation,
        parent=chosen[0].version if chosen else parent,
        candidates=settings.candidates,
        seed=settings.seed,
        starts=chosen,
    )


def rollouts(run: Run, feedback: FeedbackGiven) -> Sequence[AttemptRequested]:
    """The requests for rollouts to learn from: the incumbent's, whatever the search.

    In an `archive` they start from what archived versions wrote, as many of these as a generation has candidates. They
    are one attempt at many items; where the task has none, each is an attempt, and those that start alike are a group.
    """
    assert run.task is not None, "feedback is given behind a task"
    settings, version = run.settings, feedback.incumbent
    reuse, name = settings.search == "archive", f"{feedback.incumbent}.train.g{feedback.generation}"
    if run.task.whole:
        count = settings.rollout_samples
        most = min(settings.candidates, ASKED_AT_ONCE // count)
        chosen = starts(run, most, most, rollouts=True) if reuse else ()
        # By place: a state may be a rollout's, whose name would grow from one to the next, and may have a try's number.
        groups = [(f"{name}.{place}", (start,)) for place, start in enumerate(chosen)] or [(name, ())]
        return [
            AttemptRequested(
                attempt=f"{group}.{k}",
                version=version,
                split="train",
                # Siblings ask the same: only their seeds have them answered otherwise.
                seed=settings.seed + feedback.generation + SIBLINGS_APART * k,
                starts=start,
                group=group,
            )
            for group, start in groups
            for k in range(count)
        ]
    return [
        AttemptRequested(
            attempt=name,
            version=version,
            split="train",
            items=settings.rollout_items,
            samples=settings.rollout_samples,
            seed=settings.seed + feedback.generation,
            starts=starts(run, settings.rollout_items, settings.candidates) if reuse else (),
        )
    ]


def parents(run: Run, asked: HarnessPatchRequested) -> Sequence[tuple[Version, int]]:
    """The versions that were asked to be started from, and how many candidates each."""
    shares = [(start.version, start.share) for start in asked.starts] or [(asked.parent, asked.candidates)]
    return [(run.versions[name], count) for name, count in shares]


def weights_from(run: Run, parent: Version) -> Weights:
    """What a candidate from `parent` acts with: its weights, or the incumbent's where these were never let through.

    A search goes on from versions that were refused; an adapter that was refused is used no more.
    """
    let_through = (run.versions[name] for name, said in run.verdicts.items() if isinstance(said, VersionAccepted))
    if any(version.weights == parent.weights for version in let_through):
        return parent.weights
    assert run.incumbent is not None, "candidates are asked for behind the first verdict"
    return run.versions[run.incumbent].weights
