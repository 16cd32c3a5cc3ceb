"""The loop's policy, event by event."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from given import given, recorded
from story import (
    ACCEPTED,
    FIRST,
    OPENING,
    SECOND,
    accepted,
    asked,
    failed,
    fed_back,
    feedback_asked,
    logged,
    patched,
    proposed,
    registered,
    scored,
    started,
    trained,
)

from sia_events.feedback_svc.algorithm import KL_TO_BASE, Signal
from sia_events.feedback_svc.lever import choose_lever
from sia_events.feedback_svc.service import feedback_svc
from sia_events.shared.events import (
    AttemptRequested,
    Comparison,
    Event,
    ExecutionLogged,
    FeedbackRequested,
    HarnessPatchRequested,
    Learning,
    ProposalFailed,
    RunFinished,
    VersionAccepted,
    VersionRejected,
    Weights,
    WeightsUpdated,
    WeightUpdateRequested,
)
from sia_events.shared.run import fold
from sia_events.target_runner.service import target_runner

D = "a" * 64
RIGHT, WRONG = "1" * 40, "0" * 40


def test_every_new_version_owes_the_dev_split_first():
    given(target_runner, *OPENING[:2]).when(proposed()).then(asked("g0a", "dev"))
    given(target_runner, *ACCEPTED).when(patched("g1a")).then(asked("g1a", "dev"))
    given(target_runner, *ACCEPTED).when(trained("g1a", "g0a")).then(asked("g1a", "dev"))


def test_what_the_platform_broke_is_tried_again_and_then_no_more():
    past = (*OPENING, asked("g0a", "dev"))
    given(target_runner, *past).when(failed("g0a", "dev", "infrastructure")).then(asked("g0a", "dev", tries=1))
    last = (*past, failed("g0a", "dev", "infrastructure"), asked("g0a", "dev", tries=1), asked("g0a", "dev", tries=2))
    given(target_runner, *last).when(failed("g0a", "dev", "infrastructure", tries=2)).then()


def test_what_the_candidate_broke_is_not_tried_again():
    given(target_runner, *OPENING, asked("g0a", "dev")).when(failed("g0a", "dev", "crash")).then()


def test_the_first_agent_meets_the_gate_alone_and_is_accepted():
    given(feedback_svc, *FIRST[:-2]).when(scored("g0a", "dev", "1000")).then(asked("g0a", "gate"))
    given(feedback_svc, *FIRST, logged("g0a", "gate")).when(scored("g0a", "gate", "10000000")).then(
        VersionAccepted(version="g0a", over=None, comparison=None, reason="the first agent")
    )


def test_a_run_whose_first_agent_does_not_run_ends_as_failed():
    past = (*OPENING, asked("g0a", "dev"))
    rejected = given(feedback_svc, *past).when(failed("g0a", "dev")).then_types(VersionRejected)[0]
    end = given(feedback_svc, *past, failed("g0a", "dev")).when(rejected).then_types(RunFinished)[0]
    assert isinstance(end, RunFinished) and end.outcome == "failed" and "boom" in end.reason


def test_the_dev_round_waits_for_every_candidate():
    given(feedback_svc, *SECOND).when(scored("g1a", "dev", "1100")).then()


def test_the_best_on_dev_meets_the_gate_and_the_others_are_out():
    past = (*SECOND, scored("g1a", "dev", "1100"))
    out, gate = (
        given(feedback_svc, *past).when(scored("g1b", "dev", "1110")).then_types(VersionRejected, AttemptRequested)
    )
    assert isinstance(out, VersionRejected) and out.version == "g1a"
    assert gate == asked("g1b", "gate")


def test_a_tie_on_dev_goes_to_the_first():
    past = (*SECOND, scored("g1a", "dev", "1100"))
    out, gate = (
        given(feedback_svc, *past).when(scored("g1b", "dev", "0011")).then_types(VersionRejected, AttemptRequested)
    )
    assert gate == asked("g1a", "gate") and isinstance(out, VersionRejected)


def test_a_failed_candidate_is_out_and_the_other_goes_on():
    past = (*SECOND, scored("g1a", "dev", "1100"))
    out, gate = given(feedback_svc, *past).when(failed("g1b", "dev")).then_types(VersionRejected, AttemptRequested)
    assert isinstance(out, VersionRejected) and out.version == "g1b" and gate == asked("g1a", "gate")


def test_a_plainly_worse_candidate_gets_no_look_at_the_gate():
    past = [replace_items(e, RIGHT) for e in ACCEPTED]
    past += [feedback_asked(1), fed_back(1), patched("g1a"), asked("g1a", "dev")]
    given(feedback_svc, *past).when(scored("g1a", "dev", WRONG)).then_types(VersionRejected)


def replace_items(event: Any, items: str) -> Any:
    return scored(event.version, event.split, items) if type(event).__name__ == "Scored" else event


def gate_round(candidate: str, **settings: Any) -> given:
    past = [replace_items(e, WRONG) for e in ACCEPTED]
    past[1] = started(**settings)
    past += [
        feedback_asked(1),
        fed_back(1),
        patched("g1a"),
        asked("g1a", "dev"),
        scored("g1a", "dev", candidate),
        asked("g1a", "gate"),
    ]
    return given(feedback_svc, *past)


def test_the_gate_accepts_a_real_gain():
    event = gate_round(RIGHT).when(scored("g1a", "gate", RIGHT)).then_types(VersionAccepted)[0]
    assert (
        isinstance(event, VersionAccepted) and event.comparison and event.comparison.gain == 1 and event.over == "g0a"
    )


def test_the_gate_refuses_a_gain_that_may_be_luck():
    lucky = "111" + "0" * 37
    event = gate_round(lucky).when(scored("g1a", "gate", lucky)).then_types(VersionRejected)[0]
    assert isinstance(event, VersionRejected) and event.comparison and event.comparison.gain > 0


def test_a_tie_changes_nothing():
    gate_round(WRONG).when(scored("g1a", "gate", WRONG)).then_types(VersionRejected)


def test_the_error_allowed_is_shared_by_all_generations():
    seven = "1" * 7 + "0" * 33  # exact p = 2 / 2^7 = 0.0156
    gate_round(seven, generations=2).when(scored("g1a", "gate", seven)).then_types(VersionAccepted)
    gate_round(seven, generations=10).when(scored("g1a", "gate", seven)).then_types(VersionRejected)


def test_what_fails_behind_the_end_of_a_run_asks_for_nothing():
    end = RunFinished(outcome="failed", best="g0a", sealed=None, reason="one sealed test failed")
    past = (*SECOND, accepted("g1b", "g0a"), asked("g0a", "test"), asked("g1b", "test"), failed("g0a", "test"), end)
    given(feedback_svc, *past).when(failed("g1b", "test")).then()
    given(target_runner, *past).when(failed("g1b", "test", "infrastructure")).then()


def less_is_better(*past: Any, incumbent: str = RIGHT) -> given:
    """The past, on a task whose metric is to be small; `incumbent` are the first agent's scores."""
    opening = [replace_items(e, incumbent) for e in ACCEPTED]
    return given(feedback_svc, registered(maximize=False), *opening[1:], feedback_asked(1), fed_back(1), *past)


def test_where_less_is_better_the_lowest_on_dev_meets_the_gate():
    past = (patched("g1a"), patched("g1b"), scored("g1a", "dev", RIGHT))
    lower = "1" * 39 + "0"
    _, gate = less_is_better(*past).when(scored("g1b", "dev", lower)).then_types(VersionRejected, AttemptRequested)
    assert gate == asked("g1b", "gate")


def test_where_less_is_better_the_plainly_higher_gets_no_look_at_the_gate():
    asking = less_is_better(patched("g1a"), incumbent=WRONG).when(scored("g1a", "dev", RIGHT))
    (out,) = asking.then_types(VersionRejected)
    assert isinstance(out, VersionRejected) and "worse than g0a on dev by 1.000" in out.reason


@pytest.mark.parametrize(("candidate", "kind"), [(WRONG, VersionAccepted), ("0" + "1" * 39, VersionRejected)])
def test_where_less_is_better_the_gate_asks_for_a_proven_drop(candidate: str, kind: type[Event]):
    past = (patched("g1a"), scored("g1a", "dev", candidate), asked("g1a", "gate"))
    (verdict,) = less_is_better(*past).when(scored("g1a", "gate", candidate)).then_types(kind)
    assert isinstance(verdict, VersionAccepted | VersionRejected) and verdict.comparison
    assert verdict.comparison.gain == pytest.approx(candidate.count("0") / 40)


@pytest.mark.parametrize(("first", "outcome"), [(RIGHT, "improved"), ("0" * 39 + "1", "no proven gain")])
def test_where_less_is_better_the_sealed_test_proves_a_drop(first: str, outcome: str):
    past = (patched("g1a"), accepted("g1a", "g0a"), scored("g0a", "test", first))
    (end,) = less_is_better(*past).when(scored("g1a", "test", WRONG)).then_types(RunFinished)
    assert isinstance(end, RunFinished) and end.outcome == outcome and end.sealed
    assert end.sealed.final.value < end.sealed.first.value and end.sealed.comparison.gain > 0


def test_where_less_is_better_a_lever_that_brought_a_drop_has_gained():
    past = (patched("g1a"), scored("g1a", "dev", WRONG), asked("g1a", "gate"), scored("g1a", "gate", WRONG))
    (verdict,) = less_is_better(*past[:-1]).when(past[-1]).then_types(VersionAccepted)
    story = less_is_better(*past).past
    records = recorded(*story, verdict, feedback_asked(2, "g1a"))
    choice = choose_lever(fold(records), records, Signal())
    assert choice.evidence.last_harness_gain == 1.0


def test_a_closed_generation_asks_for_feedback():
    given(feedback_svc, *ACCEPTED[:-1]).when(accepted("g0a")).then(FeedbackRequested(generation=1, incumbent="g0a"))


def test_a_verdict_of_a_generation_still_open_asks_for_nothing():
    rejected = VersionRejected(version="g1a", over="g0a", comparison=None, reason="not the best")
    given(feedback_svc, *SECOND, scored("g1a", "dev", "0000"), scored("g1b", "dev", "1111")).when(rejected).then()


def test_the_last_generation_opens_the_sealed_test_for_first_and_final():
    past = (*SECOND, feedback_asked(2, "g1a"), fed_back(2, incumbent="g1a"), patched("g2a", "g1a"))
    past = tuple(e for e in past if getattr(e, "version", "") != "g1b")
    verdict = accepted("g1a", "g0a")
    rejected = VersionRejected(version="g2a", over="g1a", comparison=None, reason="no gain")
    given(feedback_svc, *past[:-3], verdict, *past[-3:]).when(rejected).then(asked("g0a", "test"), asked("g1a", "test"))


def test_a_generation_without_a_candidate_is_closed_too():
    barren = ProposalFailed(generation=1, parent="g0a", lever="harness", reason="used up")
    given(feedback_svc, *ACCEPTED, feedback_asked(1), fed_back(1)).when(barren).then(
        FeedbackRequested(generation=2, incumbent="g0a")
    )


def test_the_harness_lever_asks_for_patches():
    given(feedback_svc, *ACCEPTED, feedback_asked(1)).when(fed_back(1)).then(
        HarnessPatchRequested(generation=1, parent="g0a", candidates=2, seed=0)
    )


def test_the_weights_lever_asks_for_rollouts_and_then_for_learning():
    settings = fold(recorded(*ACCEPTED)).settings
    rollout = asked(
        "g0a", "train", items=settings.rollout_items, samples=settings.rollout_samples, seed=1, attempt="g0a.train.g1"
    )
    past = (*ACCEPTED, feedback_asked(1))
    given(feedback_svc, *past).when(fed_back(1, "weights")).then(rollout)
    ran = logged("g0a", "train").model_copy(update={"attempt": "g0a.train.g1"})
    event = (
        given(feedback_svc, *past, fed_back(1, "weights"), rollout, ran)
        .when(scored("g0a", "train", "10", attempt="g0a.train.g1", rewards=D))
        .then_types(WeightUpdateRequested)[0]
    )
    assert isinstance(event, WeightUpdateRequested) and event.trajectory == D and event.parent == "g0a"
    assert event.algorithm == "reinforce" and event.older == ()
    assert event.learning == settings.learning.model_copy(update={"kl": KL_TO_BASE})


def learning(*past: Event, version: str = "g0a", picked: str = "grpo", **settings: Any) -> WeightUpdateRequested:
    """What is asked of the trainer behind `past`, once `version` has rollouts of generation 9."""
    attempt = f"{version}.train.g9"
    event = (
        given(
            feedback_svc,
            registered(),
            started(**settings),
            proposed(),
            *past,
            feedback_asked(9, version),
            fed_back(9, "weights", version, algorithm=picked),
            asked(version, "train", attempt=attempt),
            logged(version, "train").model_copy(update={"attempt": attempt}),
        )
        .when(scored(version, "train", "10", attempt=attempt, rewards=D))
        .then_types(WeightUpdateRequested)[0]
    )
    assert isinstance(event, WeightUpdateRequested)
    return event


def test_the_algorithm_that_feedback_picked_learns_under_the_runs_settings():
    settings = Learning(lr=1e-4, kl=0.3)
    for algorithm in ("grpo", "reinforce"):
        event = learning(picked=algorithm, learning=settings)
        assert (event.algorithm, event.learning) == (algorithm, settings)


def test_reinforce_is_held_near_the_base_model_where_it_was_picked_and_not_set():
    kl = [learning(picked=picked, algorithm="auto").learning.kl for picked in ("reinforce", "grpo")]
    assert kl == [KL_TO_BASE, 0.0]
    assert learning(picked="reinforce", algorithm="auto", learning=Learning(kl=0.5)).learning.kl == 0.5
    assert learning(picked="reinforce", algorithm="reinforce").learning.kl == 0


def rollouts(version: str, generation: int) -> list[Event]:
    """A train attempt of a version, scored."""
    attempt = f"{version}.train.g{generation}"
    return [
        asked(version, "train", attempt=attempt),
        logged(version, "train").model_copy(update={"attempt": attempt, "trajectory": digest(attempt)}),
        scored(version, "train", "10", attempt=attempt, rewards=D),
    ]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def adapted(version: str, parent: str, harness: str = D) -> WeightsUpdated:
    return trained(version, parent, harness=harness, weights=Weights(model="local/m", adapter=digest(version)))


def lags(event: WeightUpdateRequested) -> list[tuple[str, int]]:
    assert all(source.trajectory == digest(source.attempt) and source.rewards == D for source in event.older)
    return [(source.attempt, source.lag) for source in event.older]


def test_rollouts_of_up_to_so_many_adapters_back_are_learned_from_too():
    past = [*rollouts("g0a", 1), adapted("g1a", "g0a"), *rollouts("g1a", 2), adapted("g2a", "g1a")]
    past += rollouts("g2a", 3)
    asked_for = [lags(learning(*past, version="g2a", learning=Learning(max_lag=most))) for most in (0, 1, 2, 9)]
    two = [("g2a.train.g3", 0), ("g1a.train.g2", 1)]
    assert asked_for == [[], two, [*two, ("g0a.train.g1", 2)], [*two, ("g0a.train.g1", 2)]]


def test_rollouts_of_another_harness_are_no_older_ones_and_another_harness_is_no_lag():
    other = "c" * 64
    past = [*rollouts("g0a", 1), adapted("g1a", "g0a"), *rollouts("g1a", 2)]
    past.append(patched("g2a", "g1a", harness=other, weights=Weights(model="local/m", adapter=digest("g1a"))))
    past += [*rollouts("g2a", 3), adapted("g3a", "g2a", other)]
    assert lags(learning(*past, version="g3a", learning=Learning(max_lag=5))) == [("g2a.train.g3", 1)]
    back = patched("g4a", "g3a", weights=Weights(model="local/m", adapter=digest("g3a")))
    assert lags(learning(*past, back, version="g4a", learning=Learning(max_lag=1))) == [("g1a.train.g2", 1)]


def test_rollouts_of_versions_that_are_no_ancestors_are_left_out():
    past = [*rollouts("g0a", 1), adapted("g1a", "g0a"), adapted("g2a", "g0a"), *rollouts("g2a", 3)]
    assert lags(learning(*past, version="g1a", learning=Learning(max_lag=3))) == [("g0a.train.g1", 1)]


def test_rollouts_that_fail_leave_the_generation_barren():
    past = (*ACCEPTED, feedback_asked(1), fed_back(1, "weights"), asked("g0a", "train"))
    given(feedback_svc, *past).when(failed("g0a", "train")).then_types(ProposalFailed)


def sealed_test(final_items: str) -> RunFinished:
    past = (*SECOND, accepted("g1b", "g0a"), asked("g0a", "test"), asked("g1b", "test"), scored("g0a", "test", WRONG))
    given(feedback_svc, *past[:-1]).when(scored("g0a", "test", WRONG)).then()
    event = given(feedback_svc, *past).when(scored("g1b", "test", final_items)).then_types(RunFinished)[0]
    assert isinstance(event, RunFinished)
    return event


def test_the_run_ends_with_the_sealed_scores_of_first_and_final():
    end = sealed_test(RIGHT)
    assert end.outcome == "improved" and end.best == "g1b" and end.sealed
    assert (end.sealed.first.value, end.sealed.final.value) == (0, 1) and end.sealed.comparison.p_value < 0.001


def test_a_run_without_a_proven_gain_says_so():
    end = sealed_test(WRONG)
    assert end.outcome == "no proven gain" and "no gain could be shown" in end.reason


def test_a_sealed_test_that_fails_ends_the_run_as_failed():
    past = (*ACCEPTED, asked("g0a", "test"))
    end = given(feedback_svc, *past).when(failed("g0a", "test", "timeout")).then_types(RunFinished)[0]
    assert isinstance(end, RunFinished) and end.outcome == "failed"


def took(version: str, seconds: float, usd: float) -> ExecutionLogged:
    return logged(version, "dev").model_copy(update={"seconds": seconds, "usd": usd})


def lever_after(
    *levers_and_gains: tuple[str, float | None],
    policy: str = "auto",
    generations: int = 9,
    prices: Mapping[str, tuple[float, float]] | None = None,
    **dev: Any,
) -> Any:
    """The lever chosen behind generations that pulled these levers and gained this much (None: refused).

    `prices` has what dev took of a candidate by each lever, in seconds and in dollars.
    """
    past: list[Any] = [registered(), started(lever=policy, generations=generations), proposed(), asked("g0a", "dev")]
    past += [
        scored("g0a", "dev", "1100", **dev),
        asked("g0a", "gate"),
        scored("g0a", "gate", "10000000"),
        accepted("g0a"),
    ]
    incumbent = "g0a"
    for generation, (lever, gain) in enumerate(levers_and_gains, start=1):
        name = f"g{generation}a"
        made = patched(name, incumbent) if lever == "harness" else trained(name, incumbent)
        past += [
            feedback_asked(generation, incumbent),
            fed_back(generation, lever, incumbent),
            made,
            asked(name, "dev"),
            *([took(name, *prices[lever])] if prices else []),
            scored(name, "dev", "1100", **dev),
        ]
        if gain is None:
            past.append(VersionRejected(version=name, over=incumbent, comparison=None, reason="no"))
        else:
            comparison = Comparison(gain=gain, low=gain, high=gain, p_value=0.001, n=8, better=1, worse=0)
            past.append(VersionAccepted(version=name, over=incumbent, comparison=comparison, reason="yes"))
            incumbent = name
    past.append(feedback_asked(len(levers_and_gains) + 1, incumbent))
    records = recorded(*past)
    return choose_lever(fold(records), records, Signal())


def test_the_harness_is_turned_first_because_edits_are_cheap():
    assert lever_after().lever == "harness"


def test_the_harness_goes_on_while_it_pays():
    assert lever_after(("harness", 0.4)).lever == "harness"


@pytest.mark.parametrize("gain", [None, 0.01])
def test_a_plateau_of_the_harness_turns_to_the_weights(gain: float | None):
    choice = lever_after(("harness", 0.4), ("harness", gain))
    assert choice.lever == "weights" and "plateau" in choice.reasons[0]
    assert choice.evidence.last_harness_gain == (gain or 0.0) and choice.evidence.harness_tries == 2


def test_the_last_generation_tries_the_lever_that_was_never_tried():
    assert lever_after(("harness", 0.4), generations=2).lever == "weights"


def test_weights_that_stall_turn_back_to_the_harness():
    assert lever_after(("harness", None), ("weights", None)).lever == "harness"
    assert lever_after(("harness", None), ("weights", 0.2)).lever == "weights"


@pytest.mark.parametrize("gain", [0.2, 0.01], ids=["both pay", "neither pays"])
@pytest.mark.parametrize(
    ("harness", "weights", "lever"),
    [
        ((10.0, 0.0), (90.0, 0.0), "harness"),
        ((90.0, 0.0), (10.0, 0.0), "weights"),
        ((10.0, 5.0), (90.0, 1.0), "weights"),
        ((10.0, 5.0), (90.0, 0.0), "harness"),
    ],
    ids=["seconds", "other seconds", "dollars before seconds", "free but for its seconds"],
)
def test_of_levers_that_both_pay_or_neither_the_one_that_gained_more_for_its_price_is_pulled(
    harness: tuple[float, float], weights: tuple[float, float], lever: str, gain: float
):
    prices = {"harness": harness, "weights": weights}
    tried = [("harness", gain), ("weights", gain)]
    for past in (tried, tried[::-1]):
        choice = lever_after(*past, prices=prices)
        assert choice.lever == lever and "more for its price" in choice.reasons[0], past


def test_a_price_is_no_reason_where_one_lever_pays_and_the_other_does_not_or_nothing_was_gained():
    dear_harness = {"harness": (900.0, 0.0), "weights": (1.0, 0.0)}
    assert lever_after(("weights", 0.01), ("harness", 0.2), prices=dear_harness).lever == "harness"
    assert lever_after(("harness", None), ("weights", None), prices=dear_harness).lever == "harness"
    assert "price" not in lever_after(("harness", 0.2), prices=dear_harness).reasons[0]


def test_many_invalid_answers_keep_the_harness_lever():
    for past in ([], ["harness"], ["harness", "harness", "weights"], ["harness", "harness", "weights", "harness"]):
        choice = lever_after(*((lever, None) for lever in past), failures={"invalid": 2, "unanswered": 1})
        assert choice.lever == "harness" and "75% of dev answers are missing or invalid" in choice.reasons[0], past
    assert choice.evidence.invalid_rate == 0.75


def test_two_tries_of_the_harness_in_vain_and_the_weights_have_their_turn_however_many_answers_are_invalid():
    for past in (["harness"] * 2, ["harness", "harness", "weights", "harness", "harness"]):
        assert lever_after(*((lever, None) for lever in past), failures={"invalid": 3}).lever == "weights", past


def test_few_invalid_answers_are_no_reason():
    assert "invalid" not in lever_after(failures={"wrong": 4}).reasons[0]


def test_the_controls_ignore_the_evidence():
    assert [lever_after(policy=p).lever for p in ("harness", "weights")] == ["harness", "weights"]
    assert lever_after(policy="alternate").lever == "harness"
    assert lever_after(("harness", 0.4), policy="alternate").lever == "weights"
    drawn = [lever_after(*[("harness", None)] * tries, policy="random").lever for tries in range(8)]
    assert set(drawn) == {"harness", "weights"}
    assert drawn == [lever_after(*[("weights", 0.5)] * tries, policy="random").lever for tries in range(8)]


def test_an_earlier_state_is_not_changed_by_a_later_record():
    records = recorded(*ACCEPTED)
    before = fold(records[:-1])
    copy = replace(before)
    fold(records[-1:], before)
    assert before == copy and before.incumbent is None
