"""Rollouts of a task without items: whole attempts, one sample each, siblings where they began alike."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from given import given, recorded
from story import (
    D,
    accepted,
    asked,
    failed,
    fed_back,
    feedback_asked,
    logged,
    patched,
    proposed,
    registered,
    scored,
    started,
    trained,
)
from test_rollouts import PROMPT, call, source

from sia_events.evaluator.service import evaluator
from sia_events.feedback_svc.algorithm import Signal, carry_logprobs
from sia_events.feedback_svc.lever import choose_lever
from sia_events.feedback_svc.service import feedback_svc
from sia_events.infra.memory import MemoryBlobs, MemoryBus, SystemTime
from sia_events.infra.sandbox import UnsafeProcess
from sia_events.shared.archive import ranked, visited
from sia_events.shared.calls import journal_key
from sia_events.shared.events import (
    AttemptRequested,
    Estimate,
    Event,
    ExecutionLogged,
    KernelMeasured,
    Learning,
    ProposalFailed,
    RunPaused,
    RunSettings,
    Scored,
    Weights,
    WeightUpdateRequested,
)
from sia_events.shared.ports import Job, Outcome, Ports
from sia_events.shared.registration import register
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.task import find_task, load_task, plain_splits
from sia_events.shared.tree import store_tree
from sia_events.starting import suited
from sia_events.target_runner.service import target_runner
from sia_events.trainer.rollouts import WHOLE, gather

SAMPLES = 3


def opened(**settings: Any) -> tuple[Event, ...]:
    wanted = {"rollout_samples": SAMPLES, "seed": 5, "candidates": 2, **settings}
    task = registered(whole=True, maximize=wanted.pop("maximize", True))
    return (task, started(**wanted), proposed(), on("g0a", "dev", 0.5), accepted("g0a"))


def on(version: str, split: str, value: float, attempt: str | None = None) -> Scored:
    estimate = Estimate(value=value, low=value, high=value, n=1)
    return scored(version, split, "1", attempt=attempt, score=estimate)


def ran(attempt: str) -> ExecutionLogged:
    told = hashlib.sha256(attempt.encode()).hexdigest()
    return logged("g0a", "train").model_copy(update={"attempt": attempt, "trajectory": told})


def pulled(*past: Event, **settings: Any) -> tuple[tuple[Event, ...], list[AttemptRequested]]:
    """A run whose weights lever was just pulled, and the rollouts that this asks for."""
    before = (*opened(**settings), *past, feedback_asked(1), fed_back(1, "weights"))
    requests = given(feedback_svc, *before[:-1]).when(before[-1]).then_types(*[AttemptRequested] * asked_for(settings))
    return before, [each for each in requests if isinstance(each, AttemptRequested)]


def asked_for(settings: dict[str, Any]) -> int:
    return SAMPLES * (2 if settings.get("search") == "archive" else 1)


def settled(rewards: Sequence[float | None], **settings: Any) -> tuple[tuple[Event, ...], list[Event]]:
    """The rollouts, and how each ended, None being a program that broke off."""
    before, requests = pulled(**settings)
    ends: list[Event] = []
    for request, reward in zip(requests, rewards, strict=True):
        broke = failed("g0a", "train").model_copy(update={"attempt": request.attempt})
        ends += [broke] if reward is None else [ran(request.attempt), on("g0a", "train", reward, request.attempt)]
    return (*before, *requests), ends


def learned(rewards: Sequence[float | None], **settings: Any) -> WeightUpdateRequested:
    past, ends = settled(rewards, **settings)
    (update,) = given(feedback_svc, *past, *ends[:-1]).when(ends[-1]).then_types(WeightUpdateRequested)
    assert isinstance(update, WeightUpdateRequested)
    return update


def test_the_weights_lever_asks_for_as_many_attempts_as_samples_that_differ_in_their_seed_alone():
    _, requests = pulled()
    assert [each.attempt for each in requests] == [f"g0a.train.g1.{k}" for k in range(SAMPLES)]
    assert {(each.group, each.split, each.samples, each.items, each.starts) for each in requests} == {
        ("g0a.train.g1", "train", 1, None, ())
    }
    assert len({each.seed for each in requests}) == SAMPLES and all(each.sampled for each in requests)
    assert not asked("g0a", "dev").sampled, "what is scored is not drawn"


def test_in_an_archive_every_state_that_puct_picked_has_a_group_that_starts_from_it():
    states = [patched("g1a"), on("g1a", "dev", 0.7), patched("g1b"), on("g1b", "dev", 0.6)]
    _, requests = pulled(*states, search="archive")
    found = [(each.group, [start.version for start in each.starts]) for each in requests]
    assert found == [*[("g0a.train.g1.0", ["g1a"])] * SAMPLES, *[("g0a.train.g1.1", ["g1b"])] * SAMPLES]
    assert len({each.attempt for each in requests}) == 2 * SAMPLES


def test_siblings_stay_apart_where_they_start_from_a_rollout_that_was_tried_again():
    settings = {"rollout_samples": SAMPLES, "candidates": 1, "search": "archive"}
    past, ends = settled([0.1, 0.2, None], search="line")
    again = asked("g0a", "train", attempt="g0a.train.g1.2~1", tries=1, group="g0a.train.g1")
    best = (again, ran(again.attempt), on("g0a", "train", 0.9, again.attempt))
    before = (past[0], started(**settings), *past[2:], *ends, *best, feedback_asked(2))
    requests = given(feedback_svc, *before).when(fed_back(2, "weights")).decided
    assert [start.state for start in requests[0].starts] == [again.attempt]
    assert len({journal_key(each.attempt) for each in requests}) == SAMPLES
    ends = [on("g0a", "train", 0.5, each.attempt) for each in requests]
    ran_too = [ran(each.attempt) for each in requests]
    story = (*before, fed_back(2, "weights"), *requests, *ran_too, *ends)
    updates = [
        given(feedback_svc, *story[: len(story) - left - 1]).when(story[len(story) - left - 1]).decided
        for left in reversed(range(SAMPLES))
    ]
    assert [len(found) for found in updates] == [0, 0, 1]


def test_no_more_rollouts_are_asked_for_than_one_append_takes():
    settings = {"rollout_samples": 64, "candidates": 26, "search": "archive"}
    states = [each for k in range(26) for each in (patched(f"g1{chr(97 + k)}"), on(f"g1{chr(97 + k)}", "dev", 0.6))]
    before = (*opened(**settings), *states, feedback_asked(1))
    assert len(given(feedback_svc, *before).when(fed_back(1, "weights")).decided) <= 500


def test_what_a_rollout_wrote_is_a_state_that_later_rollouts_start_from_and_no_harness_does():
    settings = {"rollout_samples": SAMPLES, "candidates": 2, "search": "archive"}
    past, ends = settled([0.1, 0.9, 0.6], search="line")
    then = (trained("g1a", "g0a"), on("g1a", "dev", 0.55), accepted("g1a", "g0a"), feedback_asked(2, "g1a"))
    before = (past[0], started(**settings), *past[2:], *ends, *then)
    run = fold(recorded(*before))
    terms = {state.state: (state.reward, state.visits, state.version) for state in ranked(run, rollouts=True)}
    # Of the four children of g0a the best two are kept, and g0a itself.
    best, second = "g0a.train.g1.1", "g0a.train.g1.2"
    assert terms == {best: (0.9, 0, "g0a"), second: (0.6, 0, "g0a"), "g0a": (0.5, 1, "g0a")}
    asked_for = given(feedback_svc, *before).when(fed_back(2, "weights", "g1a")).decided
    starts = [(each.version, [start.state for start in each.starts]) for each in asked_for]
    assert starts == [*[("g1a", [best])] * SAMPLES, *[("g1a", [second])] * SAMPLES]
    again = fold(recorded(*before, fed_back(2, "weights", "g1a"), *asked_for))
    assert visited(again) == {best: 1, second: 1, "g0a": 3}, "and what they descend from was expanded with them"
    assert {state.state for state in ranked(run)} == {"g0a", "g1a"}, "a harness is a version's"


def test_a_version_is_judged_from_the_best_state_there_was_when_it_came():
    settings = {"rollout_samples": SAMPLES, "candidates": 2, "search": "archive"}
    past, ends = settled([0.1, 0.9, 0.6], search="line")
    before = (past[0], started(**settings), *past[2:], *ends)
    came = trained("g1a", "g0a")
    (dev,) = given(target_runner, *before).when(came).then_types(AttemptRequested)
    assert isinstance(dev, AttemptRequested) and not dev.sampled
    assert (dev.attempt, [start.state for start in dev.starts]) == ("g1a.dev", ["g0a.train.g1.1"])
    (gate,) = given(feedback_svc, *before, came, dev).when(on("g1a", "dev", 0.95)).then_types(AttemptRequested)
    assert isinstance(gate, AttemptRequested) and (gate.split, gate.starts) == ("gate", dev.starts)
    (line,) = given(target_runner, past[0], started(), *past[2:], *ends).when(came).decided
    assert line.starts == (), "which is the control that reuses nothing"
    items = registered(whole=False)
    (alone,) = given(target_runner, items, *before[1:]).when(came).decided
    assert alone.starts == (), "and items are problems of their own"


def test_a_start_of_many_attempts_is_one_expansion():
    past, requests = pulled()
    run = fold(recorded(*past, *requests))
    assert visited(run) == {"g0a": 1}
    again = requests[0].model_copy(update={"attempt": "g0a.train.g1.0~1", "tries": 1})
    assert visited(fold(recorded(*past, *requests, again))) == {"g0a": 1}


def test_learning_waits_until_every_attempt_has_its_score_or_failure():
    past, ends = settled([0.25, None, 0.75])
    for position, end in enumerate(ends[:-1]):
        if not isinstance(end, ExecutionLogged):
            given(feedback_svc, *past, *ends[:position]).when(end).then()
    update = learned([0.25, None, 0.75])
    assert [(each.attempt, each.reward, each.group, each.lag) for each in update.whole] == [
        ("g0a.train.g1.0", 0.25, "g0a.train.g1", 0),
        ("g0a.train.g1.2", 0.75, "g0a.train.g1", 0),
    ]
    assert [each.trajectory for each in update.whole] == [ran(each.attempt).trajectory for each in update.whole]
    assert (update.trajectory, update.rewards, update.older) == (None, None, ())


def test_a_failure_may_be_the_last_to_come():
    assert [each.reward for each in learned([0.25, 0.75, None]).whole] == [0.25, 0.75]


def test_attempts_that_all_broke_off_leave_the_generation_barren():
    past, ends = settled([None, None, None])
    (barren,) = given(feedback_svc, *past, *ends[:-1]).when(ends[-1]).then_types(ProposalFailed)
    assert isinstance(barren, ProposalFailed) and "all 3 failed, the last: boom" in barren.reason


def test_what_is_tried_again_is_waited_for():
    past, ends = settled([0.25, 0.5, 0.75])
    ours = failed("g0a", "train", "infrastructure").model_copy(update={"attempt": "g0a.train.g1.2"})
    again = asked("g0a", "train", attempt="g0a.train.g1.2~1", tries=1, group="g0a.train.g1")
    given(feedback_svc, *past, *ends[:-2]).when(ours).then()
    second = [ran(again.attempt), on("g0a", "train", 1.0, again.attempt)]
    (update,) = (
        given(feedback_svc, *past, *ends[:-2], ours, again, second[0]).when(second[1]).then_types(WeightUpdateRequested)
    )
    assert isinstance(update, WeightUpdateRequested)
    assert [(each.attempt, each.reward) for each in update.whole][-1] == ("g0a.train.g1.2~1", 1.0)


@pytest.mark.parametrize(
    ("rewards", "maximize", "least"), [((0.25, 0.5), True, 0.0), ((-0.5, 0.5), True, -0.5), ((3.0, 4.0), False, -4.0)]
)
def test_an_output_that_the_evaluator_refused_is_worth_the_least(
    rewards: tuple[float, ...], maximize: bool, least: float
):
    past, ends = settled([*rewards, 0.0], maximize=maximize)
    refused = failed("g0a", "train", "invalid_output").model_copy(update={"attempt": "g0a.train.g1.2"})
    (update,) = given(feedback_svc, *past, *ends[:-1]).when(refused).then_types(WeightUpdateRequested)
    assert isinstance(update, WeightUpdateRequested)
    sign = 1 if maximize else -1
    assert [each.reward for each in update.whole] == [*(sign * reward for reward in rewards), least]


def test_the_least_is_of_those_that_began_alike():
    states = [patched("g1a"), on("g1a", "dev", 0.3), patched("g1b"), on("g1b", "dev", 0.4)]
    before, requests = pulled(*states, search="archive", maximize=False)
    ends: list[Event] = []
    for request, score in zip(requests, (1.0, 1.2, None, 999.0, 2.0, 3.0), strict=True):
        done = [on("g0a", "train", score, request.attempt)] if score is not None else []
        refused = failed("g0a", "train", "invalid_output").model_copy(update={"attempt": request.attempt})
        ends += [ran(request.attempt), *(done or [refused])]
    story = (*before, *requests, *ends)
    (update,) = given(feedback_svc, *story[:-1]).when(story[-1]).then_types(WeightUpdateRequested)
    assert isinstance(update, WeightUpdateRequested)
    assert [each.reward for each in update.whole] == [-1.0, -1.2, -1.2, -999.0, -2.0, -3.0]


@pytest.mark.parametrize(("kind", "pauses"), [("invalid_output", False), ("crash", False), ("infrastructure", True)])
def test_what_rollouts_bring_on_themselves_holds_no_run(kind: str, pauses: bool):
    before, requests = pulled(pause_after_failures=2, attempt_tries=1)
    broke = [
        failed("g0a", "train", kind).model_copy(update={"attempt": request.attempt, "tries": 0}) for request in requests
    ]
    found = given(feedback_svc, *before, *requests, broke[0]).when(broke[1]).decided
    assert any(isinstance(event, RunPaused) for event in found) == pauses


def test_an_algorithm_that_needs_log_probs_is_not_picked_where_calls_that_name_no_item_have_none():
    silent = call(None, reply={**PROMPT, "choices": [{"token_ids": [1]}]}, kind="chat")
    assert carry_logprobs([silent]) and not carry_logprobs([silent], whole=True)


def test_attempts_of_earlier_weights_are_learned_from_as_far_back_as_is_asked():
    past, ends = settled([0.25, 0.5, 0.75])
    adapter = Weights(model="local/m", adapter="c" * 64)
    then = (trained("g1a", "g0a", weights=adapter), on("g1a", "dev", 0.6), accepted("g1a", "g0a"))
    for most, lags in ((0, [0, 0, 0]), (1, [0, 0, 0, 1, 1, 1])):
        settings = {"rollout_samples": SAMPLES, "candidates": 2, "learning": Learning(max_lag=most)}
        before = (past[0], started(**settings), *past[2:], *ends, *then, feedback_asked(2, "g1a"))
        feedback = fed_back(2, "weights", "g1a")
        requests = given(feedback_svc, *before).when(feedback).then_types(*[AttemptRequested] * SAMPLES)
        second: list[Event] = []
        for request in requests:
            assert isinstance(request, AttemptRequested)
            done = ran(request.attempt).model_copy(update={"version": "g1a"})
            second += [done, on("g1a", "train", 0.9, request.attempt)]
        story = (*before, feedback, *requests, *second)
        (update,) = given(feedback_svc, *story[:-1]).when(story[-1]).then_types(WeightUpdateRequested)
        assert isinstance(update, WeightUpdateRequested)
        assert [each.lag for each in update.whole] == lags


def test_an_agent_that_asks_no_model_anything_has_its_harness_changed():
    silent = logged("g0a", "dev").model_copy(update={"calls": 0})
    story = (*opened(lever="auto")[:3], asked("g0a", "dev"), silent, *opened()[3:], feedback_asked(2))
    records = recorded(*story)
    choice = choose_lever(fold(records), records, Signal())
    assert choice.lever == "harness" and "asks no model anything" in choice.reasons[0]


def test_all_calls_of_a_whole_attempt_share_its_reward_and_were_drawn_at_temperature_one():
    cold = {"request": {"temperature": 0.0, "top_p": 0.5, "bias": None}}
    attempts = [
        source(call(None, **cold), call("i9", n=1, **cold), attempt=f"a{k}", rewards={WHOLE: float(k)}, group="g")
        for k in range(2)
    ]
    found, counts = gather(attempts)
    assert [(each.group, each.item, each.reward, len(each.steps)) for each in found] == [
        ("g", "a0", 0.0, 2),
        ("g", "a1", 1.0, 2),
    ]
    assert not counts and all(step.temperature == 1.0 for each in found for step in each.steps)


FOLDER = {
    "data/public/task.md": "Answer every question.",
    "data/public/questions.csv": "id,text\n" + "".join(f"q{i},what\n" for i in range(40)),
    "data/private/answers.csv": "id,answer\n" + "".join(f"q{i},{i % 2}\n" for i in range(40)),
    "evaluate.py": """\
import csv, json, sys
from pathlib import Path
where = Path(sys.argv[sys.argv.index("--gen-dir") + 1])
given = json.loads((where / "answers.json").read_text())
key = list(csv.DictReader((Path(__file__).parent / "data/private/answers.csv").open()))
rows = [{"id": row["id"], "score": float(given.get(row["id"]) == row["answer"])} for row in key]
(where / "results.json").write_text(json.dumps({"details": rows}))
""",
    "reference/reference_target_agent.py": "pass",
    "reference/requirements.txt": "",
}


def plain_folder(root: Path) -> Path:
    for name, text in FOLDER.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


class Box:
    """The `Sandbox` port that keeps what an attempt found in its data and how it was to be answered."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    async def run(self, job: Job) -> Outcome:
        data = job.reads["/data"]
        self.seen.append({str(file.relative_to(data)) for file in data.rglob("*") if file.is_file()})
        (job.work / "answers.json").write_text("{}")
        return Outcome("ok", 0, b"", b"", False, 1.0)


class Door:
    socket = Path("/nowhere")

    def __init__(self) -> None:
        self.claims: list[dict[str, Any]] = []

    def token(self, claims: Any) -> str:
        self.claims.append(dict(claims))
        return "token"

    async def held_up(self, token: str) -> float:
        return 0.0


async def test_such_an_attempt_is_drawn_and_finds_the_state_it_starts_from(tmp_path: Path):
    blobs, box, door = MemoryBlobs(), Box(), Door()
    task = await register(load_task(plain_folder(tmp_path / "task")), blobs, MemoryBlobs(), 8)
    outputs = await store_tree(blobs, {"answers.json": b'{"q1": "1"}'})
    first = proposed().model_copy(update={"harness": await store_tree(blobs, {"target_agent.py": b"pass"})})
    wrote = logged("g0a", "dev").model_copy(update={"outputs": outputs})
    before = (task, started(search="archive"), first, asked("g0a", "dev"), wrote, on("g0a", "dev", 0.5))
    before += (accepted("g0a"), feedback_asked(1))
    given_ = fed_back(1, "weights")
    rollout = feedback_svc.decides[type(given_)](fold(recorded(*before, given_)), given_)[0]
    assert isinstance(rollout, AttemptRequested)
    records = recorded(*before, given_, rollout)
    ports = Ports(MemoryBus(blobs), blobs, box, SystemTime(), door, tmp_path)
    (event,) = await target_runner.performs[AttemptRequested](Work(fold(records), records[-1], ports), rollout)
    assert isinstance(event, ExecutionLogged) and event.split == "train"
    assert box.seen == [{"task.md", "questions.csv", "state/g0a/answers.json"}]
    assert door.claims[0]["sample"] is True and door.claims[0]["seed"] == rollout.seed


async def test_its_reward_is_the_score_on_what_counts_as_dev(tmp_path: Path):
    blobs, private = MemoryBlobs(), MemoryBlobs()
    folder = load_task(plain_folder(tmp_path / "task"))
    task = await register(folder, blobs, private, 8)
    assert task.whole and "train" in task.datasets and task.sizes == {"dev": 10, "gate": 20, "test": 10}
    right = {f"q{i}": str(i % 2) for i in range(40)}
    known = dict.fromkeys(plain_splits(folder)["dev"][:4])
    answered = msgspec.json.encode({id: right[id] for id in known})
    outputs = await store_tree(blobs, {"answers.json": answered})
    request = asked("g0a", "train", attempt="g0a.train.g1.0", group="g0a.train.g1")
    done = ran(request.attempt).model_copy(update={"outputs": outputs})
    records = recorded(task, started(), proposed(), request, done)
    ports = Ports(MemoryBus(blobs), blobs, UnsafeProcess(), SystemTime(), Door(), tmp_path, private)
    (event,) = await evaluator.performs[ExecutionLogged](Work(fold(records), records[-1], ports), done)
    assert isinstance(event, Scored) and event.split == "train" and event.rewards is None
    assert (event.score.n, event.score.value) == (10, pytest.approx(0.4))


async def test_a_kernel_is_a_rollout_like_any_other():
    blobs = MemoryBlobs()
    task = await register(find_task("trimul"), blobs, MemoryBlobs(), 8)
    assert task.whole and "train" in task.datasets
    request = asked("g0a", "train", attempt="g0a.train.g1.0", group="g0a.train.g1")
    measured = KernelMeasured(
        attempt=request.attempt,
        version="g0a",
        problem="trimul-small",
        correct=True,
        speedup=2.0,
        low=1.9,
        high=2.1,
        flagged=False,
        reason="",
        rounds=(1.9, 2.0, 2.1),
    )
    records = recorded(task, started(), proposed(), request, ran(request.attempt), measured)
    ports = Ports(MemoryBus(blobs), blobs, UnsafeProcess(), SystemTime(), Door(), Path())
    (event,) = await evaluator.performs[KernelMeasured](Work(fold(records), records[-1], ports), measured)
    assert isinstance(event, Scored) and event.split == "train" and event.score.value == pytest.approx(2.0)


async def test_where_nothing_is_held_out_there_are_no_rollouts(tmp_path: Path):
    root = plain_folder(tmp_path / "task")
    (root / "data/private/answers.csv").write_text("id,answer\nq1,1\n")
    task = await register(load_task(root), MemoryBlobs(), MemoryBlobs(), 8)
    assert "train" not in task.datasets


@pytest.mark.parametrize(
    ("model", "lever", "then"),
    [
        ("local/smollm2-135m-instruct", "auto", "auto"),
        ("local/smollm2-135m-instruct", "weights", "weights"),
        ("vllm/qwen", "auto", "auto"),
        ("openai/gpt-5", "auto", "harness"),
        ("local/smollm2-135m-instruct", "harness", "harness"),
    ],
)
def test_a_plain_task_has_both_levers_where_the_weights_are_ours(tmp_path: Path, model: str, lever: str, then: str):
    task = load_task(plain_folder(tmp_path / "task"))
    wanted, notes = suited(task, RunSettings.model_validate({"target_model": model, "lever": lever}))
    assert wanted.lever == then and D
    assert ("whole attempts" in notes[0]) == (then != "harness")
