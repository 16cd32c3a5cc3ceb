"""Which algorithm is picked on which figures, and that the figures are those of the log."""

from typing import Any, get_args

import pytest
from given import recorded
from hypothesis import given as any_
from hypothesis import strategies as st
from story import (
    ACCEPTED,
    accepted,
    asked,
    failed,
    fed_back,
    feedback_asked,
    logged,
    patched,
    registered,
    scored,
    trained,
)
from test_prompts import call

from sia_events.feedback_svc.algorithm import TRIGGERS, WITHOUT_LOGPROBS, Signal, carry_logprobs, offered, pick
from sia_events.feedback_svc.lever import choose_lever, gather, histogram, skewness, worthless
from sia_events.shared.events import Algorithm, Event, Evidence, Learning, RunSettings, WeightsUpdated
from sia_events.shared.record import Record
from sia_events.shared.run import fold

AUTO = RunSettings(algorithm="auto")
GRADES = [0.0, 0.35, 0.5, 0.65] * 10
NONE, SOME, FEW, MOST = [0.0] * 39 + [1.0], [0.0, 1.0] * 20, [0.0] * 35 + [1.0] * 5, [1.0] * 37 + [0.0] * 3

# Of how many times as fast as the reference kernels are: none right but one, and all right with one far ahead.
ZEROS, SPEEDS = [0.0] * 39 + [7.0], [1.0 + k / 100 for k in range(31)] + [10.0]


def seen(rewards: list[float], calls: float = 1.0, maximize: bool = True) -> Evidence:
    return Evidence(
        incumbent="g0a",
        dev_score=0.5,
        invalid_rate=0,
        skew=0,
        last_harness_gain=None,
        last_weights_gain=None,
        harness_tries=0,
        weights_tries=0,
        generations_left=1,
        rewards=histogram(rewards, maximize),
        reward_mean=sum(rewards) / len(rewards) if rewards else None,
        reward_skew=skewness(rewards),
        calls_an_item=calls,
    )


@pytest.mark.parametrize(
    ("rewards", "maximize", "share"),
    [
        ([], True, None),
        ([0.0, 0.09, 0.1, 1.0], True, 0.5),
        ([-1.0, -0.95, -0.9, 0.0], False, 0.5),
        ([1.0, 1.0, 1.0, 12.0], True, 0.75),
        ([1.0, 1.1, 1.2, 12.0], True, 0.25),
        ([7.0, 7.0], True, None),
    ],
)
def test_worthless_are_the_lowest_tenth_of_usual_scores_and_the_least_of_others(
    rewards: list[float], maximize: bool, share: float | None
):
    assert worthless(rewards, maximize) == share


STEPWISE = RunSettings(algorithm="auto", learning=Learning(credit="per-step"))


@pytest.mark.parametrize(
    ("algorithm", "settings", "evidence", "signal", "why"),
    [
        ("grpo", AUTO, seen(SOME), Signal(), "1.0 calls an item, rewarded at the end"),
        ("grpo", AUTO, seen(SOME, 3), Signal(), "3.0 calls an item, rewarded at the end"),
        ("grpo", STEPWISE, seen(SOME, 1), Signal(), "rewarded at the end"),
        ("grpo", AUTO, seen([]), Signal(), "rewarded at the end"),
        ("ppo", AUTO, seen(GRADES, 3), Signal(), "75% of dev rewards are graded, and earned over 3.0 calls an item"),
        ("ppo", AUTO, seen([1.0, 4.0, 5.0, 9.0], 2), Signal(), "50% of dev rewards are graded"),
        ("grpo", AUTO, seen(GRADES, 1), Signal(), "1.0 calls an item, rewarded at the end"),
        ("grpo", AUTO, seen([1.0, 4.0, 9.0], 3), Signal(), "3.0 calls an item, rewarded at the end"),
        ("ppo", STEPWISE, seen(SOME, 3), Signal(), "3.0 calls an item, each credited for itself"),
        ("entropic", AUTO, seen(FEW), Signal(), "right-skewed, +2.27"),
        ("entropic", AUTO, seen([1.0] * 20 + [9.0, 30.0]), Signal(), "right-skewed"),
        ("cloning", AUTO, seen(NONE), Signal(), "98% of dev rewards are as good as none"),
        ("cloning", AUTO, seen(NONE), Signal(logprobs=False), "as good as none"),
        ("cloning", AUTO, seen(ZEROS), Signal(worthless=worthless(ZEROS)), "98% of dev rewards are as good as none"),
        ("entropic", AUTO, seen(SPEEDS), Signal(worthless=worthless(SPEEDS)), "right-skewed, +5.36"),
        ("dpo", AUTO, seen(SOME), Signal(logprobs=False), "no log-probs"),
        ("dpo", AUTO, seen(MOST), Signal(ranked=True), "ranks attempts"),
        ("reinforce", AUTO, seen(MOST), Signal(), "92% of dev rewards are in the highest tenth"),
    ],
)
def test_a_trigger_that_holds_picks_its_algorithm(
    algorithm: str, settings: RunSettings, evidence: Evidence, signal: Signal, why: str
):
    picked = pick(settings, evidence, signal)
    assert picked.algorithm == algorithm and why in picked.reasons[0]


def test_credit_a_call_is_said_to_be_idle_where_whole_attempts_are_compared():
    for signal in (Signal(ranked=True), Signal(logprobs=False)):
        assert "learning.credit is idle" in pick(STEPWISE, seen(SOME, 3), signal).reasons[-1]
        assert len(pick(AUTO, seen(SOME, 3), signal).reasons) == 1


@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_an_algorithm_that_is_set_wins_over_every_trigger(algorithm: Any):
    settings = RunSettings(algorithm=algorithm)
    picked = pick(settings, seen(NONE), Signal(ranked=True, logprobs=False))
    assert (picked.algorithm, picked.reasons) == (algorithm, ())
    assert list(offered(settings, Signal())) == [algorithm]


def test_every_algorithm_is_offered_and_without_logprobs_those_that_need_none():
    assert set(offered(AUTO, Signal())) == set(TRIGGERS) == set(get_args(Algorithm))
    assert tuple(offered(AUTO, Signal(logprobs=False))) == WITHOUT_LOGPROBS


@any_(st.lists(st.floats(-1e9, 1e9)), st.booleans(), st.booleans(), st.sampled_from([AUTO, STEPWISE]))
def test_some_algorithm_is_picked_whatever_was_seen_and_it_is_one_that_is_offered(
    rewards: list[float], ranked: bool, logprobs: bool, settings: RunSettings
):
    signal = Signal(ranked, logprobs)
    picked = pick(settings, seen(rewards, 2.0), signal)
    assert picked.algorithm in offered(settings, signal) and picked.reasons


def test_a_histogram_has_ten_equal_bins_of_the_usual_range_or_of_what_there_is():
    assert histogram([0.0, 0.05, 0.1, 0.95, 1.0]) == (2, 1, 0, 0, 0, 0, 0, 0, 0, 2)
    assert histogram([-1.0, 0.0]) == (1, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    assert histogram([10.0, 14.0, 20.0]) == (1, 0, 0, 0, 1, 0, 0, 0, 0, 1)
    assert histogram([1.0, 1.0]) == (0, 0, 0, 0, 0, 0, 0, 0, 0, 2)
    assert histogram([7.0, 7.0]) == histogram([]) == ()


def test_a_histogram_of_scores_turned_round_has_its_best_at_nought():
    perfect = [-0.0] * 20
    assert histogram(perfect, maximize=False) == (0, 0, 0, 0, 0, 0, 0, 0, 0, 20)
    assert pick(AUTO, seen(perfect, maximize=False), Signal()).algorithm == "reinforce", "and not cloning"
    assert histogram([-1.0] * 20, maximize=False) == (20, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    assert histogram([-3.0, -2.0], maximize=False) == (1, 0, 0, 0, 0, 0, 0, 0, 0, 1)


def test_a_score_between_two_bins_is_in_the_upper_one_however_it_is_rounded():
    assert histogram([-0.9, -0.8, -0.7, -0.6, -0.4]) == (0, 1, 1, 1, 1, 0, 1, 0, 0, 0)


@any_(st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_a_histogram_counts_every_reward_once(rewards: list[float]):
    assert sum(histogram(rewards)) in (len(rewards), 0)


def test_skewness_is_the_third_standardised_moment():
    # One right of n: (1 - 2p) / sqrt(p (1 - p)) with p = 1/n.
    assert skewness([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.5 / (0.25 * 0.75) ** 0.5, abs=1e-6)
    assert skewness([1.0, 2.0, 3.0]) == 0 and skewness([4.0, 4.0]) is None and skewness([]) is None


@any_(st.lists(st.floats(-1e6, 1e6), min_size=2), st.sampled_from([1e-200, 1e-3, 1e3, 1e100]))
def test_skewness_has_no_scale_and_turns_with_its_sign(rewards: list[float], scale: float):
    one, scaled, turned = (skewness([factor * reward for reward in rewards]) for factor in (1.0, scale, -1.0))
    assert (one is None) == (turned is None)
    if one is not None and turned is not None:
        assert turned == pytest.approx(-one, abs=1e-5)
    if one is not None and scaled is not None and scale >= 1:
        assert scaled == pytest.approx(one, abs=1e-5)


def later(**settings: Any) -> list[Record]:
    """A run with a generation of each lever behind it: two harness attempts, rollouts and a trained version's dev."""
    past = [*ACCEPTED, feedback_asked(1), fed_back(1), patched("g1a"), asked("g1a", "dev"), logged("g1a", "dev")]
    past += [scored("g1a", "dev", "1100"), logged("g1a", "gate"), accepted("g1a", "g0a")]
    past += [feedback_asked(2, "g1a"), fed_back(2, "weights", "g1a"), logged("g1a", "train")]
    past += [trained("g2a", "g1a", seconds=5.0), logged("g2a", "dev"), accepted("g2a", "g1a")]
    dev = scored("g2a", "dev", "1110", failures={"wrong": 1})
    return recorded(*past, dev, feedback_asked(3, "g2a"))


def test_evidence_is_figures_of_the_log():
    records = later()
    evidence = gather(fold(records), records)
    assert evidence.rewards == (1, 0, 0, 0, 0, 0, 0, 0, 0, 3) and evidence.reward_mean == 0.75
    assert evidence.failures == {"wrong": 1} and evidence.calls_an_item == 2.0
    assert evidence.reward_skew == pytest.approx(-0.5 / (0.25 * 0.75) ** 0.5, abs=1e-6)
    assert evidence.seconds_of == {"harness": 2.0, "weights": 7.0}, "dev and gate; rollouts, learning and dev"
    assert evidence.usd_of == {"harness": 0.0, "weights": 0.0}
    assert gather(fold(records), records) == evidence == Evidence.model_validate_json(evidence.model_dump_json())


def rolled_out(*rollouts: Event, **task: Any) -> Evidence:
    """The evidence behind a generation of the weights in which nothing came of those rollouts of the first version."""
    past = [registered(**task), *ACCEPTED[1:], feedback_asked(1), fed_back(1, "weights"), *rollouts, feedback_asked(2)]
    records = recorded(*past)
    return gather(fold(records), records)


def test_rewards_are_those_of_the_rollouts_where_the_incumbent_has_some():
    rewards = rolled_out(logged("g0a", "train"), scored("g0a", "train", "11011011"))
    assert (rewards.rewards_of, rewards.rewards) == ("train", (2, 0, 0, 0, 0, 0, 0, 0, 0, 6))
    assert rewards.reward_mean == 0.75 and rewards.dev_score == 0.25 and rewards.calls_an_item == 2.0
    picked = pick(AUTO, rewards.model_copy(update={"rewards": (39,) + (0,) * 8 + (1,)}), Signal())
    assert picked.reasons[0].startswith("98% of train rewards")
    assert rolled_out(failed("g0a", "train")).rewards_of == "dev"


def test_where_whole_attempts_are_rollouts_each_of_them_has_one_reward_and_what_was_refused_the_least():
    rollouts: list[Event] = []
    for place, items in enumerate(("01", "11", None)):
        name = f"g0a.train.g1.{place}"
        rollouts.append(asked("g0a", "train", attempt=name, group="g0a.train.g1"))
        rollouts.append(logged("g0a", "train").model_copy(update={"attempt": name}))
        refused = failed("g0a", "train", "invalid_output").model_copy(update={"attempt": name})
        rollouts.append(scored("g0a", "train", items, attempt=name) if items else refused)
    seen_there = rolled_out(*rollouts, whole=True)
    assert seen_there.rewards == (1, 0, 0, 0, 0, 1, 0, 0, 0, 1) and seen_there.reward_mean == 0.5
    assert seen_there.calls_an_item == 8.0, "an attempt's, which is one rollout"


def test_what_a_lever_paid_is_unknown_as_soon_as_one_price_is():
    records = later()
    unpriced = logged("g1a", "gate").model_copy(update={"usd": None})
    past = [unpriced if e.event == logged("g1a", "gate") else e.event for e in records]
    records = recorded(*past)
    assert gather(fold(records), records).usd_of == {"harness": None, "weights": 0.0}


def test_what_learning_is_worth_in_dollars_is_part_of_what_the_weights_paid():
    past = [e.event for e in later()]
    learned = next(place for place, event in enumerate(past) if isinstance(event, WeightsUpdated))
    past[learned] = trained("g2a", "g1a", seconds=5.0, usd=0.25)
    records = recorded(*past)
    assert gather(fold(records), records).usd_of == {"harness": 0.0, "weights": 0.25}


def test_where_less_is_better_rewards_are_the_scores_turned_round():
    past = [registered(maximize=False), *(record.event for record in later()[1:])]
    records = recorded(*past)
    evidence = gather(fold(records), records)
    assert evidence.rewards == (3, 0, 0, 0, 0, 0, 0, 0, 0, 1) and evidence.reward_mean == -0.75


def test_where_less_is_better_an_incumbent_without_errors_has_all_of_its_rewards_in_the_highest_tenth():
    past = [record.event for record in later()]
    past[0] = registered(maximize=False)
    past[-2] = scored("g2a", "dev", "0000", failures={"wrong": 1, "invalid": 1, "unanswered": 1})
    records = recorded(*past)
    evidence = gather(fold(records), records)
    assert evidence.rewards == (0, 0, 0, 0, 0, 0, 0, 0, 0, 4) and evidence.invalid_rate == 0.5


def test_a_choice_of_the_weights_has_the_algorithm_and_its_reasons_and_the_harness_none():
    for lever in ("harness", "weights"):
        past = [record.event for record in later()]
        past[1] = past[1].model_copy(update={"settings": RunSettings(lever=lever, algorithm="auto", generations=9)})
        records = recorded(*past)
        choice = choose_lever(fold(records), records, Signal())
        assert choice.algorithm == ("grpo" if lever == "weights" else None)
        assert len(choice.reasons) == (2 if lever == "weights" else 1)


def test_logprobs_are_looked_for_in_replies_made_for_an_item():
    chat, choice = call(0, "i1", "t", "x"), call(1, "i1", "t", "x", ("x", "y"))
    assert carry_logprobs([choice]) and not carry_logprobs([chat]) and carry_logprobs([chat, choice])
    assert carry_logprobs([]) and carry_logprobs([call(0, None, "t", "x")])


def test_weights_that_are_nobody_s_to_change_here_are_not_chosen_by_rule():
    for model, lever in (("openai/gpt-9", "harness"), ("local/m", "weights")):
        past = list(ACCEPTED)
        past[1] = past[1].model_copy(update={"settings": RunSettings(generations=1, target_model=model)})
        records = recorded(*past, feedback_asked(1))
        choice = choose_lever(fold(records), records, Signal())
        assert choice.lever == lever, "the last generation, and the weights have not been tried"
        assert (model in choice.reasons[0]) == (lever == "harness")
