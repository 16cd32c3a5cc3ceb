"""Branches at every position of a run, with a candidate or a word of one's own: on the in-memory adapters."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from given import recorded
from story import D, failed, logged, registered, started
from test_loop import SERVICES, World
from test_one_end import SEALED

from sia_events.branching import Change, Feedback, planned, require_items
from sia_events.errors import Unusable
from sia_events.feedback_svc.lever import gather
from sia_events.feedback_svc.service import feedback_svc
from sia_events.forks import Fork, at_generation, at_position
from sia_events.infra.memory import MemoryBus
from sia_events.shared.events import (
    Event,
    FeedbackGiven,
    FeedbackRequested,
    HarnessPatched,
    LetterDropped,
    RunBranched,
    RunFinished,
    RunPaused,
    RunSettings,
    RunSteered,
    ServiceFailed,
)
from sia_events.shared.record import Record, answers, broken_link, opening
from sia_events.shared.replay import replay
from sia_events.shared.run import fold


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, list[Record]]:
    world = World(tmp_path_factory.mktemp("home"))

    async def whole() -> list[Record]:
        await world.start("r1", generations=1, candidates=2)
        return await world.finish("r1")

    return world, asyncio.run(whole())


async def opened(world: World, name: str, fork: Fork, *more: Event, **changes: Any) -> list[Record]:
    """The whole history of a branch that was opened and went to its end."""
    settings = fork.state.settings.model_copy(update=changes)
    event = RunBranched(
        parent=fork.state.name, at=fork.at, generation=0, overrides=changes, settings=settings, code="test"
    )
    await world.bus.append(name, opening(name, [event, *more]))
    return await world.finish(name)


async def seen(world: World, run: str, happened: Callable[[Sequence[Record]], bool]) -> Sequence[Record]:
    """The run's history, once that has happened."""
    async with asyncio.timeout(60):
        while True:
            history = await world.bus.history(run)
            if happened(history):
                return history
            await asyncio.sleep(0)


def patched(fork: Fork, harness: str) -> HarnessPatched:
    generation = fork.state.generation + 1
    parent = fork.state.versions[fork.state.incumbent or ""]
    return HarnessPatched(
        version=f"g{generation}a",
        generation=generation,
        candidate=0,
        parent=parent.name,
        harness=harness,
        weights=parent.weights,
        edits=(),
        reason="entered by hand",
    )


async def test_a_branch_at_every_position_goes_to_its_end_and_replays(finished: tuple[World, list[Record]]):
    world, records = finished
    forks, refused = list[Fork](), list[int]()
    for position in range(1, len(records) + 1):
        try:
            forks.append(at_position(records, position))
        except Unusable:
            refused.append(position)
    assert len(forks) > len(records) / 2
    for fork in forks:
        history = await opened(world, f"at{fork.at}", fork, seed=7)
        assert history[: fork.at] == records[: fork.at] and broken_link(history) is None
        state = fold(history)
        assert state.finished and state.finished.outcome == "improved", fork.at
        found = replay(history, SERVICES)
        assert (found.divergence, found.pending) == (None, 0), fork.at
    batches = [
        record.position - 1
        for before, record in pairwise(records)
        if (before.cause, before.producer) == (record.cause, record.producer)
    ]
    assert refused == [1, *batches, len(records)]


@pytest.mark.parametrize(("position", "why"), [(0, "positions 1 to"), (999, "and no 999"), (1, "written together")])
def test_a_position_in_the_future_or_inside_a_batch_is_refused(
    finished: tuple[World, list[Record]], position: int, why: str
):
    with pytest.raises(Unusable, match=why):
        at_position(finished[1], position)


def test_the_refusal_inside_a_batch_names_both_its_ends(finished: tuple[World, list[Record]]):
    _, records = finished
    first = next(r for r in records if isinstance(r.event, HarnessPatched))
    said = f"inside records {first.position} to {first.position + 1}.*branch at {first.position - 1} or "
    with pytest.raises(Unusable, match=said):
        at_position(records, first.position)
    assert at_position(records, first.position + 1).at == first.position + 1


def test_behind_the_end_of_a_run_nothing_is_left_to_do(finished: tuple[World, list[Record]]):
    _, records = finished
    with pytest.raises(Unusable, match="the run is over there"):
        at_position(records, len(records))


def test_behind_an_end_nothing_is_left_to_do_though_another_sealed_attempt_was_under_way():
    end = RunFinished(outcome="failed", best="g1a", sealed=None, reason="boom")
    history = recorded(*SEALED, failed("g0a", "test"), end, logged("g1a", "test"))
    assert at_position(history, len(history) - 2).at == len(history) - 2
    for position in (len(history) - 1, len(history)):
        with pytest.raises(Unusable, match="the run is over there"):
            at_position(history, position)


async def test_what_a_person_gave_up_is_nothing_that_a_branch_could_do():
    bus = MemoryBus()
    _, asked = await bus.append("r1", opening("r1", [registered(), started()]))
    letter_of_meta = ServiceFailed(service="meta_svc", failed=str(asked.id), sequence=2, error="no", payload=D, tries=5)
    (letter,) = await bus.append("r1", answers("r1", asked, "meta_svc", [letter_of_meta]))
    assert at_position(await bus.history("r1"), 3).at == 3
    dropped = LetterDropped(letter=str(letter.id), by="ada", reason="lost for good")
    await bus.append("r1", answers("r1", letter, "cli", [dropped]))
    with pytest.raises(Unusable, match="nothing is left to do"):
        at_position(await bus.history("r1"), 4)


async def test_where_an_approval_is_awaited_a_branch_takes_the_position_before(tmp_path: Path):
    world = World(tmp_path)
    await world.start("r1", autonomy="approve-each", generations=1, candidates=1)
    async with world.serving("r1", SERVICES):
        history = await seen(world, "r1", lambda history: fold(history).waiting is not None)
    with pytest.raises(Unusable, match="approval of g1"):
        at_position(history, len(history))
    whole = await opened(world, "b1", at_position(history, len(history) - 1), autonomy="full")
    assert fold(whole).finished


async def test_a_harness_entered_by_hand_is_tried_meets_the_gate_and_takes_no_feedback(
    finished: tuple[World, list[Record]],
):
    world, records = finished
    best = next(r.event.harness for r in records if isinstance(r.event, HarnessPatched))
    history = await opened(world, "mine", fork := at_generation(records, 0), patched(fork, best))
    own = history[fork.at :]
    assert not [r for r in own if isinstance(r.event, FeedbackRequested)]
    state = fold(history)
    assert [v.name for v in state.of_generation(1)] == ["g1a"] and "g1a" in state.verdicts
    assert isinstance(history[-1].event, RunFinished) and state.incumbent == "g1a"
    assert replay(history, SERVICES).divergence is None


async def test_feedback_given_by_hand_pulls_its_lever_and_none_is_asked_for(finished: tuple[World, list[Record]]):
    world, records = finished
    fork = at_generation(records, 0)
    given = FeedbackGiven(
        generation=1,
        incumbent="g0a",
        lever="harness",
        algorithm=None,
        reasons=("a hunch",),
        evidence=gather(replace(fork.state, generation=1), records[: fork.at]),
    )
    history = await opened(world, "advised", fork, given)
    own = history[fork.at :]
    assert not [r for r in own if isinstance(r.event, FeedbackRequested)]
    assert [r.event.reasons for r in own if isinstance(r.event, FeedbackGiven)] == [("a hunch",)]
    assert fold(history).generation == 1 and len(fold(history).of_generation(1)) == 2
    assert isinstance(history[-1].event, RunFinished) and replay(history, SERVICES).divergence is None


async def test_a_word_said_with_the_branch_reaches_the_feedback_that_the_parent_had_asked_for(
    finished: tuple[World, list[Record]],
):
    world, records = finished
    asked = next(r for r in records if isinstance(r.event, FeedbackRequested))
    read = list[tuple[str, ...]]()
    heard = feedback_svc.performs[FeedbackRequested]

    async def listening(work: Any, event: Any) -> Any:
        read.append(work.run.steering)
        return await heard(work, event)

    listener = replace(feedback_svc, performs={**feedback_svc.performs, FeedbackRequested: listening})
    services = tuple(listener if service is feedback_svc else service for service in SERVICES)
    fork = at_position(records, asked.position)
    settings = fork.state.settings
    event = RunBranched(parent="r1", at=fork.at, generation=1, overrides={}, settings=settings, code="test")
    await world.bus.append("steered", opening("steered", [event, RunSteered(text="be brief")]))
    history = await world.finish("steered", services)
    assert read == [("be brief",)]
    assert replay(history, SERVICES).divergence is None


async def test_a_word_said_later_is_no_part_of_the_opening(finished: tuple[World, list[Record]]):
    world, records = finished
    fork = at_generation(records, 0)
    event = RunBranched(parent="r1", at=fork.at, generation=0, overrides={}, settings=fork.state.settings, code="test")
    (first,) = await world.bus.append("held", opening("held", [event]))
    await world.bus.append("held", answers("held", first, "cli", [RunPaused(reason="lunch")]))
    async with world.serving("held", SERVICES):
        history = await seen(world, "held", lambda history: len(history) == fork.at + 3)
    assert history[-1].type == "FeedbackRequested"  # the parent's verdict is taken over on the opening alone


def test_no_branch_learns_on_a_task_without_items_to_learn_from():
    history = recorded(registered(datasets={"dev": D, "gate": D, "test": D}), started(lever="harness"))
    plain = Fork(2, fold(history), closed=True)
    require_items(plain, [plain.state.settings], Change())
    auto = plain.state.settings.model_copy(update={"lever": "auto"})
    for asked, change in (
        ([auto], Change({"lever": "auto"})),
        ([plain.state.settings], Change(feedback=Feedback(lever="weights", algorithm="grpo"))),
    ):
        with pytest.raises(Unusable, match="only the harness can change"):
            require_items(plain, asked, change)
    with_items = Fork(2, fold(recorded(registered(), started())), closed=True)
    require_items(with_items, [auto], Change())


def test_repeats_have_a_seed_each_and_the_control_comes_first_and_changes_nothing():
    found = planned(RunSettings(seed=3), Change({"lever": "weights"}), repeats=3, control=True)
    assert found[0] == Change()
    assert [each.overrides for each in found[1:]] == [
        {"lever": "weights", "seed": seed} for seed in (3, 10_003, 20_003)
    ]
    assert planned(RunSettings(), Change({"seed": 9}), repeats=1, control=False) == [Change({"seed": 9})]
    with pytest.raises(Unusable, match="seed"):
        planned(RunSettings(), Change({"seed": "x"}), repeats=2, control=False)
