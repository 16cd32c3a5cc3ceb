"""Every algorithm's advantages: on groups computed by hand, and by the properties that its formula promises."""

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sia_events.shared import events
from sia_events.shared.events import Learning
from sia_events.trainer.algorithms import ALGORITHMS, RewardRefused
from sia_events.trainer.algorithms.cloning import UPLIFT, balanced
from sia_events.trainer.algorithms.dpo import pairs
from sia_events.trainer.algorithms.entropic import distance, tilted
from sia_events.trainer.algorithms.ppo import gae, gae_of_calls, whitened

USUAL = Learning()
EVERY = pytest.mark.parametrize("name", sorted(ALGORITHMS))
CENTRED = pytest.mark.parametrize("name", ["reinforce", "grpo", "rloo", "entropic", "dpo"])
GRID = st.lists(st.integers(-40, 40).map(lambda at: at / 8), min_size=2, max_size=16)
"""Rewards on a grid of eighths: shifts and scalings by powers of two are exact on it."""


def weigh(name: str, rewards: Sequence[float], learning: Learning = USUAL) -> list[float] | None:
    advantages = ALGORITHMS[name].weigh(rewards, learning).advantages
    return None if advantages is None else list(advantages)


def some(name: str, rewards: Sequence[float], learning: Learning = USUAL) -> list[float]:
    advantages = weigh(name, rewards, learning)
    assert advantages is not None
    return advantages


def figures(rewards: Sequence[float], learning: Learning = USUAL) -> dict[str, float]:
    return dict(ALGORITHMS["entropic"].weigh(rewards, learning).figures)


def test_the_table_has_the_algorithms_that_settings_and_events_name() -> None:
    assert set(ALGORITHMS) == set(get_args(events.Algorithm))
    assert all(name == algorithm.name for name, algorithm in ALGORITHMS.items())


def test_only_cloning_and_dpo_do_without_the_log_probs_of_the_sampler() -> None:
    assert {name for name, algorithm in ALGORITHMS.items() if not algorithm.needs_logprobs} == {"cloning", "dpo"}


@EVERY
def test_a_group_of_equal_rewards_or_of_one_sample_teaches_nothing(name: str) -> None:
    for rewards in ([1.0, 1.0, 1.0], [0.0, 0.0], [0.3], [], [0.1 + 0.2, 0.3]):
        assert weigh(name, rewards) is None, rewards


@EVERY
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_reward_that_is_no_usable_number_is_refused_by_its_place(name: str, bad: float) -> None:
    with pytest.raises(RewardRefused, match="Reward 1 of 3"):
        weigh(name, [0.0, bad, 1.0])
    with pytest.raises(RewardRefused, match="Reward 0 of 1"):
        weigh(name, [bad])


def test_reinforce_measures_against_the_mean_of_the_group() -> None:
    assert some("reinforce", [1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert some("reinforce", [1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]


def test_grpo_measures_in_standard_deviations_over_k_minus_one() -> None:
    # mean 0.25, std over K - 1: sqrt((0.75² + 3·0.25²) / 3) = 0.5
    assert some("grpo", [1.0, 0.0, 0.0, 0.0]) == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3)


def test_rloo_measures_against_the_others() -> None:
    # The others of the 3 average 1.5, of the 2 they average 5/3, and so on.
    assert some("rloo", [3.0, 2.0, 1.0]) == pytest.approx([3 - 1.5, 2 - 2.0, 1 - 2.5])
    assert some("rloo", [1.0, 0.0, 0.0, 0.0]) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


def test_ppo_hands_the_rewards_on_to_its_critic() -> None:
    assert ALGORITHMS["ppo"].critic
    assert some("ppo", [1.0, 0.0]) == [1.0, 0.0]


def test_gae_is_computed_by_hand() -> None:
    # γ = 0.5, λ = 0.5: δ = (0 + 0.5·2 - 1, 0 + 0.5·4 - 2, 8 - 4) = (0, 0, 4); A = (0.25², 0.25, 1) · 4
    advantages, targets = gae([0.0, 0.0, 8.0], [1.0, 2.0, 4.0], 0.5, 0.5)
    assert advantages == (0.25, 1.0, 4.0)
    assert targets == (1.25, 3.0, 8.0)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=9), st.floats(0.1, 1))
def test_gae_lies_between_the_one_step_error_and_the_whole_return(steps: list[tuple[float, float]], discount: float):
    rewards, values = [reward for reward, _ in steps], [value for _, value in steps]
    whole, targets = gae(rewards, values, discount, 1.0)
    left = 0.0
    for at in reversed(range(len(steps))):
        left = rewards[at] + discount * left
        assert whole[at] == pytest.approx(left - values[at], abs=1e-9)
        assert targets[at] == pytest.approx(left, abs=1e-9)
    after = [*values[1:], 0.0]
    assert gae(rewards, values, discount, 0.0)[0] == pytest.approx(
        [r + discount * b - v for r, v, b in zip(rewards, values, after, strict=True)]
    )


def test_gae_of_calls_gives_every_action_of_a_call_what_the_call_was_worth() -> None:
    # Two calls of 2 and 3 actions. γ = 0.5, λ = 0.5: δ = (-1 + 0.5·4 - 2, 8 - 4) = (-1, 4); A = (-1 + 0.25·4, 4).
    rewards, values = [-0.5, -0.5, 0.0, 1.0, 7.0], [2.0, 9.0, 4.0, 9.0, 9.0]
    advantages, targets = gae_of_calls(rewards, values, [2, 3], 0.5, 0.5)
    assert (advantages, targets) == ((0.0, 0.0, 4.0, 4.0, 4.0), (2.0, 2.0, 8.0, 8.0, 8.0))


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=9), st.floats(0.1, 1))
def test_calls_of_one_action_are_credited_as_actions(steps: list[tuple[float, float]], trace: float) -> None:
    rewards, values = [reward for reward, _ in steps], [value for _, value in steps]
    assert gae_of_calls(rewards, values, [1] * len(steps), 0.9, trace) == gae(rewards, values, 0.9, trace)


def test_whitened_advantages_have_mean_zero_and_deviation_one() -> None:
    assert whitened([3.0, 1.0, 3.0, 1.0]) == pytest.approx([1, -1, 1, -1])
    assert whitened([2.0, 2.0]) == (0.0, 0.0)


def test_one_success_of_eight_weighs_as_published() -> None:
    centred = some("entropic", [1.0, *[0.0] * 7])
    assert centred[0] == pytest.approx(4.0162, abs=1e-4)
    found = figures([1.0, *[0.0] * 7])
    assert (found["fell_back"], found["cut"]) == (0, 0)
    assert found["kl"] == pytest.approx(math.log(2), abs=1e-9)
    assert found["beta"] == pytest.approx(2.46539, abs=1e-4)
    assert found["max_advantage"] == pytest.approx(centred[0])
    assert 1 < found["ess"] <= 4


def test_leave_one_out_is_the_source_s_formula() -> None:
    rewards = [1.0, 0.6, 0.2, *[0.0] * 29]
    beta = figures(rewards)["beta"]
    powers = [math.exp(beta * reward) for reward in rewards]
    expected = [power / ((sum(powers) - power) / (len(powers) - 1)) - 1 for power in powers]
    advantages = some("entropic", rewards, Learning(leave_one_out=True))
    assert advantages == pytest.approx(expected, rel=1e-9)
    assert sum(advantages) > 0


def test_leave_one_out_is_cut_where_a_small_group_would_let_it_explode() -> None:
    # exp(β)/1 - 1 = 10.77 at β = 2.4654: beyond K - 1 = 7.
    once = [1.0, *[0.0] * 7]
    assert some("entropic", once, Learning(leave_one_out=True))[0] == 7
    assert figures(once, Learning(leave_one_out=True))["cut"] == 1


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.5, 0.6], [-0.5, 0.5]),
        ([1.0, 1.0, 0.0, 0.0], [0.5, 0.5, -0.5, -0.5]),
        ([30.0, 30.0, 30.0, 0.0], [0.25, 0.25, 0.25, -0.75]),
    ],
)
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_a_distance_that_no_sharpness_reaches_falls_back_on_the_mean(
    rewards: list[float], expected: list[float], leave_one_out: bool
) -> None:
    learning = Learning(leave_one_out=leave_one_out)
    assert some("entropic", rewards, learning) == pytest.approx(expected)
    assert figures(rewards, learning)["fell_back"] == 1
    assert figures(rewards, learning)["ess"] == pytest.approx(len(rewards))


def test_rewards_a_hair_apart_at_the_top_count_as_tied() -> None:
    found = figures([1.0, 1.0 - 1e-8, 1.0 - 2e-8, 0.0])
    assert found["fell_back"] == 1
    assert found["max_advantage"] <= 1


@given(GRID, st.booleans())
def test_entropic_advantages_are_bounded_and_the_distance_is_met(rewards: list[float], leave_one_out: bool) -> None:
    assume(len(set(rewards)) > 1)
    count = len(rewards)
    learning = Learning(leave_one_out=leave_one_out)
    advantages, found = some("entropic", rewards, learning), figures(rewards, learning)
    assert all(-1 <= advantage <= count - 1 for advantage in advantages)
    assert 1 - 1e-9 <= found["ess"] <= count + 1e-9
    if not found["fell_back"]:
        assert found["kl"] == pytest.approx(math.log(2), abs=1e-9)
        # KL is at most the Rényi-2 divergence, ln(K / ESS).
        assert found["ess"] <= count / 2 + 1e-9


@given(GRID, st.floats(0.1, 50))
def test_sharper_is_farther_from_the_uniform(rewards: list[float], sharpness: float) -> None:
    below = [reward - max(rewards) for reward in rewards]
    assert distance(tilted(below, sharpness)) <= distance(tilted(below, 2 * sharpness)) + 1e-9


def test_cloning_keeps_the_best_and_every_prompt_weighs_the_same() -> None:
    assert some("cloning", [0.0, 1.0, 0.5, 0.0]) == [0.0, 4.0, 0.0, 0.0]
    assert some("cloning", [0.0, 1.0, 0.5, 0.0], Learning(best_of=2)) == [0.0, 2.0, 2.0, 0.0]
    assert some("cloning", [1.0, 1.0, 0.5, 0.0]) == [2.0, 2.0, 0.0, 0.0]


def test_cloning_never_copies_what_is_no_better_than_the_mean() -> None:
    assert some("cloning", [1.0, 0.0, 0.0, 0.0], Learning(best_of=3)) == [4.0, 0.0, 0.0, 0.0]
    assert some("cloning", [1.0, 0.0], Learning(best_of=9)) == [2.0, 0.0]


def test_balancing_raises_rare_answers_within_bounds_and_keeps_the_sum() -> None:
    assert balanced([1.0, 1.0, 1.0, 1.0], "aaab") == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    assert balanced([0.0, 3.0], "ab") == (0.0, 3.0)
    assert balanced([0.0, 0.0], "ab") == (0.0, 0.0)
    odd = balanced([1.0] * 100, "a" * 99 + "b")
    assert sum(odd) == pytest.approx(100)
    assert odd[99] / sum(odd[:99]) == pytest.approx(UPLIFT / 50)


def test_dpo_pairs_the_better_with_the_worse_a_margin_apart() -> None:
    assert pairs([1.0, 0.0, 0.5], 0.0) == ((0, 1), (0, 2), (2, 1))
    assert pairs([1.0, 0.0, 0.5], 0.75) == ((0, 1),)
    assert pairs([1.0, 1.0], 0.0) == ()
    assert some("dpo", [1.0, 0.0, 0.5]) == [2.0, -2.0, 0.0]


def test_dpo_has_nothing_to_say_where_no_pair_is_a_margin_apart() -> None:
    nothing = ALGORITHMS["dpo"].weigh([0.5, 0.4], Learning(margin=0.2))
    assert (nothing.advantages, nothing.figures) == (None, {"pairs": 0})


@CENTRED
@given(rewards=GRID)
def test_the_advantages_of_a_group_add_up_to_nothing(name: str, rewards: list[float]) -> None:
    assume(len(set(rewards)) > 1)
    assert fmean(some(name, rewards)) == pytest.approx(0, abs=1e-9)


@EVERY
@given(rewards=GRID)
def test_a_better_reward_never_weighs_less(name: str, rewards: list[float]) -> None:
    assume(len(set(rewards)) > 1)
    ranked = sorted(zip(rewards, some(name, rewards), strict=True))
    assert all(low[1] <= high[1] for low, high in pairwise(ranked))


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"ppo"}))
@given(rewards=GRID, shift=st.integers(-16, 16))
def test_a_shift_of_the_rewards_changes_nothing(name: str, rewards: list[float], shift: int) -> None:
    assume(len(set(rewards)) > 1)
    moved = some(name, [reward + shift for reward in rewards])
    assert moved == pytest.approx(some(name, rewards), abs=1e-9)


@pytest.mark.parametrize("name", ["grpo", "entropic", "cloning", "dpo"])
@given(rewards=GRID, power=st.integers(-3, 6))
def test_the_scale_of_the_rewards_changes_nothing(name: str, rewards: list[float], power: int) -> None:
    assume(len(set(rewards)) > 1)
    scaled = some(name, [reward * 2.0**power for reward in rewards])
    # η is not scaled along: it tells by at most η/std of the smallest spread on the grid.
    assert scaled == pytest.approx(some(name, rewards), rel=0.05 if name == "grpo" else 1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["reinforce", "rloo"])
@given(rewards=GRID, power=st.integers(-3, 6))
def test_the_scale_of_the_rewards_is_that_of_the_advantages(name: str, rewards: list[float], power: int) -> None:
    assume(len(set(rewards)) > 1)
    scaled = some(name, [reward * 2.0**power for reward in rewards])
    assert scaled == pytest.approx([advantage * 2.0**power for advantage in some(name, rewards)], abs=1e-9)


@EVERY
@given(rewards=GRID, seed=st.integers(0, 99))
def test_the_order_of_samples_does_not_matter(name: str, rewards: list[float], seed: int) -> None:
    assume(len(set(rewards)) > 1)
    order = random.Random(seed).sample(range(len(rewards)), len(rewards))
    expected = some(name, rewards)
    assert some(name, [rewards[at] for at in order]) == pytest.approx([expected[at] for at in order], abs=1e-12)
