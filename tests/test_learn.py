"""Learning on logged rollouts: what goes in, what comes out, when it stops, and that it repeats."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import CHOICES, accuracy, choice_lines, completion_lines, logprobs, spec, trained
from tiny import make_model, stirred

from sia_events.local_model import adapter, network, weights
from sia_events.trainer.learn import learn
from sia_events.trainer.spec import Spec, to_json


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def test_learning_from_logged_choices_makes_right_ones_likelier(tiny: Path, tmp_path: Path) -> None:
    *steps, last = learn(spec(tiny, tmp_path, choice_lines(tiny)))
    assert accuracy(tiny) <= 0.6
    assert accuracy(tiny, trained(tiny, tmp_path / "adapter")) >= 0.9
    assert (last["done"], last["stopped"], last["adapter"]) == (True, "end", str(tmp_path / "adapter"))
    assert len(steps) == last["steps"] == last["step"]
    told = {
        "step",
        "steps",
        "loss",
        "kl",
        "entropy",
        "clip_fraction",
        "reward",
        "lr",
        "masked",
        "tokens",
    }
    assert all(told <= step.keys() and all(math.isfinite(step[key]) for key in told) for step in steps)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["kl"] > 0.05


def test_learning_from_logged_text_makes_rewarded_text_likelier(tiny: Path, tmp_path: Path) -> None:
    lines = completion_lines(tiny)
    *_, last = learn(spec(tiny, tmp_path, lines, epochs=3, lr=5e-3))
    made = trained(tiny, tmp_path / "adapter")
    gains = {0.0: [], 1.0: []}
    for line in lines:
        (step,) = line["steps"]
        gains[line["reward"]].append(sum(logprobs(tiny, made, step)) - sum(step["logprobs"]))
    assert sum(gains[1.0]) / len(gains[1.0]) > sum(gains[0.0]) / len(gains[0.0]) + 0.1
    assert last["kl"] > 0


def test_the_first_step_is_the_policy_gradient_itself(tiny: Path, tmp_path: Path) -> None:
    """On the behaviour policy's own data every ratio is 1: nothing is clipped, the loss is the mean advantage, 0."""
    first = next(iter(learn(spec(tiny, tmp_path, choice_lines(tiny)))))
    assert first["clip_fraction"] == 0
    assert first["loss"] == pytest.approx(0, abs=1e-5)


def test_choices_and_text_are_learned_from_together(tiny: Path, tmp_path: Path) -> None:
    text = [line | {"group": f"text {line['group']}"} for line in completion_lines(tiny, count=12)]
    *_, last = learn(spec(tiny, tmp_path, choice_lines(tiny, count=12) + text, epochs=1))
    assert last["counts"]["groups"] + last["counts"]["equal_rewards"] == 24
    assert math.isfinite(last["loss"])


def test_microbatches_change_memory_and_not_the_result(tiny: Path, tmp_path: Path) -> None:
    lines = choice_lines(tiny)
    made = []
    for size in (1, 12):
        list(learn(spec(tiny, tmp_path / str(size), lines, micro_prompts=size, epochs=1, lr=1e-3)))
        made.append(trained(tiny, tmp_path / str(size) / "adapter"))
    for name, (down, up) in made[0].factors.items():
        assert torch.allclose(down, made[1].factors[name][0], atol=2e-4)
        assert torch.allclose(up, made[1].factors[name][1], atol=2e-4)


def test_the_same_seed_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    lines = choice_lines(tiny)
    seen = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(spec(tiny, tmp_path / folder, lines, seed=seed, epochs=1), tmp_path / folder)
        seen.append([(tmp_path / folder / "adapter" / name).read_bytes() for name in (adapter.CONFIG, adapter.WEIGHTS)])
    assert seen[0] == seen[1]
    assert seen[0][1] != seen[2][1]


def test_learning_goes_on_from_the_adapter_that_made_the_rollouts(tiny: Path, tmp_path: Path) -> None:
    start = stirred(network.load(tiny), seed=5)
    adapter.write(start, tmp_path / "start", "tiny", weights.opened(tiny).digest)
    settings = spec(tiny, tmp_path, choice_lines(tiny, start), adapter_in=str(tmp_path / "start"))
    first, *_ = learn(settings)
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert accuracy(tiny, trained(tiny, tmp_path / "adapter")) > accuracy(tiny, start) + 0.2


def test_equal_rewards_teach_nothing_and_leave_no_adapter(tiny: Path, tmp_path: Path) -> None:
    lines = [line | {"reward": 1.0} for line in choice_lines(tiny, count=6)]
    assert list(learn(spec(tiny, tmp_path, lines))) == [
        {
            "done": True,
            "stopped": "no signal",
            "adapter": None,
            "steps": 0,
            "counts": {"single_sample": 0, "equal_rewards": 6, "groups": 0, "samples": 0},
        }
    ]
    assert not (tmp_path / "adapter").exists()


def test_moving_too_far_from_the_rollouts_stops_learning(tiny: Path, tmp_path: Path) -> None:
    *_, last = learn(spec(tiny, tmp_path, choice_lines(tiny), kl_stop=0.05))
    assert last["stopped"] == "kl"
    assert last["step"] < last["steps"]


def test_what_stops_before_its_first_step_leaves_no_adapter_and_steps_that_were_not_taken_are_not_told(
    tiny: Path, tmp_path: Path
) -> None:
    lines = choice_lines(tiny, count=12)
    *steps, last = learn(spec(tiny, tmp_path, lines, lr=0.1, kl_stop=0.01, epochs=9))
    assert last["stopped"] == "kl" and 0 < last["step"] == steps[-1]["step"] - 1
    for line in lines:
        line["steps"][0]["logprobs"] = line["steps"][0]["logprobs"][::-1]
    *_, last = learn(spec(tiny, tmp_path / "far", lines, kl_stop=0.001))
    assert (last["stopped"], last["adapter"], last["steps"]) == ("kl", None, 0)
    assert not (tmp_path / "far" / "adapter").exists()


def test_collapse_to_one_answer_stops_learning(tiny: Path, tmp_path: Path) -> None:
    """Prompts that cannot be told apart, half of which overpay one answer: it is given everywhere, deserved on half."""
    lines = [
        {"group": str(at), "item": str(at), "reward": 10.0 * (index == 0) if at % 2 else 1.0 * (index == 1)}
        | {
            "steps": [
                {"kind": "choice", "prompt_ids": [1, 20, 30, 2], "choice_ids": CHOICES, "index": index}
                | {"logprobs": [math.log(p) for p in ((0.5, 0.4, 0.1) if at % 2 else (0.4, 0.5, 0.1))]}
            ]
        }
        for at in range(48)
        for index in (0, 1)
    ]
    *_, last = learn(spec(tiny, tmp_path, lines, clip=10.0))
    assert last["stopped"] == "collapse"
    assert last["preferred_share"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "score"}, "Invalid enum value 'score'"),
        ({"index": 3}, "do not fit together"),
        ({"logprobs": [0.0]}, "one number a choice"),
        ({"logprobs": None}, "log-probs are missing"),
        ({"kind": "completion"}, "completion_ids is empty"),
        ({"bias": [1.0]}, "one number a choice"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"prompt_ids": []}, "prompt_ids is empty"),
    ],
)
def test_a_bad_rollout_is_refused_before_any_work(
    tiny: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    lines = choice_lines(tiny, count=2)
    lines[9]["steps"][0] |= change
    with pytest.raises(ValueError, match=says):
        list(learn(spec(tiny, tmp_path, lines)))
    assert not (tmp_path / "adapter").exists()


def run(settings: Spec, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "spec.json").write_bytes(to_json(settings))
    command = [sys.executable, "-m", "sia_events.trainer.learn", str(folder / "spec.json"), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(command, text=True, capture_output=True, env=env, stdin=subprocess.DEVNULL, check=False)


def test_the_program_prints_a_line_a_step_and_says_what_is_wrong(tiny: Path, tmp_path: Path) -> None:
    settings = spec(tiny, tmp_path, choice_lines(tiny, count=24), epochs=1)
    done = run(settings, tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert [line.get("done", False) for line in lines] == [False] * (len(lines) - 1) + [True]

    (tmp_path / "rollouts.jsonl").write_text("{}\n")
    failed = run(settings, tmp_path)
    assert failed.returncode == os.EX_DATAERR
    assert "rollouts.jsonl, line 1" in failed.stderr


def test_the_program_ends_when_its_parent_is_gone(tiny: Path, tmp_path: Path) -> None:
    """Its stdin, held by the parent, is closed from the start: it ends before it has learned anything."""
    done = run(spec(tiny, tmp_path, choice_lines(tiny), epochs=10_000), tmp_path, "--die-with-parent")
    assert done.returncode == 1
    assert not (tmp_path / "adapter").exists()
