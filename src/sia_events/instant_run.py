"""Runs in memory, as long as is asked for: one decided by the services and performed by nobody, and one of news."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sia_events import app
from sia_events.shared.events import (
    AgentProposed,
    AttemptRequested,
    Estimate,
    Event,
    Evidence,
    ExecutionLogged,
    FeedbackGiven,
    FeedbackRequested,
    HarnessPatched,
    HarnessPatchRequested,
    RunSettings,
    RunStarted,
    Scored,
    TaskRegistered,
    Weights,
)
from sia_events.shared.record import GENESIS, Draft, Record, answers, opening, place
from sia_events.shared.run import Run
from sia_events.shared.service import Lineage

DIGEST = "a" * 64
WEIGHTS = Weights(model="instant/first")
ITEMS = 8
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def instant_run(name: str, generations: int) -> Sequence[Record]:
    """A run's records to its end, about eleven a generation: every decision is the services', every score is drawn."""
    splits: dict[str, int] = dict.fromkeys(("train", "dev", "gate", "test"), ITEMS)
    registered = TaskRegistered(
        task="trivial",
        title="Say ok",
        metric="accuracy",
        maximize=True,
        spec=DIGEST,
        datasets=dict.fromkeys(splits, DIGEST),
        answers=DIGEST,
        reference=DIGEST,
        sizes=splits,
        floor=None,
    )
    wanted = RunSettings(generations=generations, candidates=1, lever="harness", target_model=WEIGHTS.model)
    lineage, owed = Lineage(), deque[Record]()

    def append(drafts: Sequence[Draft]) -> None:
        for draft in drafts:
            last = lineage.records[-1] if lineage.records else None
            position, chain = (last.position + 1, last.chain) if last else (1, GENESIS)
            record = place(draft, name, position, chain, BEGAN + timedelta(seconds=position))
            lineage.extend([*lineage.records, record])
            owed.append(record)

    append(opening(name, [registered, RunStarted(settings=wanted, code="bench")]))
    while owed:
        cause = owed.popleft()
        for service in app.SERVICES.values():
            if decide := service.decides.get(type(cause.event)):
                append(answers(name, cause, service.name, lineage.decided(decide, cause, name)))
            elif perform := _PERFORMED.get((service.name, type(cause.event))):
                append(answers(name, cause, service.name, perform(lineage.state(cause, name), cause.event)))
    return lineage.records


def long_run(name: str, records: int, news: Event) -> Iterator[Record]:
    """A run that tells the same news over and over."""
    (last,) = (place(draft, name, 1, GENESIS, BEGAN) for draft in opening(name, [news]))
    yield last
    for position in range(2, records + 1):
        (draft,) = answers(name, last, "bench", [news])
        last = place(draft, name, position, last.chain, BEGAN)
        yield last


def _proposed(_: Run, __: RunStarted) -> Sequence[Event]:
    return [AgentProposed(version="g0a", candidate=0, harness=DIGEST, weights=WEIGHTS, reason="the first")]


def _executed(_: Run, asked: AttemptRequested) -> Sequence[Event]:
    return [
        ExecutionLogged(
            attempt=asked.attempt,
            version=asked.version,
            split=asked.split,
            outputs=DIGEST,
            trajectory=DIGEST,
            calls=ITEMS,
            prompt_tokens=80,
            completion_tokens=8,
            seconds=0.1,
        )
    ]


def _scored(_: Run, ran: ExecutionLogged) -> Sequence[Event]:
    draw = random.Random(ran.attempt)
    items = tuple(float(draw.random() < 0.5) for _ in range(ITEMS))
    score = Estimate(value=sum(items) / ITEMS, low=0.0, high=1.0, n=ITEMS)
    return [
        Scored(
            attempt=ran.attempt,
            version=ran.version,
            split=ran.split,
            score=score,
            items=items,
            failures={},
            skew=0.0,
        )
    ]


def _advised(run: Run, asked: FeedbackRequested) -> Sequence[Event]:
    evidence = Evidence(
        incumbent=asked.incumbent,
        dev_score=0.5,
        invalid_rate=0.0,
        skew=0.0,
        last_harness_gain=None,
        last_weights_gain=None,
        harness_tries=asked.generation,
        weights_tries=0,
        generations_left=run.settings.generations - asked.generation,
    )
    return [
        FeedbackGiven(
            generation=asked.generation,
            incumbent=asked.incumbent,
            lever="harness",
            algorithm=None,
            reasons=("it is the only one allowed",),
            evidence=evidence,
        )
    ]


def _patched(run: Run, asked: HarnessPatchRequested) -> Sequence[Event]:
    return [
        HarnessPatched(
            version=f"g{asked.generation}a",
            generation=asked.generation,
            candidate=0,
            parent=asked.parent,
            harness=DIGEST,
            weights=run.versions[asked.parent].weights,
            edits=(),
            reason="the same again",
        )
    ]


_PERFORMED: Mapping[tuple[str, type[Event]], Callable[[Run, Any], Sequence[Event]]] = {
    ("meta_svc", RunStarted): _proposed,
    ("target_runner", AttemptRequested): _executed,
    ("evaluator", ExecutionLogged): _scored,
    ("feedback_svc", FeedbackRequested): _advised,
    ("feedback_svc", HarnessPatchRequested): _patched,
}
