"""The controls of the lever share what they are compared on: generations, looks at the gate, limits and seeds."""

from collections import Counter, deque
from dataclasses import dataclass
from random import Random
from typing import Any, get_args

from given import NOON, recorded
from hypothesis import given as any_
from hypothesis import settings as slow
from hypothesis import strategies as st
from story import BASE, D, logged, proposed, registered, scored, started, trained

from sia_events.feedback_svc.algorithm import Signal
from sia_events.feedback_svc.lever import choose_lever
from sia_events.feedback_svc.service import feedback_svc
from sia_events.feedback_svc.writer import given as chosen
from sia_events.shared.events import (
    AttemptRequested,
    Event,
    FeedbackGiven,
    FeedbackRequested,
    HarnessPatched,
    HarnessPatchRequested,
    LeverPolicy,
    RunFinished,
    WeightUpdateRequested,
)
from sia_events.shared.record import Draft, Record, derived_id, place
from sia_events.shared.run import Run, fold
from sia_events.target_runner.service import target_runner

POLICIES: tuple[LeverPolicy, ...] = get_args(LeverPolicy)
CANDIDATES, ITEMS = 2, 40


@dataclass(frozen=True)
class World:
    """What agents of a version score: drawn by its name, so that versions of one name are alike under any policy."""

    luck: int

    def score(self, version: str, split: str) -> str:
        right = Random(f"{self.luck}/{version}").random()
        draw = Random(f"{self.luck}/{version}/{split}")
        return "".join("1" if draw.random() < right else "0" for _ in range(ITEMS))


def simulated(policy: LeverPolicy, world: World, generations: int, seed: int) -> list[Event]:
    """A whole run under the services' own decisions; what they would perform comes from `world`."""
    settings: dict[str, Any] = {"generations": generations, "candidates": CANDIDATES, "lever": policy, "seed": seed}
    due: deque[Event] = deque([registered(), started(**settings), proposed()])
    records: list[Record] = []
    run = Run()
    while due:
        event = due.popleft()
        records.append(placed(event, records))
        run = fold(records[-1:], run)
        for service in (feedback_svc, target_runner):
            if decide := service.decides.get(type(event)):
                due.extend(decide(run, event))
        due.extend(performed(event, run, records, world))
    return [record.event for record in records]


def placed(event: Event, records: list[Record]) -> Record:
    if not records:
        return recorded(event)[0]
    last = records[-1]
    draft = Draft(event, "test", last.id, records[0].id, derived_id("r1", last.id, "test", 0))
    return place(draft, "r1", last.position + 1, last.chain, NOON)


def performed(event: Event, run: Run, records: list[Record], world: World) -> list[Event]:
    match event:
        case AttemptRequested():
            named = {"attempt": event.attempt}
            items = world.score(event.version, event.split)
            score = scored(event.version, event.split, items, event.attempt, rewards=D)
            return [logged(event.version, event.split).model_copy(update=named), score]
        case FeedbackRequested():
            return [chosen(event, choose_lever(run, records, Signal()))]
        case HarnessPatchRequested():
            return [candidate(event, place) for place in range(event.candidates)]
        case WeightUpdateRequested():
            return [trained(f"g{event.generation}a", event.parent)]
        case _:
            return []


def candidate(asked: HarnessPatchRequested, place: int) -> HarnessPatched:
    return HarnessPatched(
        version=f"g{asked.generation}{'ab'[place]}",
        generation=asked.generation,
        candidate=place,
        parent=asked.parent,
        harness=D,
        weights=BASE,
        edits=("choose",),
        reason="try",
    )


def requested(run: list[Event]) -> list[AttemptRequested]:
    return [event for event in run if isinstance(event, AttemptRequested)]


@slow(max_examples=15)
@any_(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_every_control_spends_the_same_generations_and_looks_as_often_at_gate_and_test(
    luck: int, generations: int, seed: int
):
    for policy in POLICIES:
        run = simulated(policy, World(luck), generations, seed)
        assert isinstance(run[-1], RunFinished)
        levers = [event.lever for event in run if isinstance(event, FeedbackGiven)]
        assert len(levers) == generations
        spent = Counter(event.split for event in requested(run))
        harness, weights = levers.count("harness"), levers.count("weights")
        assert spent["dev"] == 1 + CANDIDATES * harness + weights and spent["train"] == weights
        assert spent["gate"] <= 1 + generations and spent["test"] <= 2
        if policy in ("harness", "weights"):
            assert set(levers) <= {policy}


@slow(max_examples=15)
@any_(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 2**30))
def test_the_seed_of_an_attempt_depends_on_split_and_generation_alone_whatever_the_policy(
    luck: int, generations: int, seed: int
):
    for policy in POLICIES:
        run = simulated(policy, World(luck), generations, seed)
        for event in requested(run):
            generation = int(event.attempt.rpartition(".g")[2]) if event.split == "train" else 0
            assert event.seed == seed + generation
        assert all(event.seed == seed for event in run if isinstance(event, HarnessPatchRequested))
        assert all(event.seed == seed for event in run if isinstance(event, WeightUpdateRequested))


def test_policies_that_pulled_the_same_levers_had_the_same_run():
    """A policy picks levers and does nothing else: with the same picks all that follows is the same."""
    met = 0
    for luck in range(20):
        by_levers: dict[tuple[str, ...], list[Event]] = {}
        for policy in POLICIES:
            run = simulated(policy, World(luck), generations=2, seed=3)
            levers = tuple(event.lever for event in run if isinstance(event, FeedbackGiven))
            rest = [event for event in run if event.type not in ("FeedbackGiven", "RunStarted")]
            met += levers in by_levers
            assert by_levers.setdefault(levers, rest) == rest
    assert met
