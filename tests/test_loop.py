"""The whole loop on the in-memory adapters: the same service values as live, with a scripted agent in the box."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from given import altered

from sia_events.evaluator.service import evaluator
from sia_events.feedback_svc.service import feedback_svc
from sia_events.forks import at_generation
from sia_events.infra.memory import MemoryBlobs, MemoryBus, SystemTime
from sia_events.meta_svc.service import meta_svc
from sia_events.run_settings import merged
from sia_events.shared.events import (
    HarnessPatchRequested,
    ProposalFailed,
    RunBranched,
    RunFinished,
    RunSettings,
    RunStarted,
    Scored,
    ServiceFailed,
    VersionAccepted,
)
from sia_events.shared.ports import Job, Outcome, Ports
from sia_events.shared.record import Draft, Record, broken_link, derived_id, opening, place, to_wire
from sia_events.shared.registration import register
from sia_events.shared.replay import replay
from sia_events.shared.run import fold
from sia_events.shared.service import Service, serve
from sia_events.shared.task import answers, find_task
from sia_events.target_runner.service import target_runner

SERVICES = (meta_svc, target_runner, evaluator, feedback_svc)
LABELS = ("animal", "plant", "food", "body", "artifact", "person", "location", "event")
CALIBRATED, PLAIN, NAIVE = 0.9, 0.5, 0.15


class ScriptedSandbox:
    """The `Sandbox` port with an agent that knows the truth and tells it as often as its harness deserves."""

    def __init__(self, truth: Mapping[str, str]) -> None:
        self.truth, self.jobs = truth, 0

    async def run(self, job: Job) -> Outcome:
        self.jobs += 1
        spec = (
            json.loads((job.reads["/agent"] / "harness.json").read_text())
            if (job.reads["/agent"] / "harness.json").exists()
            else {}
        )
        right = CALIBRATED if spec.get("calibrate") else PLAIN if spec.get("answer") == "choose" else NAIVE
        lines = []
        for line in (job.reads["/data"] / "items.jsonl").read_text().splitlines():
            item = json.loads(line)["id"]
            known = int(item.encode().hex(), 16) % 1000 < 1000 * right
            label = self.truth[item.split("#")[0]]
            wrong = LABELS[(LABELS.index(label) + 1) % 8]
            lines.append(json.dumps({"id": item, "answer": label if known else wrong}))
        (job.work / "answers.jsonl").write_text("\n".join(lines))
        return Outcome("ok", 0, b"", b"", False, 0.0)


class NoDoor:
    socket = Path("/nowhere")

    def token(self, claims: Mapping[str, Any]) -> str:
        return "token"

    async def held_up(self, token: str) -> float:
        return 0.0


class World:
    """One bus, two blob stores and the scripted box: what a crash leaves behind is the bus and the blobs."""

    def __init__(self, home: Path) -> None:
        self.blobs, self.private, self.home = MemoryBlobs(), MemoryBlobs(), home
        self.bus = MemoryBus(self.blobs, retry_delay=0.001)
        task = find_task("words")
        self.truth = {
            i: label for split in ("train", "dev", "gate", "test") for i, label in answers(task, split).items()
        }
        self.box = ScriptedSandbox(self.truth)

    async def start(self, run: str, **settings: Any) -> None:
        registered = await register(find_task("words"), self.blobs, self.private, 32)
        wanted = RunSettings(**{"generations": 2, "candidates": 3, "lever": "harness", **settings})
        await self.bus.append(run, opening(run, [registered, RunStarted(settings=wanted, code="test")]))

    def ports(self, service: Service) -> Ports:
        private = self.private if service is evaluator else None
        return Ports(self.bus, self.blobs, self.box, SystemTime(), NoDoor(), self.home, private)

    async def finish(self, run: str, services: Sequence[Service] = SERVICES, behind: int = 0) -> list[Record]:
        """Serve until the run is over or a service gives up, behind position `behind`."""
        async with self.serving(run, services), asyncio.timeout(60):
            while True:
                history = await self.bus.history(run)
                if len(history) > behind and isinstance(history[-1].event, RunFinished | ServiceFailed):
                    return list(history)
                await asyncio.sleep(0)

    @asynccontextmanager
    async def serving(self, run: str, services: Sequence[Service]) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(serve(s, self.bus, self.ports(s), run)) for s in services]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, list[Record]]:
    world = World(tmp_path_factory.mktemp("home"))

    async def whole() -> list[Record]:
        await world.start("r1")
        return await world.finish("r1")

    return world, asyncio.run(whole())


def told(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """What a run amounts to, whatever order its services happened to answer in."""
    facts = ((r.producer, r.type, json.dumps(r.event.model_dump(mode="json"), sort_keys=True)) for r in records)
    return sorted(fact for fact in facts if fact[1] != "ServiceFailed")


def test_a_run_improves_the_agent_and_says_by_how_much(finished: tuple[World, list[Record]]):
    _, records = finished
    end = records[-1].event
    assert isinstance(end, RunFinished) and end.outcome == "improved" and end.sealed
    assert end.sealed.first.value < 0.25 and end.sealed.final.value > 0.8 and end.sealed.comparison.p_value < 1e-6


def test_positions_have_no_gaps_ids_no_doubles_and_the_chain_holds(finished: tuple[World, list[Record]]):
    _, records = finished
    assert [r.position for r in records] == list(range(1, len(records) + 1))
    assert len({r.id for r in records}) == len(records)
    assert broken_link(records) is None


def test_the_test_split_is_scored_once_a_version_and_only_at_the_end(finished: tuple[World, list[Record]]):
    _, records = finished
    scored = [r for r in records if isinstance(r.event, Scored) and r.event.split == "test"]
    assert len(scored) == 2 and len({r.event.version for r in scored}) == 2  # type: ignore[union-attr]
    verdicts = [r.position for r in records if isinstance(r.event, VersionAccepted)]
    assert min(r.position for r in scored) > max(verdicts)


def test_no_right_answer_of_a_scored_split_is_in_any_public_blob(finished: tuple[World, list[Record]]):
    """Where an id of a scored split stands in a blob that agents or feedback may read, no label was put beside it."""
    world, _ = finished
    sealed = {i for split in ("dev", "gate", "test") for i in answers(find_task("words"), split)}
    beside = re.compile(rb'"id": ?"([^"]+)"[^{}]*"label"')
    shown = {i.decode() for body in world.blobs._bodies.values() for i in beside.findall(body)}
    assert shown and not shown & sealed
    assert not any(body in world.blobs._bodies.values() for body in world.private._bodies.values())


def test_replay_agrees_with_the_run_and_starts_nothing(finished: tuple[World, list[Record]]):
    world, records = finished
    jobs = world.box.jobs
    found = replay(records, SERVICES)
    assert found.divergence is None and found.pending == 0
    assert found.records == len(records) and found.decisions > 10 and found.performed > 10
    assert world.box.jobs == jobs


def changed(service: Service, kind: type, decide: Callable[..., Any]) -> tuple[Service, ...]:
    return tuple(replace(s, decides={**s.decides, kind: decide}) if s is service else s for s in SERVICES)


def test_replay_names_the_first_decision_that_is_another_one_now(finished: tuple[World, list[Record]]):
    _, records = finished
    original = feedback_svc.decides[Scored]

    def stricter(run: Any, event: Any) -> Any:
        return [e for e in original(run, event) if not isinstance(e, VersionAccepted) or e.over is None]

    found = replay(records, changed(feedback_svc, Scored, stricter)).divergence
    assert found and found.service == "feedback_svc" and isinstance(found.cause.event, Scored)
    assert isinstance(found.recorded[0], VersionAccepted) and found.decided == ()


def test_replay_finds_a_decision_that_the_log_lacks(finished: tuple[World, list[Record]]):
    _, records = finished

    def chatty(run: Any, event: Any) -> Any:
        return [HarnessPatchRequested(generation=9, parent="g0a", candidates=1, seed=0)]

    services = changed(target_runner, RunFinished, chatty)
    found = replay(records, services).divergence
    assert found and found.reason == "missing from the log" and found.cause is records[-1]


def test_replay_of_an_unfinished_run_counts_what_it_still_owes(finished: tuple[World, list[Record]]):
    _, records = finished
    for cut in range(1, len(records)):
        found = replay(records[:cut], SERVICES)
        assert found.divergence is None, cut
    assert any(replay(records[:cut], SERVICES).pending for cut in range(1, len(records)))


def test_replay_finds_an_altered_record(finished: tuple[World, list[Record]]):
    _, records = finished
    end = records[-1]
    assert isinstance(end.event, RunFinished)
    forged = altered(end, data={**end.event.model_dump(mode="json", exclude={"type"}), "reason": "better than it was"})
    found = replay([*records[:-1], forged], SERVICES).divergence
    assert found and found.reason == "hash chain broken" and found.cause.position == len(records)


def slipped_in(records: Sequence[Record], event: Any, producer: str, cause: Record | None) -> list[Record]:
    """The records and one more, in its place and rightly chained, that nobody had reason to write."""
    last = records[-1]
    odd = Draft(
        event, producer, cause and cause.id, last.correlation, derived_id("r1", cause and cause.id, producer, 7)
    )
    return [*records, place(odd, "r1", last.position + 1, last.chain, last.time)]


@pytest.mark.parametrize("producer", ["mallory", "feedback_svc", "target_runner"])
def test_replay_finds_a_record_that_nothing_gave_rise_to(finished: tuple[World, list[Record]], producer: str):
    _, records = finished
    verdict = next(r for r in records if isinstance(r.event, VersionAccepted))
    for cause in (None, records[-1]):
        found = replay(slipped_in(records, verdict.event, producer, cause), SERVICES).divergence
        assert found and found.recorded == (verdict.event,)


def test_replay_finds_a_second_answer_to_what_was_performed_once(finished: tuple[World, list[Record]]):
    _, records = finished
    logged = next(r for r in records if r.type == "ExecutionLogged")
    cause = next(r for r in records if r.id == logged.cause)
    found = replay(slipped_in(records, logged.event, "target_runner", cause), SERVICES).divergence
    assert found and found.cause.id == cause.id


async def test_a_run_cut_anywhere_goes_on_to_the_same_end(finished: tuple[World, list[Record]], tmp_path: Path):
    """A crash behind any record: what is on the bus and in the blobs is all there is, and it is enough."""
    whole, records = finished
    for cut in range(2, len(records)):
        last, following = records[cut - 1], records[cut]
        if (last.cause, last.producer) == (following.cause, following.producer):
            continue  # inside a batch, which is on the bus whole or not at all
        world = World(tmp_path)
        world.blobs, world.private = whole.blobs, whole.private
        world.bus = MemoryBus(world.blobs, retry_delay=0.001)
        for record in records[:cut]:
            world.bus.inject("r1", record.type, to_wire(record))
        resumed = await world.finish("r1")
        assert told(resumed) == told(records), f"cut behind record {cut}"
        assert resumed[:cut] == records[:cut] and broken_link(resumed) is None


async def test_a_branch_shares_its_parents_past_and_goes_its_own_way(finished: tuple[World, list[Record]]):
    world, records = finished
    fork = at_generation(records, 0)
    position, state = fork.at, fork.state
    settings = merged(state.settings, {"candidates": 1, "generations": 1})
    opened = RunBranched(
        parent="r1", at=position, generation=0, overrides={"candidates": 1}, settings=settings, code="test"
    )
    await world.bus.append("b1", opening("b1", [opened]))
    history = await world.finish("b1")
    assert history[:position] == records[:position]
    assert [r.position for r in history] == list(range(1, len(history) + 1)) and broken_link(history) is None
    assert all(r.run == "b1" for r in history[position:])
    assert not {r.id for r in history[position:]} & {r.id for r in records}
    assert len(fold(history).of_generation(1)) == 1 and fold(history).finished
    found = replay(history, SERVICES)
    assert found.divergence is None and found.pending == 0


async def test_a_branch_of_a_branch_replays_too(finished: tuple[World, list[Record]]):
    world, _ = finished
    parent = "r1"
    for name, changes in (("c1", {"candidates": 2}), ("c2", {"seed": 5})):
        fork = at_generation(await world.bus.history(parent), 1)
        position, state = fork.at, fork.state
        settings = merged(state.settings, changes)
        opened = RunBranched(
            parent=parent, at=position, generation=1, overrides=dict(changes), settings=settings, code="test"
        )
        await world.bus.append(name, opening(name, [opened]))
        history = await world.finish(name)
        assert replay(history, SERVICES).divergence is None
        assert fold(history).settings == settings and fold(history).finished
        parent = name


async def test_a_service_that_keeps_failing_leaves_a_dead_letter_and_mended_it_goes_on(world: World):
    async def broken(work: Any, event: Any) -> Any:
        raise OSError("disk on fire")

    bad = replace(feedback_svc, performs={**feedback_svc.performs, HarnessPatchRequested: broken})
    await world.start("r1")
    history = await world.finish("r1", (meta_svc, target_runner, evaluator, bad))
    failure = history[-1].event
    assert isinstance(failure, ServiceFailed) and "disk on fire" in failure.error and failure.service == "feedback_svc"
    assert await world.blobs.get(failure.payload)
    position = history[-1].position
    whole = await world.finish("r1", behind=position)
    assert whole[:position] == history and replay(whole, SERVICES).divergence is None


async def test_the_wrong_answer_file_is_the_candidates_own_failure(world: World):
    class Liar(ScriptedSandbox):
        async def run(self, job: Job) -> Outcome:
            (job.work / "answers.jsonl").write_text('{"id": "no such item", "answer": "food"}\n')
            return Outcome("ok", 0, b"", b"", False, 0.0)

    world.box = Liar(world.truth)
    await world.start("r1")
    end = (await world.finish("r1"))[-1].event
    assert isinstance(end, RunFinished) and end.outcome == "failed" and "no item" in end.reason


async def test_a_task_that_the_template_does_not_fit_closes_its_generations_without_candidates(world: World):
    task = replace(find_task("words"), labels=(), question="")
    registered = await register(task, world.blobs, world.private, 32)
    started = RunStarted(settings=RunSettings(generations=2, lever="harness"), code="test")
    await world.bus.append("r1", opening("r1", [registered, started]))
    history = await world.finish("r1")
    barren = [r.event for r in history if isinstance(r.event, ProposalFailed)]
    assert [e.generation for e in barren] == [1, 2] and "no template" in barren[0].reason
    assert isinstance(history[-1].event, RunFinished) and history[-1].event.best == "g0a"
