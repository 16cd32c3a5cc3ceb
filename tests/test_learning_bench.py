"""What is measured of learning, on the tiny model: the batch that all steps are taken on, and what a step tells."""

import json
from mmap import PAGESIZE, mmap
from pathlib import Path
from typing import Any

import pytest
from tiny_served import make_home

from sia_events import learning_bench
from sia_events.learning_figures import SINGLY, of_a_step, of_rollouts
from sia_events.trainer.groups import read

PROMPTS, SAMPLES, TOKENS = 3, 4, 5
EXTRAS = {"own": (), "transformers": ("peft",), "trl": ("trl", "datasets"), "trl_recompute": ("trl", "datasets")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = make_home(tmp_path / "home")
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<end>"}
    (model / "tokenizer_config.json").write_text(json.dumps(told))
    (tmp_path / "model").symlink_to(model)
    return tmp_path


def test_the_steps_of_all_are_taken_on_one_batch_of_our_rollouts(folder: Path) -> None:
    told = learning_bench.sample(folder, PROMPTS, SAMPLES, TOKENS)
    groups, _ = read(folder / "batch.jsonl")
    assert [len(group.samples) for group in groups] == [SAMPLES] * PROMPTS
    assert told["rollouts"] == PROMPTS * SAMPLES
    assert told.keys() == {"rollouts", "seconds", "cpu_seconds", "peak_mb"}


@pytest.mark.parametrize("engine", EXTRAS)
def test_a_step_on_them_tells_its_cost_and_starts_on_the_policy_itself(folder: Path, engine: str) -> None:
    for extra in EXTRAS[engine]:
        pytest.importorskip(extra, reason="an extra that is not installed")
    learning_bench.sample(folder, PROMPTS, SAMPLES, TOKENS)
    told = learning_bench.WHAT[engine](folder)
    assert told["cpu_seconds"] > 0
    assert told["step_mb"] is None or 0 <= told["step_mb"] < told["peak_mb"]
    assert told["loss"] == pytest.approx(0, abs=1e-4)


def test_one_by_one_each_prompt_is_answered_once(folder: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `train` is not installed")
    learning_bench.sample(folder, PROMPTS, SAMPLES, TOKENS)
    told = learning_bench.one_by_one(folder)
    assert told["rollouts"] == PROMPTS and told["cpu_seconds"] > 0


def test_the_peak_of_the_steps_is_counted_from_where_they_begin() -> None:
    written(64 << 20)
    before = learning_bench._peak_anew()
    if before is None:
        pytest.skip("this system does not count a peak anew")
    assert learning_bench._peak_mb() - before < 32
    written(64 << 20)
    assert learning_bench._peak_mb() - before > 60


def written(size: int) -> None:
    """Take that much memory anew from the system, whatever the heap has left, and give it back."""
    with mmap(-1, size) as pages:
        pages[::PAGESIZE] = b"x" * (size // PAGESIZE)


def cost(seconds: float, peak: float, own: float | None = 1.0) -> dict[str, Any]:
    return {"cpu_seconds": seconds, "peak_mb": peak, "step_mb": own}


def test_a_step_reaches_its_goal_where_it_costs_at_most_the_least_of_trls() -> None:
    steps = {
        "ours": cost(2, 500, 90),
        "transformers": cost(1, 1),
        "trl": cost(2, 900, 80),
        "trl recomputing": cost(3, 400),
    }
    speed, peak, own = of_a_step(steps, "4 x 4 x 8")
    assert (speed.name, speed.value, speed.reached) == ("a step of GRPO, 4 x 4 x 8", 2, True)
    assert (peak.value, peak.reached, peak.beside["trl recomputing"]) == (500, False, 400)
    assert (own.value, own.reached, own.unit) == (90, False, "MB")


def test_nothing_is_reached_where_nothing_else_was_measured() -> None:
    assert [figure.reached for figure in of_a_step({"ours": cost(2, 500, None)}, "")] == [None, None]
    alone = of_rollouts({"ours": {"rollouts": 16, "cpu_seconds": 4.0}})
    assert (alone.value, alone.reached) == (4.0, None)


@pytest.mark.parametrize(("theirs", "reached"), [(2.0, True), (1.9, False)])
def test_rollouts_reach_their_goal_at_twice_the_rate_of_one_by_one(theirs: float, reached: bool) -> None:
    drawn = {"ours": {"rollouts": 16, "cpu_seconds": 4.0}, SINGLY: {"rollouts": 4, "cpu_seconds": theirs}}
    assert of_rollouts(drawn).reached is reached
