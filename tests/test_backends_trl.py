"""TRL as the backend of learning: the same step from the same rollouts, and what it has no way to learn."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import choice_lines, completion_lines, shifted, spec, trained
from tiny import make_model

from sia_events.errors import Unusable
from sia_events.local_model import adapter
from sia_events.run_settings import merged
from sia_events.shared.events import RunSettings
from sia_events.trainer.learn import learn
from sia_events.trainer.spec import Spec, to_json

for package in ("trl", "peft"):
    pytest.importorskip(package, reason="the extra trl is not installed")

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "grpo", "reduction": "sample"},
        {"algorithm": "grpo", "reduction": "token"},
        {"algorithm": "grpo", "reduction": "constant"},
        {"algorithm": "grpo", "kl": 0.1, "max_ratio": 0.5},
        {"algorithm": "rloo", "kl": 0.1},
        {"algorithm": "rloo", "max_ratio": 0.5},
        {"algorithm": "dpo", "beta": 0.3},
    ],
    ids=str,
)
def test_a_step_by_trl_is_ours(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    lines = shifted(completion_lines(tiny, count=8), by=0.4)
    for line in lines[::5]:
        line["steps"][0]["logprobs"] = [value - 0.3 for value in line["steps"][0]["logprobs"]]
    told, made, backends = [], [], []
    for backend in ("ours", "trl"):
        settings = {"epochs": 1, "clip": 0.2, "batch_prompts": 8, "micro_prompts": 3, "updates": 2} | options
        *steps, last = learn(spec(tiny, tmp_path / backend, lines, backend=backend, **settings))
        told.append([{k: v for k, v in step.items() if k != "tokens_per_second"} for step in steps])
        made.append(trained(tiny, tmp_path / backend / "adapter"))
        backends.append(last["backend"])
    assert backends == ["ours", f"trl {version('trl')}"] and len(told[0]) == 2
    assert ("max_ratio" in options) == (told[0][-1]["masked"] > 0)
    for ours, theirs in zip(*told, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)
    for name, pair in made[0].factors.items():
        for one, two in zip(pair, made[1].factors[name], strict=True):
            assert torch.allclose(one, two, atol=1e-4)


def test_trl_learns_text_of_several_calls_whose_prompts_differ_in_length(tiny: Path, tmp_path: Path) -> None:
    """A call is a row of TRL's; the reduction over all tokens is the one that both mean alike."""
    lines = completion_lines(tiny, count=8)
    pairs = [
        one | {"steps": [*one["steps"], *other["steps"]]} for one, other in zip(lines[:32], lines[32:], strict=True)
    ]
    first = []
    for backend in ("ours", "trl"):
        options = {"algorithm": "grpo", "reduction": "token", "backend": backend, "epochs": 1, "batch_prompts": 8}
        list(learn(spec(tiny, tmp_path / backend, pairs, **options)))
        first.append(trained(tiny, tmp_path / backend / "adapter"))
    for name, (_, up) in first[0].factors.items():
        assert torch.allclose(up, first[1].factors[name][1], atol=1e-4)


def hot(lines: Lines) -> Lines:
    return [line | {"steps": [step | {"temperature": 0.7} for step in line["steps"]]} for line in lines]


def twice(lines: Lines) -> Lines:
    return [line | {"steps": line["steps"] * 2} for line in lines]


@pytest.mark.parametrize(
    ("make", "change", "options", "why"),
    [
        (choice_lines, list, {"algorithm": "grpo"}, "TRL learns text, and some answers were chosen among given ones"),
        (completion_lines, list, {"algorithm": "cloning"}, "TRL has grpo, rloo, dpo, and no cloning"),
        (completion_lines, list, {"algorithm": "grpo", "entropy": 0.1}, "TRL weighs no entropy"),
        (completion_lines, hot, {"algorithm": "dpo"}, "text was drawn at 0.7"),
        (completion_lines, twice, {"algorithm": "dpo"}, "some samples are of several calls"),
    ],
    ids=["choices", "cloning", "entropy", "temperature", "calls"],
)
def test_what_trl_has_no_way_to_learn_is_learned_by_ours_and_said(
    tiny: Path, tmp_path: Path, make: Any, change: Any, options: dict[str, Any], why: str
) -> None:
    lines = change(make(tiny, count=6))
    list(learn(spec(tiny, tmp_path / "ours", lines, epochs=1, **options)))
    *_, last = learn(spec(tiny, tmp_path / "trl", lines, epochs=1, backend="trl", **options))
    assert last["backend"].startswith("ours: ") and why in last["backend"]
    written = [(tmp_path / name / "adapter" / adapter.WEIGHTS).read_bytes() for name in ("ours", "trl")]
    assert written[0] == written[1]


@pytest.mark.slow  # three learners that import TRL
def test_a_killed_learner_with_trl_s_loss_goes_on_to_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    lines = completion_lines(tiny, count=24)
    made = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        options = {"algorithm": "grpo", "backend": "trl", "epochs": 1, "batch_prompts": 6, "updates": 2}
        settings = spec(tiny, folder, lines, checkpoint=str(folder / "checkpoint"), **options)
        if name == "killed":
            died = child(settings, folder, SIA_FAIL_AT="learner behind keeping step 3")
            assert died.returncode == -signal.SIGKILL
            done = child(settings, folder)
            assert done.returncode == 0, done.stderr
            steps = [json.loads(line) for line in done.stdout.splitlines()]
        else:
            steps = list(learn(settings))
        assert steps[0]["step"] == (1 if name == "whole" else 4) and steps[-1]["backend"].startswith("trl ")
        made.append((folder / "adapter" / adapter.WEIGHTS).read_bytes())
    assert made[0] == made[1]


def child(settings: Spec, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    (folder / "spec.json").write_bytes(to_json(settings))
    command = [sys.executable, "-m", "sia_events.trainer.learn", str(folder / "spec.json")]
    calm = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        command, text=True, capture_output=True, env=os.environ | calm | env, stdin=subprocess.DEVNULL, check=False
    )


def test_without_trl_the_learner_names_the_extra(tiny: Path, tmp_path: Path) -> None:
    settings = spec(tiny, tmp_path, completion_lines(tiny, count=6), algorithm="grpo", backend="trl")
    (tmp_path / "spec.json").write_bytes(to_json(settings))
    # What is None in sys.modules is not installed, as far as imports are concerned.
    program = "import sys; sys.modules['trl'] = None; from sia_events.trainer.learn import main; main()"
    command = [sys.executable, "-c", program, str(tmp_path / "spec.json")]
    failed = subprocess.run(command, text=True, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    assert failed.returncode == 1 and "pip install 'sia-events[trl]'" in failed.stderr
    assert not (tmp_path / "adapter").exists()


def test_an_algorithm_that_trl_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(Unusable, match="TRL has grpo, rloo, dpo, and no ppo"):
        merged(RunSettings(), {"algorithm": "ppo", "learning.backend": "trl"})
    for algorithm in ("auto", "grpo", "rloo", "dpo"):
        made = merged(RunSettings(), {"algorithm": algorithm, "learning.backend": "trl"})
        assert made.learning.backend == "trl"
