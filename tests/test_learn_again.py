"""Learning that is broken off: killed, out of memory, out of room; and that it goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import choice_lines, completion_lines, spec
from small_disk import fill, small_disk
from tiny import make_model

from sia_events.local_model import adapter
from sia_events.local_model.weights import ModelFolder
from sia_events.trainer.checkpoints import SavingFailed, load_checkpoint, save_checkpoint
from sia_events.trainer.engines import Engine, OutOfMemory, Scored, out_of_memory
from sia_events.trainer.groups import Scene
from sia_events.trainer.learn import learn
from sia_events.trainer.opening import opened
from sia_events.trainer.spec import Spec, to_json


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def kept(tiny: Path, folder: Path, lines: list[dict[str, Any]], **options: Any) -> Spec:
    """A spec with a checkpoint."""
    options = {"epochs": 1, "batch_prompts": 6} | options
    return spec(tiny, folder, lines, checkpoint=str(folder / "checkpoint"), **options)


def written(folder: Path) -> list[bytes]:
    return [(folder / "adapter" / name).read_bytes() for name in (adapter.CONFIG, adapter.WEIGHTS)]


@pytest.mark.parametrize(("point", "threads"), [("before", 1), ("behind", 2)])
def test_a_killed_learner_goes_on_to_the_same_bytes(tiny: Path, tmp_path: Path, point: str, threads: int) -> None:
    lines = choice_lines(tiny, count=36)
    list(learn(kept(tiny, tmp_path / "whole", lines, threads=threads)))
    settings = kept(tiny, tmp_path / "killed", lines, threads=threads)
    (tmp_path / "killed" / "spec.json").write_bytes(to_json(settings))
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    died = subprocess.run(
        [sys.executable, "-m", "sia_events.trainer.learn", str(tmp_path / "killed" / "spec.json")],
        env=env | {"SIA_FAIL_AT": f"learner {point} keeping step 3"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert died.returncode == -signal.SIGKILL
    *steps, last = learn(settings)
    assert [step["step"] for step in steps] == list(range(3 if point == "before" else 4, last["steps"] + 1))
    assert written(tmp_path / "killed") == written(tmp_path / "whole")


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "ppo", "updates": 3, "kl": 0.05},
        {"algorithm": "rloo", "updates": 2, "kl": 0.05},
        {"algorithm": "dpo"},
        {"algorithm": "cloning"},
        {"algorithm": "entropic", "kl_stop": 0.02},
        {"algorithm": "grpo", "hold_out": 0.3, "look_every": 1},
        {"algorithm": "grpo", "hold_out": 0.3, "look_every": 1, "patience": 1, "lr": 0.3, "batch_prompts": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 2])
def test_learning_that_is_broken_off_anywhere_ends_as_if_it_had_not_been(
    tiny: Path, tmp_path: Path, options: dict[str, Any], steps: int
) -> None:
    lines = completion_lines(tiny, count=18)
    *_, whole = learn(kept(tiny, tmp_path / "whole", lines, **options))
    settings = kept(tiny, tmp_path / "broken", lines, **options)
    while True:
        begun = learn(settings)
        if any(line.get("done") for line, _ in zip(begun, range(steps + 1), strict=False)):
            break
        begun.close()
    *_, last = learn(settings)
    assert written(tmp_path / "broken") == written(tmp_path / "whole")
    same = whole.keys() - {"adapter", "seconds", "cpu_seconds", "earlier_seconds"}
    assert {name: last[name] for name in same} == {name: whole[name] for name in same}


def test_a_checkpoint_of_another_update_is_not_gone_on_from(tiny: Path, tmp_path: Path) -> None:
    lines = choice_lines(tiny, count=12)
    list(learn(kept(tiny, tmp_path, lines)))
    other = kept(tiny, tmp_path, lines, lr=1e-3)
    assert load_checkpoint(tmp_path / "checkpoint", other.identity) is None
    first = next(iter(learn(other)))
    assert first["step"] == 1


def test_a_checkpoint_that_tells_of_scenes_alone_is_gone_on_from(tiny: Path, tmp_path: Path) -> None:
    """As those of earlier releases do."""
    lines = choice_lines(tiny, count=18)
    list(learn(kept(tiny, tmp_path / "whole", lines, updates=2)))
    settings = kept(tiny, tmp_path / "broken", lines, updates=2)
    begun = learn(settings)
    for _ in range(4):
        next(begun)
    begun.close()
    place = tmp_path / "broken" / "checkpoint"
    found = load_checkpoint(place, settings.identity)
    assert found is not None and found.step == 3 and found.state["prepared"]
    state = {name: value for name, value in found.state.items() if name != "room"}
    del state["prepared"]["spread"]
    save_checkpoint(place, replace(found, state=state | {"scenes": found.state["room"]["scenes"]}))
    first, *_ = learn(settings)
    assert first["step"] == 4 and written(tmp_path / "broken") == written(tmp_path / "whole")


def test_what_is_no_checkpoint_is_said_to_be_none(tiny: Path, tmp_path: Path) -> None:
    settings = kept(tiny, tmp_path, choice_lines(tiny, count=12))
    (tmp_path / "checkpoint").write_bytes(b"nothing of the kind")
    with pytest.raises(SavingFailed, match="Remove it to learn from the start"):
        list(learn(settings))


def test_a_full_disk_costs_no_more_than_the_last_step(tiny: Path, tmp_path: Path) -> None:
    lines = choice_lines(tiny, count=36)
    list(learn(kept(tiny, tmp_path / "whole", lines)))
    (tmp_path / "small").mkdir()
    with small_disk(tmp_path / "small", megabytes=4) as disk:
        settings = kept(tiny, disk / "learning", lines)
        learning = learn(settings)
        steps = [next(learning), next(learning)]
        filler = fill(disk)
        with pytest.raises(SavingFailed, match=r"step 2 .*No space left on device; the one of step 1 is kept"):
            list(learning)
        filler.unlink()
        steps += list(learn(settings))
        assert [step["step"] for step in steps[:3]] == [1, 2, 2]
        assert written(disk / "learning") == written(tmp_path / "whole")


class Narrow:
    """An engine that runs out of memory over more than so many scenes."""

    def __init__(self, engine: Engine, room: int) -> None:
        self._engine, self._room = engine, room
        self.adapter, self.width, self.device = engine.adapter, engine.width, engine.device
        self.at_once, self.cost = engine.at_once, engine.cost

    def score(
        self, scenes: Sequence[Scene], adapted: bool = True, entropy: bool = False, hidden: bool = False
    ) -> list[list[Scored]]:
        if len(scenes) > self._room:
            raise torch.OutOfMemoryError("the engine is too small")
        return self._engine.score(scenes, adapted, entropy, hidden)

    def served(self, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        return self._engine.served(prompt, completion)


def narrow(room: int):
    def opener(settings: Spec) -> tuple[Engine, ModelFolder]:
        engine, folder = opened(settings)
        return Narrow(engine, room), folder

    return opener


def test_out_of_memory_halves_what_is_learned_from_at_once(tiny: Path, tmp_path: Path) -> None:
    lines = choice_lines(tiny, count=12)
    list(learn(kept(tiny, tmp_path / "half", lines, micro_prompts=2)))
    list(learn(kept(tiny, tmp_path / "whole", lines, micro_prompts=4), narrow(2)))
    assert written(tmp_path / "half") == written(tmp_path / "whole")


def test_out_of_memory_with_half_of_it_says_what_to_do(tiny: Path, tmp_path: Path) -> None:
    settings = kept(tiny, tmp_path, choice_lines(tiny, count=12), micro_prompts=4)
    with pytest.raises(OutOfMemory, match="also with 2 prompts at once"):
        list(learn(settings, narrow(1)))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("error", "so"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_every_allocators_words_for_no_memory_are_known(error: Exception, so: bool) -> None:
    assert out_of_memory(error) is so
