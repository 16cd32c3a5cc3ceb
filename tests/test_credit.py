"""Groups of rollouts, and how the credit for an attempt is spread over its calls."""

from pathlib import Path

import pytest

from sia_events.shared.events import Learning
from sia_events.trainer.algorithms import ALGORITHMS
from sia_events.trainer.credit import credit, distinct, teaching
from sia_events.trainer.groups import RolloutGroup, RolloutsRefused, read
from sia_events.trainer.rollouts import Sample, Step, to_lines

REINFORCE, TERMINAL, PER_STEP = ALGORITHMS["reinforce"], Learning(), Learning(credit="per-step", discount=0.5)


def said(prompt: int, *tokens: int) -> Step:
    return Step("completion", (prompt,), (-1.0,) * len(tokens), completion_ids=tokens)


def grouped(folder: Path, *samples: tuple[float, list[Step]], group: str = "g") -> RolloutGroup:
    lines = to_lines([Sample(group, f"{group}#{at}", reward, tuple(s)) for at, (reward, s) in enumerate(samples)])
    (folder / "rollouts.jsonl").write_bytes(lines)
    (found,), _ = read(folder / "rollouts.jsonl")
    return found


def test_calls_in_the_same_state_are_of_one_scene(tmp_path: Path):
    group = grouped(tmp_path, (1.0, [said(1, 7), said(2, 8)]), (0.0, [said(1, 9, 9), said(3, 8)]))
    assert [scene.prompt for scene in group.scenes] == [(1,), (2,), (3,)]
    assert group.scenes[0].continuations == ((7,), (9, 9))
    assert [[act.scene for act in sample.acts] for sample in group.samples] == [[0, 1], [0, 2]]


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"bias": (0.0, 1.0)}, {"choice_ids": ((7,), (9,))}])
def test_calls_drawn_from_other_distributions_are_of_other_scenes(tmp_path: Path, change: dict):
    first = {"kind": "choice", "prompt_ids": (1,), "logprobs": (-0.5, -0.9), "choice_ids": ((7,), (8,))}
    group = grouped(tmp_path, (1.0, [Step(**first)]), (0.0, [Step(**first | change)]))
    assert len(group.scenes) == 2


def test_terminal_credit_gives_every_call_what_the_attempt_was_worth(tmp_path: Path):
    group = grouped(tmp_path, (1.0, [said(1, 7), said(2, 8)]), (0.0, [said(1, 9)]))
    assert credit(group, [1.0, 0.0], REINFORCE, TERMINAL) == (((0.5, 0.5), (-0.5,)), {})


def test_per_step_credit_compares_calls_of_one_state_on_what_came_of_them(tmp_path: Path):
    """From the first state on: 1 with one call left is worth 0.5, 0.8 with none left 0.8. The second was met once."""
    group = grouped(tmp_path, (1.0, [said(1, 7), said(2, 8)]), (0.8, [said(1, 9)]))
    credited = credit(group, [1.0, 0.8], REINFORCE, PER_STEP)
    assert credited is not None
    assert credited[0] == (pytest.approx((-0.15, 0.1)), pytest.approx((0.15,)))


def test_a_state_that_one_attempt_alone_came_back_to_is_weighed_against_nothing(tmp_path: Path):
    # The first attempt is twice where the other never was: its calls there are not weighed against each other.
    group = grouped(tmp_path, (1.0, [said(1, 7), said(2, 8), said(2, 8)]), (0.0, [said(1, 9), said(3, 8)]))
    credited = credit(group, [1.0, 0.0], REINFORCE, PER_STEP)
    assert credited is not None
    (_, *first), (_, *second) = credited[0]
    assert (first, second) == ([0.5, 0.5], [-0.5])


def test_calls_of_one_state_that_came_to_the_same_teach_nothing(tmp_path: Path):
    group = grouped(tmp_path, (1.0, [said(1, 7), said(2, 8)]), (1.0, [said(1, 9), said(3, 8)]), (0.0, [said(4, 8)]))
    credited = credit(group, [1.0, 1.0, 0.0], REINFORCE, PER_STEP)
    assert credited is not None
    assert [row[0] for row in credited[0]] == pytest.approx([0, 0, -2 / 3])


def test_attempts_of_one_call_have_the_same_credit_either_way(tmp_path: Path):
    group = grouped(tmp_path, (1.0, [said(1, 7)]), (0.0, [said(1, 9)]), (0.5, [said(1, 7)]))
    rewards = [1.0, 0.0, 0.5]
    assert credit(group, rewards, REINFORCE, TERMINAL) == credit(group, rewards, REINFORCE, PER_STEP)


def test_equal_rewards_teach_nothing_and_are_counted(tmp_path: Path):
    group = grouped(tmp_path, (1.0, [said(1, 7)]), (1.0, [said(1, 9)]))
    assert credit(group, [1.0, 1.0], REINFORCE, TERMINAL) is None
    assert teaching([group], REINFORCE, TERMINAL) == ([], 1)


def test_what_is_cloned_is_cloned_once(tmp_path: Path):
    group = grouped(tmp_path, (0.5, [said(1, 7)]), (0.0, [said(1, 9)]), (1.0, [said(1, 7)]))
    assert [sample.reward for sample in distinct(group).samples] == [0.0, 1.0]
    ((kept,), _) = teaching([group], ALGORITHMS["cloning"], TERMINAL)
    assert len(kept.samples) == 2


def test_a_lone_sample_is_left_out_and_counted(tmp_path: Path):
    lines = to_lines([Sample("a", "a#0", 1.0, (said(1, 7),)), Sample("b", "b#0", 1.0, (said(1, 7),))])
    (tmp_path / "r").write_bytes(lines)
    assert read(tmp_path / "r") == ([], {"single_sample": 2})


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_finite_number_is_refused(tmp_path: Path, reward: float):
    with pytest.raises(RolloutsRefused, match=r"line 1: .*Nothing was trained"):
        grouped(tmp_path, (reward, [said(1, 7)]))
