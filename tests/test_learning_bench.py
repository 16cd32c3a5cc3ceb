"""What is measured of learning, on the tiny model: the batch that all steps are taken on, and what a step tells."""

from pathlib import Path

import pytest
from tiny_served import make_home

from sia_events import learning_bench
from sia_events.trainer.groups import read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").symlink_to(make_home(tmp_path / "home"))
    return tmp_path


def test_the_steps_of_all_are_taken_on_one_batch_of_our_rollouts(folder: Path) -> None:
    told = learning_bench.sample(folder)
    groups, _ = read(folder / "batch.jsonl")
    assert sum(len(group.samples) for group in groups) == told["rollouts"] > 0
    assert told.keys() == {"rollouts", "seconds", "cpu_seconds", "peak_mb"}


@pytest.mark.parametrize("engine", ["own", "transformers"])
def test_a_step_on_them_tells_its_cost_and_starts_on_the_policy_itself(folder: Path, engine: str) -> None:
    if engine == "transformers":
        pytest.importorskip("peft", reason="the extra `train` is not installed")
    learning_bench.sample(folder)
    told = learning_bench.WHAT[engine](folder)
    assert told["cpu_seconds"] > 0 and told["peak_mb"] > 0
    assert told["loss"] == pytest.approx(0, abs=1e-4)
