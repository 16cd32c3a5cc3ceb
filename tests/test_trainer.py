"""The trainer's handler: from recorded calls to an adapter that is served, broken off and refused."""

import asyncio
import random
import re
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from given import recorded
from lessons import CHOICES, choice_lines, completion_lines, spec
from story import D, registered, started, trained
from tiny import stirred
from tiny_served import MODEL, make_home, served
from writing import serving

from sia_events.infra.memory import MemoryBlobs, MemoryBus, SystemTime
from sia_events.infra.models import LocalModels
from sia_events.infra.sandbox import UnsafeProcess
from sia_events.local_model import adapter, network, weights
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.budget import Ledger
from sia_events.model_gateway.door import gateway
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.token import TokenDoor
from sia_events.shared.calls import ModelCall, encode_call
from sia_events.shared.events import (
    AgentProposed,
    Budget,
    BudgetChanged,
    BudgetExhausted,
    Event,
    Learning,
    ProposalFailed,
    RolloutSource,
    Weights,
    WeightsUpdated,
    WeightUpdateRequested,
    WholeAttempt,
)
from sia_events.shared.ports import BudgetSpent, Envelope, Models, Ports
from sia_events.shared.record import answers, opening
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.tree import load_tree, read_tree, store_tree
from sia_events.trainer import child, perform
from sia_events.trainer.child import LearningFailed
from sia_events.trainer.perform import learning_key
from sia_events.trainer.service import trainer
from sia_events.trainer.spec import to_json

SECRET = "a secret of the tests"
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home whose embedded model is the tiny one, served."""
    place = tmp_path_factory.mktemp("home")
    make_home(place)
    with served(place, "--socket", str(place / "s")):
        yield place


@dataclass(frozen=True)
class House:
    """A trainer with a real gateway before the real server."""

    ports: Ports
    folder: weights.ModelFolder
    lines: Lines

    async def recorded(self, lines: Lines) -> tuple[str, str]:
        """The digests of their calls and of their rewards."""
        calls = b"\n".join(encode_call(call) for line in lines for call in calls_of(line))
        rewards = msgspec.json.encode({line["item"]: line["reward"] for line in lines})
        return await self.ports.blobs.put(calls), await self.ports.blobs.put(rewards)

    async def learn(
        self, run: str = "r1", lines: Lines | None = None, between: Sequence[Event] = (), **changes: Any
    ) -> Event:
        """Ask the trainer to learn from lines as recorded calls of the first version."""
        trajectory, rewards = await self.recorded(self.lines if lines is None else lines)
        parent = AgentProposed(
            version="g0a", candidate=0, harness=D, weights=changes.pop("weights", Weights(model=MODEL)), reason="first"
        )
        learning = {"lr": 2e-2, "rank": 4, "batch_prompts": 12, **changes.pop("learning", {})}
        asked = WeightUpdateRequested(
            **{
                "generation": 1,
                "parent": "g0a",
                "algorithm": "reinforce",
                "trajectory": trajectory,
                "rewards": rewards,
                "epochs": 1,
                "seed": 0,
                "learning": Learning(**learning),
                **changes,
            }
        )
        records = recorded(registered(), started(), parent, *between, asked)
        state = replace(fold(records), name=run)
        (told,) = await trainer.performs[WeightUpdateRequested](Work(state, records[-1], self.ports), asked)
        return told

    def left(self, run: str) -> list[str]:
        return sorted(path.name for path in (self.ports.home / "learning").glob(f"{run}.*/*"))


def calls_of(line: dict[str, Any]) -> Iterator[ModelCall]:
    for n, step in enumerate(line["steps"]):
        choice = step["kind"] == "choice"
        if choice:
            reply = {"index": step["index"], "logprobs": step["logprobs"], "choice_token_ids": step["choice_ids"]}
        else:
            told = {"content": [{"logprob": value} for value in step["logprobs"]]}
            reply = {"choices": [{"token_ids": step["completion_ids"], "logprobs": told}]}
        yield ModelCall(
            call="c",
            attempt="g0a.train.g1",
            version="g0a",
            kind="choice" if choice else "chat",
            model=MODEL,
            adapter=line.get("adapter"),
            item=line["item"],
            digest="d" * 64,
            n=n,
            seed=0,
            request={"bias": step["bias"]} if choice else {},
            reply={**reply, "prompt_token_ids": step["prompt_ids"]},
            completion_tokens=1,
        )


@asynccontextmanager
async def housed(home: Path, scratch: Path, blobs: MemoryBlobs, models: Models) -> AsyncIterator[House]:
    """The house whose gateway asks `models`."""
    async with AsyncExitStack() as stack:
        bus, door = MemoryBus(), TokenDoor(scratch / "g", SECRET)
        for run in ("r1", "r2"):
            await bus.append(run, opening(run, [started()]))
        journal = Journal(bus)
        stack.push_async_callback(journal.close)
        calls = Calls(journal, lambda model: models, SystemTime(), Ledger(bus, SystemTime(), lambda *_: 0.0), 20.0)
        await stack.enter_async_context(serving(gateway(calls, SECRET, SystemTime()), door.socket))
        folder = weights.opened(home / "models" / weights.MODEL)
        ports = Ports(bus, blobs, UnsafeProcess(), SystemTime(), door, home, threads=1)
        yield House(ports, folder, choice_lines(folder.path, count=24))


@pytest.fixture
async def house(home: Path, tmp_path: Path) -> AsyncIterator[House]:
    blobs = MemoryBlobs()
    models = LocalModels(blobs, tmp_path / "adapters", home / "s")
    async with housed(home, tmp_path, blobs, models) as found:
        yield found
    await models.aclose()


@pytest.mark.slow  # three learners
async def test_the_minutes_of_a_run_end_its_learner_too_and_with_more_of_them_it_ends_as_if_they_had_not(house: House):
    bus = house.ports.bus
    await bus.append("short", opening("short", [started(budget=Budget(minutes=1e-6))]))
    await bus.append("long", opening("long", [started(budget=Budget(minutes=60))]))
    with pytest.raises(BudgetSpent, match="1e-06 minutes"):
        await house.learn("short")
    *_, last = await bus.history("short")
    assert isinstance(last.event, BudgetExhausted) and last.event.limit == "minutes"
    assert "rollouts.jsonl" in house.left("short") and "adapter" not in house.left("short")
    await bus.append("short", answers("short", last, "cli", [BudgetChanged(budget=Budget(minutes=60))]))
    first, second = await house.learn("short"), await house.learn("long")
    assert isinstance(first, WeightsUpdated) and isinstance(second, WeightsUpdated)
    assert first.weights == second.weights


@pytest.mark.slow  # three learners
async def test_minutes_that_end_a_learner_behind_a_step_cost_none_that_was_kept(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, bus, limit = await house.learn("r2", epochs=2), house.ports.bus, asyncio.timeout(None)
    await bus.append("short", opening("short", [started(budget=Budget(minutes=1e-6))]))

    trace = bus.trace

    async def told_until_the_third_step(envelope: Envelope) -> None:
        await trace(envelope)
        if msgspec.json.decode(envelope.lines[0]).get("step") == 3:
            limit.reschedule(0)

    with monkeypatch.context() as patched:
        patched.setattr(bus, "trace", told_until_the_third_step)
        patched.setattr(perform, "asyncio", SimpleNamespace(**{**vars(asyncio), "timeout": lambda _: limit}))
        with pytest.raises(BudgetSpent, match="1e-06 minutes"):
            await house.learn("short", epochs=2)
    assert "checkpoint.safetensors" in house.left("short")
    *_, last = await bus.history("short")
    await bus.append("short", answers("short", last, "cli", [BudgetChanged(budget=Budget(minutes=60))]))
    told = await house.learn("short", epochs=2)
    assert isinstance(told, WeightsUpdated) and isinstance(whole, WeightsUpdated)
    assert told.weights == whole.weights
    steps = [msgspec.json.decode(one.lines[0])["step"] for one in await bus.traces("short", "training", "g1")]
    assert steps == sorted(steps) and set(steps) == {1, 2, 3, 4}, "none that was kept is taken again"


async def test_what_was_learned_is_stored_proved_and_described(house: House) -> None:
    told = await replace(house, ports=replace(house.ports, trainer_usd_per_hour=36.0)).learn()
    assert isinstance(told, WeightsUpdated) and told.weights.adapter and told.manifest and told.probe
    assert told.usd == pytest.approx(told.seconds / 100, abs=1e-6) and told.metrics["cpu_seconds"] > 0
    files = await load_tree(house.ports.blobs, told.weights.adapter)
    assert set(files) == {adapter.CONFIG, adapter.WEIGHTS}
    assert told.probe.apart < 1e-3 < told.probe.moved
    assert (told.rollouts, told.counts["samples"], told.metrics["steps"]) == (192, told.rollouts - 8 * equal(told), 2)
    about = msgspec.json.decode(await house.ports.blobs.get(told.manifest))
    assert (about["adapter"], about["base"]["sha256"]) == (told.weights.adapter, house.folder.digest)
    assert (told.backend, about["backend"]) == ("ours", "ours")
    steps = await house.ports.bus.traces("r1", "training", "g1")
    assert [msgspec.json.decode(one.lines[0])["step"] for one in steps] == [1, 2, 2]


def equal(told: WeightsUpdated) -> int:
    return told.counts.get("equal_rewards", 0)


async def test_the_same_request_again_has_the_same_answer_and_leaves_nothing_else(house: House) -> None:
    first = await house.learn(seed=7)
    assert await house.learn(seed=7) == first and isinstance(first, WeightsUpdated)
    assert first.usd is None, "a machine without a price is one's own"
    assert house.left("r1") == ["updated.json"]


# As the release before `targets`, `recompute` and `whole` recorded it.
EARLIER = (
    '{{"type":"WeightUpdateRequested","generation":1,"parent":"g0a","algorithm":"grpo","trajectory":"{a}","rewards":"{b}",'
    '"epochs":2,"seed":7,"learning":{{"lr":0.0005,"rank":16,"scale":2.0,"batch_prompts":24,"updates":1,"clip":1.0,'
    '"kl":0.0,"kl_stop":null,"entropy":0.0,"reduction":"sample","credit":"terminal","discount":1.0,"trace":0.95,'
    '"best_of":1,"margin":0.0,"beta":0.1,"leave_one_out":false,"max_lag":1,"max_ratio":5.0,"dtype":"auto",'
    '"backend":"ours","hold_out":0.0,"look_every":4,"patience":2}},"older":[{{"attempt":"g0a.train.g0","version":"g0a",'
    '"trajectory":"{a}","rewards":"{b}","lag":1}}]}}'
)


def test_learning_that_an_earlier_release_began_lies_where_it_is_looked_for() -> None:
    asked = WeightUpdateRequested.model_validate_json(EARLIER.format(a="a" * 64, b="b" * 64))
    assert learning_key("r1", asked) == "r1.g1.64a6978f5444"
    other = asked.learning.model_copy(update={"recompute": True})
    assert learning_key("r1", asked.model_copy(update={"learning": other})) != learning_key("r1", asked)


async def test_a_killed_learner_costs_a_step_and_changes_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = await house.learn("r2", epochs=2)
    monkeypatch.setenv("SIA_FAIL_AT", "learner behind keeping step 2")
    with pytest.raises(LearningFailed, match="killed by signal 9"):
        await house.learn("r1", epochs=2)
    assert "checkpoint.safetensors" in house.left("r1")
    monkeypatch.delenv("SIA_FAIL_AT")
    told = await house.learn("r1", epochs=2)
    assert isinstance(told, WeightsUpdated) and isinstance(whole, WeightsUpdated)
    assert told.weights == whole.weights
    steps = await house.ports.bus.traces("r1", "training", "g1")
    assert [msgspec.json.decode(one.lines[0])["step"] for one in steps] == [1, 2, 3, 4, 4]


@pytest.fixture
def each_killed_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What dies of SIGKILL looks as if the kernel had ended it: each look at its counter finds one more."""
    looks = count()
    monkeypatch.setattr(child, "killed_for_memory", lambda: next(looks))


@pytest.mark.usefixtures("each_killed_by_the_kernel")
async def test_what_the_kernel_ended_for_want_of_memory_goes_on_with_half_as_much_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIA_FAIL_AT", "learner behind keeping step 2")
    told = await house.learn("halved", epochs=2)
    assert isinstance(told, WeightsUpdated)
    steps = await house.ports.bus.traces("halved", "training", "g1")
    assert [msgspec.json.decode(one.lines[0])["step"] for one in steps] == [1, 2, 3, 4, 4]
    # Over the steps of both processes, as the checkpoint of the first tells.
    last = msgspec.json.decode(steps[-1].lines[0])
    assert 0 < last["earlier_seconds"] < told.metrics["seconds"] <= told.seconds
    assert "earlier_seconds" not in told.metrics


@pytest.mark.usefixtures("each_killed_by_the_kernel")
async def test_what_the_kernel_ended_with_half_as_much_too_says_what_to_do(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {started}\nkill -9 $$\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    told = await house.learn("killed")
    assert isinstance(told, ProposalFailed)
    assert "The kernel ended learning for want of memory, also with half as much at once" in told.reason
    assert "--set learning.recompute=true" in told.reason
    assert ["--halved" in line for line in started.read_text().splitlines()] == [False, True]


def test_the_kernel_tells_how_many_it_ended_for_want_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "VMSTAT", told := tmp_path / "vmstat")
    assert child.killed_for_memory() == 0
    told.write_text("nr_free_pages 12\noom_kill 3\n")
    assert child.killed_for_memory() == 3


# A Python whose learner's weights leave the finite numbers in the second step.
EXPLODING = """#!{python}
import sys
import torch
from sia_events.trainer.learn import main
take = torch.optim.AdamW.step
def far(self, *arguments, **more):
    take(self, *arguments, **more)
    self.param_groups[0]["params"][-1].data.fill_(float("nan"))
torch.optim.AdamW.step = far
sys.argv = sys.argv[2:]
main()
"""


@pytest.mark.parametrize(("epochs", "where"), [(2, "the loss of step 2 is nan"), (1, "factors behind step 1")])
async def test_learning_that_leaves_the_finite_numbers_ends_and_says_what_to_do(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, epochs: int, where: str
) -> None:
    python = tmp_path / "python"
    python.write_text(EXPLODING.format(python=sys.executable))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    told = await house.learn("exploded", epochs=epochs, lines=house.lines[:16])
    assert isinstance(told, ProposalFailed) and where in told.reason, told
    assert "sia branch exploded --at 0 --set learning.lr=" in told.reason
    assert "checkpoint.safetensors" not in house.left("exploded")


# A Python whose learner has, from its first step on, next to no more memory than it holds by then. What a small update
# warmed up is held already; large blocks go back to the kernel when they are freed (M_MMAP_THRESHOLD), and all threads
# share a heap (M_ARENA_MAX): so there is no room that only some allocations of some runs find.
SMALL = """#!{python}
import ctypes, resource, sys
from pathlib import Path
libc = ctypes.CDLL(None)
libc.mallopt(-8, 1)
libc.mallopt(-3, 65536)
from sia_events.trainer.learn import learn, main
from sia_events.trainer.learner import Learner
from sia_events.trainer.spec import from_json
list(learn(from_json(Path({small!r}).read_bytes())))
gradients = Learner.gradients
def narrow(*arguments, **more):
    libc.malloc_trim(0)
    held = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
    most = int(held.split()[1]) * 1024 + 2 * 2**20
    Learner.gradients = gradients
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return gradients(*arguments, **more)
Learner.gradients = narrow
sys.argv = sys.argv[2:]
main()
"""


def long_attempts() -> Lines:
    """Two attempts at an item, of 24 calls each, whose prompts fill most of the context."""
    draw = random.Random(0)
    lines = []
    for at in range(2):
        prompts = [[draw.randrange(10, 39) for _ in range(480)] for _ in range(24)]
        told = {"kind": "choice", "choice_ids": CHOICES, "index": at, "logprobs": [-1.1, -1.1, -1.1], "bias": None}
        steps = [{"prompt_ids": prompt, **told} for prompt in prompts]
        lines.append({"group": "a", "item": f"a#{at}", "reward": float(at), "steps": steps})
    return lines


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on memory that holds")
async def test_what_does_not_fit_into_memory_is_not_tried_again_and_says_what_to_do(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = spec(house.folder.path, tmp_path / "small", house.lines[:16], epochs=1)
    (tmp_path / "small.json").write_bytes(to_json(small))
    python = tmp_path / "python"
    python.write_text(SMALL.format(python=sys.executable, small=str(tmp_path / "small.json")))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    told = await house.learn(lines=long_attempts())
    assert isinstance(told, ProposalFailed)
    assert "reinforce was broken off: Out of memory, also with 1 prompts at once" in told.reason
    assert "sia branch r1 --at 0 --set learning.recompute=true" in told.reason
    assert "spec.json" not in house.left("r1")


# A Python whose learner has the memory for so many steps, and not for the next.
FILLING = """#!{python}
import sys
from sia_events.trainer.engines import OutOfMemory
from sia_events.trainer.learn import main
from sia_events.trainer.learner import Learner
gradients, left = Learner.gradients, [{steps}]
def narrow(*arguments, **more):
    if not left[0]:
        raise OutOfMemory("also with half of it")
    left[0] -= 1
    return gradients(*arguments, **more)
Learner.gradients = narrow
sys.argv = sys.argv[2:]
main()
"""


@pytest.mark.slow  # three learners, with tries that are waited for
async def test_memory_that_was_enough_for_a_step_is_waited_for_behind_what_was_kept(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await house.learn("r2", epochs=2, seed=11)
    python = tmp_path / "python"
    python.write_text(FILLING.format(python=sys.executable, steps=2))
    python.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(python))
        with pytest.raises(LearningFailed, match=r"Out of memory, .* It goes on behind step 2 or the one before"):
            await house.learn("r1", epochs=2, seed=11)
    assert "checkpoint.safetensors" in house.left("r1")
    told = await house.learn("r1", epochs=2, seed=11)
    assert isinstance(told, WeightsUpdated) and isinstance(whole, WeightsUpdated)
    assert told.weights == whole.weights
    steps = await house.ports.bus.traces("r1", "training", "g1")
    assert [msgspec.json.decode(one.lines[0])["step"] for one in steps] == [1, 2, 3, 4, 4]


async def test_what_was_seen_of_held_out_items_is_on_record(house: House) -> None:
    told = await house.learn(learning={"hold_out": 0.3, "look_every": 1})
    assert isinstance(told, WeightsUpdated) and told.counts["held_out"] > 2
    assert told.metrics["held_out_best"] > told.metrics["held_out_start"]
    assert told.metrics["held_out_best_step"] in (1, 2)


async def test_a_call_longer_than_the_models_context_is_left_out_and_counted(house: House) -> None:
    lines = [*house.lines]
    lines[3] = lines[3] | {"steps": [step | {"prompt_ids": [1] * 511} for step in lines[3]["steps"]]}
    told = await house.learn(lines=lines)
    assert isinstance(told, WeightsUpdated)
    assert (told.counts["too_long"], told.counts["no_calls"], told.rollouts) == (1, 1, len(lines) - 1)


@pytest.mark.slow  # a learner that imports TRL, and a server
async def test_text_is_learned_by_trl_into_an_adapter_like_any_other_that_is_served_and_proved(house: House) -> None:
    pytest.importorskip("trl", reason="the extra trl is not installed")
    told = await house.learn(
        algorithm="grpo", lines=completion_lines(house.folder.path, count=24), learning={"backend": "trl"}
    )
    assert isinstance(told, WeightsUpdated) and told.weights.adapter and told.manifest and told.probe
    assert set(await load_tree(house.ports.blobs, told.weights.adapter)) == {adapter.CONFIG, adapter.WEIGHTS}
    assert told.probe.apart < 1e-3 < told.probe.moved
    about = msgspec.json.decode(await house.ports.blobs.get(told.manifest))
    assert told.backend == about["backend"] == f"trl {version('trl')}"


async def test_choices_are_learned_by_ours_where_trl_was_asked_for_and_the_update_says_why(house: House) -> None:
    told = await house.learn(algorithm="grpo", learning={"backend": "trl"})
    assert isinstance(told, WeightsUpdated) and told.manifest
    assert told.backend == "ours: TRL learns text, and some answers were chosen among given ones"
    assert msgspec.json.decode(await house.ports.blobs.get(told.manifest))["backend"] == told.backend


async def test_learning_goes_on_from_the_parents_adapter(house: House) -> None:
    first = await house.learn()
    assert isinstance(first, WeightsUpdated)
    lines = [line | {"adapter": first.weights.adapter} for line in house.lines]
    told = await house.learn(lines=lines, weights=first.weights, generation=2)
    assert isinstance(told, WeightsUpdated) and told.weights != first.weights


@pytest.mark.parametrize(("max_lag", "samples"), [(0, 96), (1, 192)])
async def test_older_rollouts_are_learned_from_as_far_back_as_is_asked(
    house: House, tmp_path: Path, max_lag: int, samples: int
) -> None:
    net = network.load(house.folder.path)
    start = stirred(net, seed=4)
    adapter.write(start, tmp_path / "start", house.folder.model, house.folder.digest)
    learned = Weights(model=MODEL, adapter=await store_tree(house.ports.blobs, read_tree(tmp_path / "start")))
    own = choice_lines(house.folder.path, start, count=12)
    trajectory, rewards = await house.recorded(house.lines[:96])
    told = await house.learn(
        lines=[line | {"adapter": learned.adapter} for line in own],
        between=[trained("g1a", "g0a", weights=learned)],
        parent="g1a",
        generation=2,
        learning={"max_lag": max_lag},
        older=(RolloutSource(attempt="g0a.train.g1", version="g0a", trajectory=trajectory, rewards=rewards, lag=1),),
    )
    assert isinstance(told, WeightsUpdated)
    assert (told.rollouts, told.counts.get("stale", 0)) == (samples, 192 - samples)


async def test_whole_attempts_are_learned_from_though_no_call_names_an_item(house: House) -> None:
    tries = [{**line, "item": None} for line in house.lines]
    whole = []
    for k, line in enumerate(tries):
        trajectory = await house.ports.blobs.put(b"\n".join(encode_call(call) for call in calls_of(line)))
        attempt = f"g0a.train.g1.{k}"
        group, reward = f"g0a.train.g1.{line['group']}", line["reward"]
        whole.append(WholeAttempt(attempt=attempt, version="g0a", group=group, trajectory=trajectory, reward=reward))
    told = await house.learn(trajectory=None, rewards=None, whole=tuple(whole))
    assert isinstance(told, WeightsUpdated) and told.probe and told.probe.moved > 0
    # Each was drawn, and is compared with its siblings: the same is learned as from items.
    by_items = await house.learn(run="r2")
    assert isinstance(by_items, WeightsUpdated)
    assert (told.rollouts, told.counts, told.metrics["loss"]) == (
        by_items.rollouts,
        by_items.counts,
        by_items.metrics["loss"],
    )
    assert told.manifest
    described = msgspec.json.decode(await house.ports.blobs.get(told.manifest))
    assert described["data"]["rewards"] == [each.reward for each in whole]


async def test_whole_attempts_that_asked_no_model_anything_teach_nothing(house: House) -> None:
    empty = await house.ports.blobs.put(b"")
    whole = [
        WholeAttempt(attempt=f"a{k}", version="g0a", group="a", trajectory=empty, reward=float(k)) for k in range(2)
    ]
    told = await house.learn(trajectory=None, rewards=None, whole=tuple(whole))
    assert isinstance(told, ProposalFailed)
    assert "none of the 2 attempts asked the model anything" in told.reason


async def test_calls_that_other_weights_answered_are_not_learned_from(house: House) -> None:
    told = await house.learn(lines=[line | {"adapter": "b" * 64} for line in house.lines])
    assert isinstance(told, ProposalFailed) and "other weights: 192" in told.reason


async def test_an_adapter_of_another_base_is_refused_before_anything_is_learned(house: House, tmp_path: Path) -> None:
    net = network.load(house.folder.path)
    adapter.write(stirred(net, seed=1), tmp_path / "other", "another model", house.folder.digest)
    other = Weights(model=MODEL, adapter=await store_tree(house.ports.blobs, read_tree(tmp_path / "other")))
    lines = [{**line, "adapter": other.adapter} for line in house.lines]
    told = await house.learn("r3", lines=lines, weights=other)
    assert isinstance(told, ProposalFailed) and "belongs to 'another model'" in told.reason
    assert "g0a stays as it is" in told.reason and "sia branch r3 --at 0" in told.reason
    assert house.left("r3") == []


def alike(lines: Lines) -> Lines:
    return [line | {"reward": 1.0} for line in lines]


def unsaid(lines: Lines) -> Lines:
    return [line | {"steps": [step | {"logprobs": None} for step in line["steps"]]} for line in lines]


def endless(lines: Lines) -> Lines:
    return [line | {"reward": float("inf")} for line in lines]


def immense(lines: Lines) -> Lines:
    return [line | {"reward": 1e101 * (at % 2)} for at, line in enumerate(lines)]


def alone(lines: Lines) -> Lines:
    return lines[::8]


@pytest.mark.parametrize(
    ("change", "asked", "says"),
    [
        (alike, {}, "none can be told from its siblings by its reward .*equal rewards: 24"),
        (alone, {}, "single sample: 24"),
        (endless, {}, "is not a finite number: .*Nothing was trained, g0a stays"),
        (immense, {}, r"#1 in g0a is 1e\+101: only finite ones of at most 1e\+100 .*Mend the task's evaluator"),
        (unsaid, {}, "192 calls have none.*Algorithms that do without, .*: cloning, dpo"),
        (unsaid, {"algorithm": "dpo", "learning": {"hold_out": 0.1}}, "learning.hold_out needs the log-probs"),
        (list, {"algorithm": "sarsa"}, "sarsa is no algorithm; there are reinforce"),
        (list, {"weights": Weights(model="openai/gpt")}, "openai/gpt is not ours to train"),
        (list, {"learning": {"targets": ("attention",)}}, "No layer's name ends in attention; .* has down_proj"),
        (lambda lines: [], {}, "none of the parent's model calls names its item"),
    ],
    ids=[
        "alike",
        "alone",
        "endless",
        "immense",
        "unsaid",
        "unsaid and held out",
        "sarsa",
        "hosted",
        "targets",
        "nothing",
    ],
)
async def test_what_cannot_be_learned_from_ends_in_a_reason(
    house: House, change: Any, asked: dict[str, Any], says: str
) -> None:
    told = await house.learn(lines=change(house.lines), **asked)
    assert isinstance(told, ProposalFailed) and told.lever == "weights"
    assert re.search(says, told.reason), told.reason


async def test_rollouts_without_log_probs_can_be_cloned(house: House) -> None:
    told = await house.learn(lines=unsaid(house.lines), algorithm="cloning")
    assert isinstance(told, WeightsUpdated) and told.algorithm == "cloning"
