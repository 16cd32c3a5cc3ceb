"""Where a generation's candidates, or its rollouts, start from, by the run's search. Pure."""

from collections.abc import Sequence

from sia_events.feedback_svc.archive import starts
from sia_events.shared.events import AttemptRequested, FeedbackGiven, HarnessPatchRequested
from sia_events.shared.run import Run, Version


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


def rollouts(run: Run, feedback: FeedbackGiven) -> AttemptRequested:
    """The request for rollouts to learn from: the incumbent's, whatever the search.

    In an `archive` they start from what archived versions wrote, as many of these as a generation has candidates.
    """
    settings, version = run.settings, feedback.incumbent
    reuse = settings.search == "archive"
    return AttemptRequested(
        attempt=f"{version}.train.g{feedback.generation}",
        version=version,
        split="train",
        items=settings.rollout_items,
        samples=settings.rollout_samples,
        seed=settings.seed + feedback.generation,
        starts=starts(run, settings.rollout_items, settings.candidates) if reuse else (),
    )


def parents(run: Run, asked: HarnessPatchRequested) -> Sequence[tuple[Version, int]]:
    """The versions that were asked to be started from, and how many candidates each."""
    shares = [(start.version, start.share) for start in asked.starts] or [(asked.parent, asked.candidates)]
    return [(run.versions[name], count) for name, count in shares]
