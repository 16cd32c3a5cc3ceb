"""State reuse on a toy: an author that can take one small step from what it is given, under each search alike."""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from given import recorded
from story import accepted, asked, fed_back, feedback_asked, logged, proposed, scored, started
from test_backends_loop import finished, world_ports
from test_loop import LABELS, SERVICES, World, changed
from writing import Answer, Scripted, writing_room, wrote

from sia_events.agents.direct import Direct
from sia_events.feedback_svc.decide import on_feedback
from sia_events.feedback_svc.service import feedback_svc
from sia_events.run_settings import merged
from sia_events.shared.events import (
    AttemptRequested,
    Event,
    ExecutionLogged,
    FeedbackGiven,
    FeedbackRequested,
    HarnessPatched,
    HarnessPatchRequested,
    RunBranched,
    RunFinished,
    Scored,
    VersionAccepted,
)
from sia_events.shared.ports import Chat, Job, Outcome
from sia_events.shared.record import Record, opening
from sia_events.shared.registration import register
from sia_events.shared.replay import replay
from sia_events.shared.run import Run, fold
from sia_events.shared.service import Work
from sia_events.shared.task import find_task
from sia_events.shared.tree import store_tree
from sia_events.target_runner.service import target_runner

FIRST_SKILL, OF = 10, 50
GENERATIONS = 6


class Skilled:
    """The `Sandbox` port with an agent that is right on as many of fifty items as its harness has skill."""

    def __init__(self, world: World) -> None:
        self.truth = world.truth

    async def run(self, job: Job) -> Outcome:
        skill = json.loads((job.reads["/agent"] / "skill.json").read_text())["skill"]
        items = [json.loads(line)["id"] for line in (job.reads["/data"] / "items.jsonl").read_text().splitlines()]
        with (job.work / "answers.jsonl").open("w") as answers:
            for place, item in enumerate(items):
                label = self.truth[item]
                wrong = LABELS[LABELS.index(label) - 1]
                answers.write(json.dumps({"id": item, "answer": label if place % OF < skill else wrong}) + "\n")
        return Outcome("ok", 0, b"", b"", False, 0.0)


class Stepper:
    """Adds one to the skill of the harness it is shown: 2 % of the items, less than the gate can tell from luck."""

    def __init__(self) -> None:
        self.written = 0

    def __call__(self, call: Chat) -> Answer:
        words = "\n".join(str(message["content"]) for message in call.messages)
        self.written += 1
        shown = re.search(r'"skill": (\d+)', words)
        skill = int(shown[1]) + 1 if shown and "Change the harness" in words else FIRST_SKILL
        # No two harnesses are the same files, whatever they start from.
        return wrote({"skill.json": json.dumps({"skill": skill, "name": self.written})}, "one step")


@dataclass(frozen=True)
class Found:
    """A finished search: its records, and how many replies its author gave."""

    records: Sequence[Record]
    written: int

    @property
    def events(self) -> list[Event]:
        return [record.event for record in self.records]

    @property
    def end(self) -> RunFinished:
        event = self.records[-1].event
        assert isinstance(event, RunFinished)
        return event


async def searched(home: Path, search: str) -> Found:
    world, author = World(home), Stepper()
    world.box = Skilled(world)  # type: ignore[assignment]
    room = writing_room(home, Scripted(author), {"direct": Direct()}, sandbox=world.box, like=world_ports(world))
    async with room as ports:
        return Found(
            await finished(world, ports, generations=GENERATIONS, lever="harness", search=search), author.written
        )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Found]:
    return {s: asyncio.run(searched(tmp_path_factory.mktemp(s), s)) for s in ("line", "best-of-k", "archive")}


def test_an_archive_reaches_what_a_line_and_starting_anew_do_not_at_the_same_price(found: Mapping[str, Found]):
    prices = {
        (
            run.written,
            sum(isinstance(event, HarnessPatched) for event in run.events),
            sum(isinstance(event, Scored) and event.split == "dev" for event in run.events),
        )
        for run in found.values()
    }
    assert len(prices) == 1
    for search in ("line", "best-of-k"):
        assert (found[search].end.outcome, found[search].end.best) == ("no proven gain", "g0a")
    archive = found["archive"].end
    assert archive.outcome == "improved" and archive.sealed
    assert archive.sealed.comparison.gain == pytest.approx(GENERATIONS / OF)


@pytest.mark.parametrize("search", ["line", "best-of-k", "archive"])
def test_replay_agrees_with_each_search(found: Mapping[str, Found], search: str):
    again = replay(found[search].records, SERVICES)
    assert (again.divergence, again.pending) == (None, 0)


def test_the_record_tells_which_version_each_candidate_started_from(found: Mapping[str, Found]):
    events = found["archive"].events
    requests = [e for e in events if isinstance(e, HarnessPatchRequested)]
    parents = {e.version: e.parent for e in events if isinstance(e, HarnessPatched)}
    for request in requests:
        dealt = [start.version for start in request.starts for _ in range(start.share)]
        assert [parents[f"g{request.generation}{letter}"] for letter in "ab"] == dealt
    let_through = {e.version for e in events if isinstance(e, VersionAccepted)}
    assert set(parents.values()) - let_through, "what the gate refused is gone on from all the same"


def test_replay_finds_a_start_that_puct_would_not_pick(found: Mapping[str, Found]):
    def otherwise(run: Run, feedback: FeedbackGiven) -> Sequence[Event]:
        return on_feedback(replace(run, expanded=()), feedback)

    again = replay(found["archive"].records, changed(feedback_svc, FeedbackGiven, otherwise)).divergence
    assert again and again.service == "feedback_svc" and isinstance(again.recorded[0], HarnessPatchRequested)
    (decided,) = again.decided
    assert isinstance(decided, HarnessPatchRequested) and decided.starts != again.recorded[0].starts


@pytest.mark.parametrize("search", ["archive", "best-of-k"])
async def test_a_line_can_be_branched_into_another_search_and_replays(tmp_path: Path, search: str):
    world = World(tmp_path)
    await world.start("r1")
    parent = await world.finish("r1")
    second = next(r for r in parent if isinstance(r.event, FeedbackRequested) and r.event.generation == 2)
    position = next(r.position for r in parent if r.id == second.cause)
    overrides = {"search": search, "generations": 3}
    settings = merged(fold(parent).settings, overrides)
    opened = RunBranched(parent="r1", at=position, generation=1, overrides=overrides, settings=settings, code="test")
    await world.bus.append("b1", opening("b1", [opened]))
    history = await world.finish("b1")
    requests = [r.event for r in history if isinstance(r.event, HarnessPatchRequested)]
    assert not requests[0].starts and [bool(e.starts) for e in requests[1:]] == [search == "archive"] * 2
    # By rule, too, several candidates start from versions of different lineages, and no harness is tried twice.
    run = fold(history)
    assert len({v.harness for v in run.versions.values()}) == len(run.versions)
    parents = {v.parent for v in run.of_generation(2)}
    assert parents == ({s.version for s in requests[1].starts} if search == "archive" else {"g0a"})
    found = replay(history, SERVICES)
    assert (found.divergence, found.pending) == (None, 0)


class Reader:
    """The `Sandbox` port with an agent that notes for each item which state it was given, and what lies there."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[str, str]] = {}

    async def run(self, job: Job) -> Outcome:
        data = job.reads["/data"]
        for line in (data / "items.jsonl").read_text().splitlines():
            item = json.loads(line)
            self.seen[item["id"]] = item["state"], (data / item["state"] / "kernel.py").read_text()
        (job.work / "answers.jsonl").write_text("")
        return Outcome("ok", 0, b"", b"", False, 0.0)


async def test_rollouts_of_an_item_all_start_from_what_one_archived_version_wrote(tmp_path: Path):
    world, box = World(tmp_path), Reader()
    world.box = box  # type: ignore[assignment]
    task = await register(find_task("words"), world.blobs, world.private, 8)
    harness = await store_tree(world.blobs, {"target_agent.py": b"pass"})
    past: list[Event] = [task, started(search="archive")]
    for place, version in enumerate(("g0a", "g0b")):
        outputs = await store_tree(world.blobs, {"kernel.py": f"by {version}".encode()})
        past.append(proposed(version).model_copy(update={"harness": harness}))
        past.append(asked(version, "dev"))
        past.append(logged(version, "dev").model_copy(update={"outputs": outputs}))
        past.append(scored(version, "dev", "10"[place:]))
    past += [accepted("g0a"), feedback_asked(1)]
    picked = fed_back(1, "weights")
    (rollouts,) = feedback_svc.decides[FeedbackGiven](fold(recorded(*past, picked)), picked)
    assert isinstance(rollouts, AttemptRequested)
    few = rollouts.model_copy(update={"items": 3, "samples": 2})
    records = recorded(*past, picked, few)
    work = Work(fold(records), records[-1], world.ports(target_runner))
    (event,) = await target_runner.performs[AttemptRequested](work, few)
    assert isinstance(event, ExecutionLogged)
    starts = [start.version for start in rollouts.starts]
    assert sorted(starts) == ["g0a", "g0b"]
    of_items: dict[str, set[tuple[str, str]]] = {}
    for item, state in box.seen.items():
        of_items.setdefault(item.split("#")[0], set()).add(state)
    first, second = ({(f"state/{version}", f"by {version}")} for version in starts)
    assert list(of_items.values()) == [first, second, first] and len(box.seen) == 6
