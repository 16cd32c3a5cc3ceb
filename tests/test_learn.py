"""Learning on logged rollouts: what goes in, what comes out, when it stops, and that it repeats."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, stirred

from sia_events.local_model import adapter, network, weights
from sia_events.local_model.policy import ChoiceRequest, Policy
from sia_events.trainer import groups
from sia_events.trainer.advantages import group_baseline
from sia_events.trainer.learn import Spec, learn

CHOICES = ((3,), (4,), (5, 6))
"""The right choice is told by the prompt's second token: 20, 21 or 22."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [(1, 20 + at % 3, *(draw.randrange(30, 40) for _ in range(draw.randrange(2, 6))), 2) for at in range(count)]


def policy(tiny: Path, made: adapter.Adapter | None = None) -> tuple[Policy, str | None]:
    model = Policy(network.load(tiny), end_token=0)
    if made is None:
        return model, None
    model.adapters["it"] = made
    return model, "it"


def trained(tiny: Path, folder: Path) -> adapter.Adapter:
    return adapter.read(folder, network.load(tiny).modules, "tiny", weights.opened(tiny).digest)


def levelled(tiny: Path) -> tuple[float, ...]:
    """The bias under which the base finds every choice about as likely: what is never sampled is never learned."""
    model, _ = policy(tiny)
    replies = model.choose([ChoiceRequest(None, prompt, CHOICES, None, 0.0, 0) for prompt in prompts(30, seed=5)])
    return tuple(-sum(scores) / 30 for scores in zip(*(reply.raw for reply in replies), strict=True))


def accuracy(tiny: Path, made: adapter.Adapter | None = None) -> float:
    model, name = policy(tiny, made)
    held, bias = prompts(60, seed=999), levelled(tiny)
    replies = model.choose([ChoiceRequest(name, prompt, CHOICES, bias, 0.0, 0) for prompt in held])
    return sum(reply.index == prompt[1] - 20 for reply, prompt in zip(replies, held, strict=True)) / len(held)


def choice_lines(
    tiny: Path, made: adapter.Adapter | None = None, count: int = 48, seed: int = 0
) -> list[dict[str, Any]]:
    """Eight logged choices a prompt, rewarded when right."""
    model, name = policy(tiny, made)
    bias = levelled(tiny)
    asked = [prompt for prompt in prompts(count, seed) for _ in range(8)]
    replies = model.choose([ChoiceRequest(name, prompt, CHOICES, bias, 1.0, at) for at, prompt in enumerate(asked)])
    return [
        {
            "group": str(prompt),
            "item": f"{prompt}#{at % 8}",
            "reward": float(reply.index == prompt[1] - 20),
            "kind": "choice",
            "prompt_ids": prompt,
            "choice_ids": CHOICES,
            "bias": bias,
            "temperature": 1.0,
            "index": reply.index,
            "logprobs": reply.logprobs,
        }
        for at, (prompt, reply) in enumerate(zip(asked, replies, strict=True))
    ]


def completion_lines(tiny: Path, count: int = 48) -> list[dict[str, Any]]:
    """The same actions logged as text of the model's own: every token with its full-vocabulary log-prob."""
    net, lines = network.load(tiny), []
    for line in choice_lines(tiny, count=count):
        written = CHOICES[line["index"]]
        with torch.inference_mode():
            scores = network.continuation_logprobs(net, None, net.empty(), [line["prompt_ids"]], [[written]])[0][
                0
            ].tolist()
        lines.append(
            {key: line[key] for key in ("group", "item", "reward", "prompt_ids", "temperature")}
            | {"kind": "completion", "completion_ids": written, "logprobs": scores}
        )
    return lines


def spec(tiny: Path, folder: Path, lines: list[dict[str, Any]], **options: Any) -> Spec:
    folder.mkdir(exist_ok=True)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"lr": 2e-2, "epochs": 6, "rank": 4, "alpha": 8, "batch_prompts": 12, "micro_prompts": 5} | options
    return Spec(str(tiny), str(folder / "rollouts.jsonl"), str(folder / "adapter"), **settings)


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
        "kept_groups",
        "skipped_zero_variance",
        "tokens",
    }
    assert all(told <= step.keys() and all(math.isfinite(step[key]) for key in told) for step in steps)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["kl"] > 0.05


def test_learning_from_logged_text_makes_rewarded_text_likelier(tiny: Path, tmp_path: Path) -> None:
    lines = completion_lines(tiny)
    *_, last = learn(spec(tiny, tmp_path, lines, epochs=3, lr=5e-3))
    net, made = network.load(tiny), trained(tiny, tmp_path / "adapter")
    gains = {0.0: [], 1.0: []}
    for line in lines:
        with torch.inference_mode():
            now = network.continuation_logprobs(
                net, made, net.empty(), [line["prompt_ids"]], [[line["completion_ids"]]]
            )[0][0]
        gains[line["reward"]].append(float(now.sum()) - sum(line["logprobs"]))
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
    assert last["kept_groups"] + last["skipped_zero_variance"] == 24
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
            "kept_groups": 0,
            "skipped_zero_variance": 6,
        }
    ]
    assert not (tmp_path / "adapter").exists()


def test_moving_too_far_from_the_rollouts_stops_learning(tiny: Path, tmp_path: Path) -> None:
    *_, last = learn(spec(tiny, tmp_path, choice_lines(tiny), kl_stop=0.05))
    assert last["stopped"] == "kl"
    assert last["step"] < last["steps"]


def test_collapse_to_one_answer_stops_learning(tiny: Path, tmp_path: Path) -> None:
    """Prompts that cannot be told apart, half of which overpay one answer: it is given everywhere, deserved on half."""
    lines = [
        {"group": str(at), "item": str(at), "reward": 10.0 * (index == 0) if at % 2 else 1.0 * (index == 1)}
        | {"kind": "choice", "prompt_ids": [1, 20, 30, 2], "choice_ids": CHOICES, "bias": None, "temperature": 1.0}
        | {"index": index, "logprobs": [math.log(p) for p in ((0.5, 0.4, 0.1) if at % 2 else (0.4, 0.5, 0.1))]}
        for at in range(48)
        for index in (0, 1)
    ]
    *_, last = learn(spec(tiny, tmp_path, lines, clip=10.0))
    assert last["stopped"] == "collapse"
    assert last["preferred_share"] == 1


def test_an_item_asked_in_two_ways_is_compared_within_each_way_only(tiny: Path, tmp_path: Path) -> None:
    lines = choice_lines(tiny, count=1)
    other = [line | {"prompt_ids": (*line["prompt_ids"], 30), "reward": 1.0} for line in lines]
    mixed = [line | {"reward": float(at % 2)} for at, line in enumerate(lines)] + other
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in mixed))
    kept, skipped = groups.read(path, group_baseline)
    assert ([len(group.samples) for group in kept], skipped) == ([8], 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "score"}, "kind 'score'"),
        ({"index": 3}, "do not fit together"),
        ({"logprobs": [0.0]}, "do not fit together"),
        ({"bias": [1.0]}, "one number a choice"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"reward": float("nan")}, "not a finite number"),
    ],
)
def test_a_bad_rollout_is_refused_before_any_work(
    tiny: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    lines = choice_lines(tiny, count=2)
    lines[9] |= change
    with pytest.raises(ValueError, match=says):
        list(learn(spec(tiny, tmp_path, lines)))
    assert not (tmp_path / "adapter").exists()


def run(settings: Spec, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "spec.json").write_text(json.dumps(settings.__dict__))
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
    assert failed.returncode == 1
    assert "rollouts.jsonl, line 1" in failed.stderr


def test_the_program_ends_when_its_parent_is_gone(tiny: Path, tmp_path: Path) -> None:
    """Its stdin, held by the parent, is closed from the start: it ends before it has learned anything."""
    done = run(spec(tiny, tmp_path, choice_lines(tiny), epochs=10_000), tmp_path, "--die-with-parent")
    assert done.returncode == 1
    assert not (tmp_path / "adapter").exists()
