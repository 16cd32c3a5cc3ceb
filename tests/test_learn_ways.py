"""Every algorithm on logged rollouts: its first step by hand, what it learns, and what it does with several calls."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import (
    CHOICES,
    accuracy,
    choice_lines,
    completion_lines,
    levelled,
    logprobs,
    policy,
    shifted,
    spec,
    trained,
)
from tiny import make_model, stirred

from sia_events.local_model import adapter, network, weights
from sia_events.local_model.policy import ChoiceRequest
from sia_events.trainer.algorithms import ALGORITHMS
from sia_events.trainer.batches import Room
from sia_events.trainer.engines import OwnEngine
from sia_events.trainer.groups import read
from sia_events.trainer.learn import learn
from sia_events.trainer.preparing import Method, prepare
from sia_events.trainer.updating import Part, part_loss, totals
from sia_events.trainer.views import view


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def test_reinforce_sums_the_clipped_surrogate_over_a_samples_tokens(tiny: Path, tmp_path: Path) -> None:
    lines = shifted(completion_lines(tiny, count=6), by=0.8)
    first = next(iter(learn(spec(tiny, tmp_path, lines, batch_prompts=6, epochs=1))))
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["group"], []).append(line)
    losses = []
    for group in groups.values():
        mean = sum(line["reward"] for line in group) / len(group)
        for line in group:
            (step,) = line["steps"]
            loss = 0.0
            for now, then in zip(logprobs(tiny, None, step), step["logprobs"], strict=True):
                ratio, advantage = math.exp(now - then), line["reward"] - mean
                loss -= min(ratio * advantage, min(max(ratio, 0.0), 2.0) * advantage)
            losses.append(loss)
    assert first["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert first["clip_fraction"] > 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_makes_right_choices_likelier(tiny: Path, tmp_path: Path, algorithm: str) -> None:
    # What is far from the rollouts is masked late, so that all of them are learned from to the end.
    options = {"algorithm": algorithm, "epochs": 6, "beta": 1.0, "max_ratio": 50.0}
    *_, last = learn(spec(tiny, tmp_path, choice_lines(tiny), **options))
    assert accuracy(tiny, trained(tiny, tmp_path / "adapter")) >= 0.85
    assert last["counts"]["samples"] > 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_takes_all_terms_several_updates_and_text(tiny: Path, tmp_path: Path, algorithm: str) -> None:
    lines = completion_lines(tiny, count=8)
    options = {"kl": 0.05, "entropy": 0.01, "updates": 2, "clip": 0.2, "epochs": 1, "batch_prompts": 4}
    *steps, last = learn(spec(tiny, tmp_path, lines, algorithm=algorithm, **options))
    assert last["steps"] == len(steps)
    assert all(math.isfinite(value) for step in steps for value in step.values())


def test_the_kl_to_the_base_model_holds_the_policy_there(tiny: Path, tmp_path: Path) -> None:
    """It is measured from the base, not from the adapter that made the rollouts."""
    start = stirred(network.load(tiny), seed=5)
    adapter.write(start, tmp_path / "start", "tiny", weights.opened(tiny).digest)
    lines = choice_lines(tiny, start)
    first = next(iter(learn(spec(tiny, tmp_path, lines, adapter_in=str(tmp_path / "start"), kl=0.1))))
    assert (first["kl"], first["kl_base"] > 0.05) == (pytest.approx(0, abs=1e-5), True)
    ends = []
    for name, kl in (("free", 0.0), ("held", 1.0)):
        *_, last = learn(spec(tiny, tmp_path / name, choice_lines(tiny), kl=kl, epochs=3))
        ends.append(last["kl"])
    assert ends[1] < ends[0] / 2


def test_samples_too_far_from_the_policy_are_masked_and_counted(tiny: Path, tmp_path: Path) -> None:
    lines = choice_lines(tiny, count=12)
    for line in lines[::5]:
        line["steps"][0]["logprobs"] = [value - 9 for value in line["steps"][0]["logprobs"]]
    *_, last = learn(spec(tiny, tmp_path, lines, epochs=1, max_ratio=5.0))
    kept = {line["group"] for line in lines} - alike(lines)
    assert last["counts"]["masked"] == sum(line["group"] in kept for line in lines[::5])


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_step_whose_samples_are_all_masked_moves_nothing_and_is_told(
    tiny: Path, tmp_path: Path, algorithm: str
) -> None:
    lines = choice_lines(tiny, count=12)
    for line in lines:
        line["steps"][0]["logprobs"] = [value - 9 for value in line["steps"][0]["logprobs"]]
    *steps, last = learn(spec(tiny, tmp_path, lines, epochs=1, algorithm=algorithm))
    assert len(steps) == last["steps"] and all(step["loss"] == 0 for step in steps if "value_loss" not in step)


@pytest.mark.parametrize(("algorithm", "figures"), [("cloning", ("nll",)), ("dpo", ("margin", "accuracy"))])
def test_figures_of_a_step_are_the_same_however_it_is_cut_into_parts(
    tiny: Path, tmp_path: Path, algorithm: str, figures: tuple[str, ...]
) -> None:
    """They are means over what they tell of: tokens that are imitated, or pairs; parts have few or many of these."""
    start = stirred(network.load(tiny), seed=5)
    adapter.write(start, tmp_path / "start", "tiny", weights.opened(tiny).digest)
    seen = []
    for name, prompts in (("whole", 12), ("cut", 1)):
        lines = completion_lines(tiny, count=12)
        options = {"algorithm": algorithm, "adapter_in": str(tmp_path / "start"), "micro_prompts": prompts}
        seen.append(next(iter(learn(spec(tiny, tmp_path / name, lines, max_ratio=50.0, **options)))))
    for figure in figures:
        assert seen[0][figure] == pytest.approx(seen[1][figure], abs=1e-4)


def alike(lines: list[dict[str, Any]]) -> set[str]:
    rewards: dict[str, set[float]] = {}
    for line in lines:
        rewards.setdefault(line["group"], set()).add(line["reward"])
    return {group for group, seen in rewards.items() if len(seen) == 1}


def turns(at: int) -> tuple[tuple[int, ...], ...]:
    return (1, 23, 30 + at % 10, 2), (1, 20 + at % 3, 30 + at % 10, 2)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize("credit", ["terminal", "per-step"])
def test_attempts_of_several_calls_learn_each_of_their_turns(
    tiny: Path, tmp_path: Path, algorithm: str, credit: str
) -> None:
    """Two choices in a row, of which only the second earns the reward that both share."""
    model, _ = policy(tiny)
    bias, tries = levelled(tiny), [(at, number) for at in range(24) for number in range(8)]
    asked = [
        ChoiceRequest(None, prompt, CHOICES, bias, 1.0, seed=at * 100 + number * 10 + turn)
        for at, number in tries
        for turn, prompt in enumerate(turns(at))
    ]
    replies = iter(model.choose(asked))
    lines = []
    for at, number in tries:
        steps = []
        for prompt in turns(at):
            reply = next(replies)
            told = {"index": reply.index, "logprobs": reply.logprobs, "bias": bias}
            steps.append({"kind": "choice", "prompt_ids": prompt, "choice_ids": CHOICES, **told})
        right = steps[-1]["index"] == at % 3
        lines.append({"group": str(at), "item": f"{at}#{number}", "reward": float(right), "steps": steps})
    options = {"credit": credit, "algorithm": algorithm, "max_ratio": 50.0}
    *_, last = learn(spec(tiny, tmp_path, lines, **options))
    assert last["counts"]["samples"] > 100
    model, name = policy(tiny, trained(tiny, tmp_path / "adapter"))
    held = [ChoiceRequest(name, turns(at)[1], CHOICES, bias, 0.0, 0) for at in range(24)]
    assert sum(reply.index == at % 3 for at, reply in enumerate(model.choose(held))) >= 22


def test_the_largest_advantage_of_a_step_is_the_largest_of_its_groups(tiny: Path, tmp_path: Path) -> None:
    """By hand: one of eight that is right stands out by more than one of four does."""
    lines = choice_lines(tiny, count=2)
    for at, line in enumerate(lines):
        line["reward"] = float(at in (0, 8))
    settings = spec(tiny, tmp_path, lines[:12], algorithm="entropic")
    groups, _ = read(Path(settings.rollouts))
    engine = OwnEngine(weights.opened(tiny), settings)
    each = [ALGORITHMS["entropic"].weigh([s.reward for s in group.samples], settings.learning) for group in groups]
    found = prepare(engine, Method(ALGORITHMS["entropic"], settings.learning), groups, Room(8, 9999)).figures
    large, small = (weighed.figures["max_advantage"] for weighed in each)
    assert found["entropic_max_advantage"] == large > small + 1
    assert found["entropic_ess"] == pytest.approx(sum(weighed.figures["ess"] for weighed in each) / 2)


@pytest.mark.parametrize(("credit", "returns"), [("terminal", [0.25, 0.5, 1.0]), ("per-step", [0.5, 0.5, 1.0])])
def test_ppo_s_critic_counts_in_actions_or_in_calls(
    tiny: Path, tmp_path: Path, credit: str, returns: list[float]
) -> None:
    """Two calls, of two tokens and of one; a critic that values nothing yet, and half of what is ahead trusted."""
    calls = [{"prompt_ids": (1, 20), "completion_ids": (5, 6)}, {"prompt_ids": (1, 21), "completion_ids": (7,)}]
    steps = [{"kind": "completion", **said, "logprobs": logprobs(tiny, None, said)} for said in calls]
    lines = [{"group": "a", "item": f"a#{at}", "reward": 1.0 - at, "steps": steps} for at in range(2)]
    settings = spec(tiny, tmp_path, lines, algorithm="ppo", credit=credit, trace=0.5)
    groups, _ = read(Path(settings.rollouts))
    engine = OwnEngine(weights.opened(tiny), settings)
    head = torch.nn.Linear(engine.width, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    prepared = prepare(engine, Method(ALGORITHMS["ppo"], settings.learning, head), groups, room=Room(8, 9999))
    assert prepared.returns == [returns, [0.0, 0.0, 0.0]]


def test_a_value_is_held_near_the_old_one_by_the_deviation_of_the_returns(tiny: Path, tmp_path: Path) -> None:
    """By hand: returns of 2 and 6 deviate by 2, so a value that went from 0 to 1 counts as 0.4 where that is worse."""
    step = {"prompt_ids": (1, 20), "completion_ids": (5,), "logprobs": [-3.0]}
    lines = [
        {"group": "a", "item": f"a#{at}", "reward": reward, "steps": [{"kind": "completion", **step}]}
        for at, reward in enumerate((2.0, 6.0))
    ]
    settings = spec(tiny, tmp_path, lines, algorithm="ppo", max_ratio=50.0)
    groups, _ = read(Path(settings.rollouts))
    engine = OwnEngine(weights.opened(tiny), settings)
    head = torch.nn.Linear(engine.width, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    method = Method(ALGORITHMS["ppo"], settings.learning, head)
    prepared = prepare(engine, method, groups, Room(8, 9999))
    torch.nn.init.ones_(head.bias)
    part = Part(groups, view(engine, groups, hidden=True), first=0)
    _, figures, _ = part_loss(method, part, prepared, totals(method, groups))
    assert figures["value_loss"] == pytest.approx(((0.4 - 2) ** 2 + (0.4 - 6) ** 2) / 2 / 2)


def test_the_last_line_has_texts_to_prove_the_adapter_by(tiny: Path, tmp_path: Path) -> None:
    *_, last = learn(spec(tiny, tmp_path, choice_lines(tiny, count=12), epochs=1))
    made = trained(tiny, tmp_path / "adapter")
    assert len(last["probe"]) == 4
    for text in last["probe"]:
        assert text["logprobs"] == pytest.approx(logprobs(tiny, made, text), abs=1e-5)
    json.dumps(last)
