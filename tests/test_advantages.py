"""Advantages: what a group's rewards say about each of its rollouts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sia_events.trainer.advantages import ALGORITHMS, RewardRefused, group_baseline


def test_a_rollout_is_measured_against_the_mean_of_its_group() -> None:
    assert group_baseline([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert group_baseline([1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]


def test_a_group_of_equal_rewards_teaches_nothing() -> None:
    assert group_baseline([1.0, 1.0, 1.0]) is None
    assert group_baseline([0.3]) is None
    assert group_baseline([]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_finite_number_is_refused(bad: float) -> None:
    with pytest.raises(RewardRefused, match="Reward 1 of 2"):
        group_baseline([0.0, bad])


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=16))
def test_advantages_add_up_to_nothing_and_keep_the_order_of_the_rewards(rewards: list[float]) -> None:
    advantages = group_baseline(rewards)
    if advantages is None:
        assert len(set(rewards)) == 1
        return
    assert abs(sum(advantages)) <= 1e-9 * max(map(abs, rewards)) * len(rewards) + 1e-12
    for one, other in zip(range(len(rewards)), range(1, len(rewards)), strict=False):
        if rewards[one] > rewards[other]:
            assert advantages[one] >= advantages[other]


def test_the_table_names_the_algorithm_as_events_do() -> None:
    assert ALGORITHMS["reinforce"] is group_baseline
