"""The lever experiment: what its report says on outcomes that are made up here, and a small one on real runs."""

import csv
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
from command import assert_none_left, read, sia, start
from given import recorded
from story import (
    ACCEPTED,
    OPENING,
    SECOND,
    accepted,
    asked,
    fed_back,
    feedback_asked,
    registered,
    scored,
    started,
    trained,
)

from sia_events.cost import Calls
from sia_events.estimate import Estimate, Line
from sia_events.experiment import announced, draw, planned, write
from sia_events.experiment_ends import branch_to_test, to_the_test
from sia_events.experiment_figures import Interval, Outcome, crossed, difference, outcome, score
from sia_events.experiment_report import curves, report, scores_csv, shown
from sia_events.feedback_svc.decide import on_verdict
from sia_events.feedback_svc.search import rollouts
from sia_events.shared.events import (
    AttemptRequested,
    Budget,
    BudgetChanged,
    BudgetExhausted,
    Comparison,
    RunFinished,
    RunSettings,
    Sealed,
    VersionAccepted,
    VersionRejected,
)
from sia_events.shared.run import fold

HEADING = {"task": "made up", "seeds": "0, 1, 2, 3, 4", "budget": "none"}
POLICIES = ("auto", "harness", "weights")


def made_up(policy: str, seed: int, final: Sequence[float], **changes: Any) -> Outcome:
    told = Outcome(
        run=f"x-{policy}-{seed:02d}",
        policy=policy,
        seed=seed,
        tested=True,
        reason="done",
        maximize=True,
        first=(0.0,) * len(final),
        final=tuple(final),
        curve=(0.2, 0.5),
        levers=("harness", "grpo"),
        accepted={"first": 1, "harness": 1},
        calls=100,
        tokens=2000,
        usd=0.0,
        seconds=60.0,
        learning_seconds=5.0,
        code="sia-events 0",
    )
    return replace(told, **changes)


def experiment(shares: dict[str, float], items: int = 400, seeds: int = 5, spread: float = 0.01) -> list[Outcome]:
    """Outcomes whose policies are right on these shares of the items, a little more or less from seed to seed."""
    chance = numpy.random.default_rng(0)
    hard = chance.random(items)
    found: list[Outcome] = []
    for policy, share in shares.items():
        for seed in range(seeds):
            right = hard + chance.normal(0, 0.1, items) < share + chance.normal(0, spread)
            found.append(made_up(policy, seed, right.astype(float).tolist()))
    return found


def test_a_policy_that_is_better_is_said_to_be_with_its_interval():
    lines = shown(experiment({"auto": 0.8, "harness": 0.6, "weights": 0.4}), POLICIES)
    assert lines[0] == "`auto` is better than `harness`, `weights`."
    assert lines[1].startswith("auto is better than harness: +0.19") and lines[1].endswith(
        "5 seeds. Their own intervals are apart."
    )


def test_an_auto_that_does_not_win_is_said_not_to():
    lines = shown(experiment({"auto": 0.6, "harness": 0.6, "weights": 0.8}), POLICIES)
    assert (
        lines[0] == "`auto` is better than none of them; is worse than `weights`; no difference is shown to `harness`."
    )
    assert lines[1].startswith("No difference shown between auto and harness: ") and "overlap" in lines[1]
    assert lines[2].startswith("auto is worse than weights: -0.2")


def test_one_seed_is_said_to_say_nothing_of_others():
    lines = shown(experiment({"auto": 0.8, "harness": 0.4}, seeds=1), POLICIES[:2])
    assert "one seed, which says nothing of others" in lines[1]


def test_policies_without_a_common_seed_show_nothing():
    runs = [made_up("auto", 0, [1.0, 0.0]), made_up("harness", 1, [0.0, 0.0])]
    assert difference(runs, "auto", "harness") is None
    assert "share no seed" in shown(runs, POLICIES[:2])[1]


def test_where_less_is_better_the_lower_score_is_the_better():
    runs = [
        made_up(p, s, [e + s / 100, e], maximize=False) for p, e in (("auto", 1.0), ("harness", 5.0)) for s in (0, 1)
    ]
    gain = difference(runs, "auto", "harness")
    assert gain and gain.value == 4.0 and "auto is better than harness" in shown(runs, POLICIES[:2])[1]


def test_a_run_without_a_sealed_test_is_left_out_and_named():
    runs = experiment({"auto": 0.6, "harness": 0.6}, seeds=3)
    runs[2] = replace(runs[2], tested=False, final=(), first=(), reason="paused")
    text = report(runs, POLICIES[:2], HEADING, picture=True)
    assert "- x-auto-02: paused" in text and "| `auto` | 2 of 3 |" in text
    gain = difference(runs, "auto", "harness")
    assert gain and gain.seeds == 2


def test_the_report_has_settings_tables_method_and_what_was_learned_by():
    text = report(experiment({"auto": 0.8, "harness": 0.6, "weights": 0.4}), POLICIES, HEADING, picture=False)
    for part in ("# Levers on made up", "- seeds: 0, 1, 2, 3, 4", "Cornfield and Tukey", "grpo ×5", "no matplotlib"):
        assert part in text
    assert "| x-weights-04 | `weights` | 4 |" in text and "## Not in the figures" not in text
    assert "![" in report(experiment({"auto": 0.8}), ("auto",), HEADING, picture=True)


def test_without_a_budget_the_report_says_that_spending_differs_and_how_much():
    runs = experiment({"auto": 0.8, "harness": 0.6}, seeds=2)
    cheap = [replace(r, calls=25, tokens=3000, seconds=30.0, learning_seconds=0.0, usd=None) for r in runs[2:]]
    # A run that is in no figure would be no mean to hold against them.
    cut = made_up("harness", 9, [], tested=False, calls=1)
    text = report([*runs[:2], *cheap, cut], POLICIES[:2], HEADING, picture=True)
    assert "They do not share what a run spends: no budget was set" in text
    assert "| `auto` | 100 (1.00 ×) | 2,000 (1.00 ×) | 60 (1.00 ×) | 5 (1.00 ×) | 0 | 0 of 2 |" in text
    assert "| `harness` | 25 (0.25 ×) | 3,000 (1.50 ×) | 30 (0.50 ×) | 0 (0.00 ×) | unknown | 0 of 3 |" in text


def test_under_a_budget_the_report_says_that_it_is_shared_and_who_used_it_up():
    runs = [made_up("auto", 0, [1.0], spent="100 calls"), made_up("harness", 0, [0.0])]
    text = report(runs, POLICIES[:2], {**HEADING, "budget": "100 calls"}, picture=True)
    assert "a hard limit on each run: 100 calls." in text and "1 of 2 did" in text and "do not share" not in text
    assert "The others had\nturned all their generations" in text
    alone = report(runs[:1], POLICIES[:1], {**HEADING, "budget": "100 calls"}, picture=True)
    assert "1 of 1 did" in alone and "The others" not in alone
    assert [row["spent"] for row in scores_csv(runs)] == ["100 calls", ""]


def test_the_published_comparison_is_what_its_data_say_and_has_both_levers_above_either():
    folder = Path(__file__).parent.parent / "docs/experiments/levers-words"
    data = json.loads((folder / "curves.json").read_text())
    runs, policies = [Outcome(**run) for run in data["runs"]], ["auto", "harness", "weights"]
    assert report(runs, policies, data["heading"], picture=True) == (folder / "report.md").read_text()
    with (folder / "scores.csv").open(newline="") as file:
        assert [{k: str(v) for k, v in row.items()} for row in scores_csv(runs)] == list(csv.DictReader(file))
    both, *single = (score(runs, policy) for policy in policies)
    assert both and both.seeds == 5
    assert all(one and one.seeds == 5 and both.low > one.high for one in single)


def test_the_interval_of_one_seed_is_students_over_items_and_of_one_item_over_seeds():
    over_items = crossed([[0.0, 1.0, 2.0, 3.0]])
    # t with 3 degrees of freedom is 3.18245, the standard error sqrt(5/3 / 4).
    assert over_items.high - over_items.value == pytest.approx(3.18245 * (5 / 12) ** 0.5, abs=1e-4)
    assert crossed([[0.0], [1.0], [2.0], [3.0]]).high == pytest.approx(over_items.high)


def test_scores_that_are_all_alike_have_an_interval_without_width():
    assert crossed([[0.5, 0.5], [0.5, 0.5]]) == Interval(0.5, 0.5, 0.5, 2)
    with pytest.raises(ValueError, match="same items"):
        crossed([[1.0], [1.0, 0.0]])
    with pytest.raises(ValueError, match="same items"):
        crossed([])


@pytest.mark.parametrize(("of_seeds", "of_items", "of_rest"), [(0.05, 0.4, 0.2), (0.0, 0.4, 0.3), (0.2, 0.0, 0.4)])
def test_the_interval_holds_the_true_mean_nineteen_times_in_twenty(of_seeds: float, of_items: float, of_rest: float):
    """Tables drawn with known variances: 400 of them, so that 0.95 shows as 0.95 ± 0.02."""
    chance = numpy.random.default_rng(1)
    held = 0
    for _ in range(400):
        table = (
            chance.normal(0, of_seeds, (5, 1))
            + chance.normal(0, of_items, (1, 60))
            + chance.normal(0, of_rest, (5, 60))
        )
        found = crossed(table.tolist())
        held += found.low <= 0 <= found.high
    assert held >= 0.925 * 400


def test_a_run_becomes_an_outcome():
    sealed = Sealed(
        first=scored("g0a", "test", "1000").score,
        final=scored("g1b", "test", "1110").score,
        comparison=Comparison(gain=0.5, low=0, high=1, p_value=1, n=4, better=2, worse=0),
    )
    comparison = Comparison(gain=0.5, low=0.1, high=1, p_value=0.01, n=8, better=4, worse=0)
    past = [registered(), started(lever="alternate", seed=3), *SECOND[2:], scored("g1b", "gate", "11110000")]
    past += [accepted("g1b", "g0a").model_copy(update={"comparison": comparison})]
    past += [feedback_asked(2, "g1b"), fed_back(2, "weights", "g1b"), trained("g2a", "g1b", seconds=7.0)]
    ends = [scored("g0a", "test", "1000"), scored("g1b", "test", "1110")]
    done = RunFinished(outcome="improved", best="g1b", sealed=sealed, reason="better")
    found = outcome(recorded(*past, *ends, done))
    assert (found.policy, found.seed, found.tested) == ("alternate", 3, True)
    assert (found.first, found.final) == ((1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 0.0))
    assert found.curve == (0.125, 0.5, 0.5) and found.levers == ("harness", "reinforce")
    assert found.accepted == {"first": 1, "harness": 1} and found.learning_seconds == 7.0
    cut_short = outcome(recorded(*ACCEPTED))
    assert not cut_short.tested and cut_short.reason == "running" and cut_short.curve == (0.125,)


def calls_of(key: str, count: int, role: str = "target") -> Calls:
    return Calls("r1", role, "m", key, count, prompt_tokens=10 * count, completion_tokens=count, usd=0.0)


def test_what_a_run_took_is_told_without_its_sealed_test():
    ends = [asked("g0a", "test"), scored("g0a", "test", "1000")]
    made = [calls_of("g0a.dev", 4), calls_of("trainer.g1", 2, role="trainer"), calls_of("g0a.test", 50)]
    records = recorded(*ACCEPTED, *ends)
    began = [replace(record, time=record.time + timedelta(seconds=i)) for i, record in enumerate(records)]
    found = outcome(began, made)
    assert (found.calls, found.tokens, found.seconds) == (6, 66, len(ACCEPTED) - 1)


OUT = BudgetExhausted(limit="calls", allowed=60, spent=60)
HALF_WAY = (
    registered(),
    started(lever="alternate", budget=Budget(calls=60, usd=1.0)),
    *SECOND[2:],
    VersionRejected(version="g1a", over="g0a", comparison=None, reason="less on dev"),
    scored("g1b", "gate", "11110000"),
    accepted("g1b", "g0a"),
    feedback_asked(2, "g1b"),
    fed_back(2, "weights", "g1b"),
    OUT,
)


def test_a_run_that_is_out_of_budget_is_tested_with_the_incumbent_of_its_last_whole_generation():
    history = recorded(*HALF_WAY)
    opened = to_the_test(history)
    assert opened and (opened.at, opened.generation) == (len(HALF_WAY) - 3, 1)
    assert opened.overrides == {"generations": 1, "budget.calls": None, "budget.usd": None}
    branch = [*history[: opened.at], *recorded(opened, run="r1-tested")]
    state, verdict = fold(branch), branch[opened.at - 1].event
    assert isinstance(verdict, VersionAccepted)
    owed = on_verdict(state, verdict)
    assert [each.attempt for each in owed if isinstance(each, AttemptRequested)] == ["g0a.test", "g1b.test"]

    test = Sealed(
        first=scored("g0a", "test", "1000").score,
        final=scored("g1b", "test", "1110").score,
        comparison=Comparison(gain=0.5, low=0, high=1, p_value=1, n=4, better=2, worse=0),
    )
    done = RunFinished(outcome="no proven gain", best="g1b", sealed=test, reason="too few items")
    ended = [scored("g0a", "test", "1000"), scored("g1b", "test", "1110"), done]
    found = outcome(history, (), [*branch, *recorded(*ended, run="r1-tested")])
    assert found.tested and found.run == "r1" and found.spent == "60 calls" and found.reason == "too few items"
    assert found.final == (1.0, 1.0, 1.0, 0.0) and found.levers == ("harness", "reinforce")
    assert outcome(history).reason == "paused: its budget of 60 calls is used up"


def test_a_run_that_went_on_is_not_taken_for_what_it_was_when_its_budget_ended():
    more = BudgetChanged(budget=Budget(calls=600))
    names = [
        found and found[0] for found in (branch_to_test(recorded(*HALF_WAY)), branch_to_test(recorded(*HALF_WAY, more)))
    ]
    assert names == ["r1-tested1", None]
    further = (more, trained("g2a", "g1b"), scored("g2a", "gate", "11111111"), accepted("g2a", "g1b"))
    third = (feedback_asked(3, "g2a"), fed_back(3, incumbent="g2a"), OUT)
    again = branch_to_test(recorded(*HALF_WAY, *further, *third))
    assert again and again[0] == "r1-tested2", "another generation has a test of its own"


def test_nothing_is_tested_before_the_first_agent_is_accepted():
    assert to_the_test(recorded(*OPENING, OUT)) is None


def test_every_policy_has_a_seed_before_any_has_the_next():
    plan = planned("x", ("auto", "harness"), 2, RunSettings(seed=5))
    assert [each.name for each in plan] == ["x-auto-00", "x-harness-00", "x-auto-01", "x-harness-01"]
    assert [each.settings.seed for each in plan] == [5, 5, 10_005, 10_005]


def test_no_two_seeds_of_a_policy_draw_the_same_rollouts_in_any_of_their_generations():
    most = RunSettings.model_json_schema()["properties"]["generations"]["maximum"]
    begun = fold(recorded(*OPENING))
    drawn = [
        rollouts(replace(begun, settings=each.settings), fed_back(generation, incumbent="g0a"))[0].seed
        for each in planned("x", ("weights",), 100, RunSettings())
        for generation in (1, 2, most - 1, most)
    ]
    assert len(set(drawn)) == len(drawn)


def test_what_is_written_can_be_computed_on(tmp_path: Path):
    runs = experiment({"auto": 0.8, "harness": 0.6}, items=20)
    write(tmp_path, runs, POLICIES[:2], HEADING)
    data = json.loads((tmp_path / "curves.json").read_text())
    assert data["mean_gate_score"] == {"auto": [0.2, 0.5], "harness": [0.2, 0.5]}
    own = [run["final"] for run in data["runs"] if run["policy"] == "auto"]
    assert crossed(own) == score(runs, "auto") and data["scores"]["auto"]["seeds"] == 5
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert len(rows) == 10 and rows[0]["run"] == "x-auto-00" and rows[0]["levers"] == "harness grpo"


def test_runs_that_stopped_early_do_not_shorten_the_mean_curve():
    runs = [made_up("auto", 0, [1.0], curve=(0.2, 0.4, 0.6)), made_up("auto", 1, [1.0], curve=(0.4,))]
    runs.append(made_up("auto", 2, [], curve=(), tested=False))
    assert curves(runs, ("auto",), HEADING)["mean_gate_score"]["auto"] == pytest.approx([0.3, 0.4, 0.6])


def test_the_curves_are_a_picture_where_matplotlib_is_there(tmp_path: Path):
    pytest.importorskip("matplotlib")
    draw({"auto": [0.2, 0.5]}, [made_up("auto", 0, [1.0])], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_experiment_is_announced_with_its_runs_and_what_those_to_come_cost_about():
    plan = planned("x", ("auto", "harness"), 2, RunSettings())
    costs = {
        "auto": Line("target", "a/m", 10, 1, 1, 2.0, "guessed"),
        "harness": Line("target", "a/m", 5, 1, 1, 0.5, "g"),
    }
    foreseen: dict[str | None, Estimate] = {
        each.name: Estimate((costs[each.settings.lever],), "It rests on guesses") for each in plan[1:]
    }
    head, *each = announced("x", plan, {"x-auto-00"}, foreseen)
    assert head == "x: 4 runs, 1 of them over already. Those not begun, 3, cost about 3.00 USD:"
    assert [line.split(". ")[0] for line in each] == [
        "  a run of harness: estimate: about 0.50 USD",
        "  a run of auto: estimate: about 2.00 USD",
    ]
    foreseen["x-auto-01"] = Estimate((replace(costs["auto"], usd=None),), "")
    assert "cost about 1.00 USD and what is unknown:" in announced("x", plan, (), foreseen)[0]
    free: dict[str | None, Estimate] = dict.fromkeys((each.name for each in plan), Estimate((), ""))
    assert announced("x", plan, (), free) == [
        "x: 4 runs, 0 of them over already. estimate: 0.00 USD: no hosted model plays a role"
    ]


# Real runs, of the instant model on the small task.

SMALL = ("--generations", "1", "--set", "target_model=instant/first", "--set", "candidates=1")
BOTH = (*SMALL, "--policies", "weights,harness", "--seeds", "1", "--set", "rollout_items=4")
EXPERIMENT = ("experiment", "levers", *BOTH)


def test_an_experiment_reports_real_runs_goes_on_after_a_kill_and_has_no_run_twice(
    tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    home, out = tmp_path / "home", tmp_path / "report"
    words = (*EXPERIMENT, "--task", task, "--out", out)
    process = start(home, *words)
    assert process.stderr
    for line in process.stderr:
        if line.startswith("levers-taste-harness-00: run 2 of 2"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert_none_left(children)
    before = read(home, "show", "levers-taste-weights-00")

    done = sia(home, *words, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "levers-taste: 2 runs, 1 of them over already. estimate: 0.00 USD: no hosted model" in done.stderr
    assert "levers-taste-weights-00: run 1 of 2 is over already" in done.stderr
    assert read(home, "show", "levers-taste-weights-00") == before
    assert told["shows"][0].startswith("`weights` is better than none of them; is worse than `harness`")
    assert told["left_out"] == []
    runs = [f"levers-taste-{policy}-00" for policy in ("weights", "harness")]
    assert [row["run"] for row in read(home, "runs")] == runs
    assert {file.name for file in out.iterdir()} >= {"report.md", "scores.csv", "curves.json"}
    text = (out / "report.md").read_text()
    assert "No difference" not in text and "| levers-taste-harness-00 | `harness` | 0 | 0.000 |" in text
    assert f"Python {sys.version.split()[0]}" in text and "cores" in text

    other = sia(home, *words, "--set", "alpha=0.01")
    assert other.returncode == 2 and "exists with another alpha" in other.stderr and "--set alpha=" in other.stderr


def test_an_experiment_whose_runs_are_out_of_budget_has_them_tested_with_what_they_have(tmp_path: Path, task: Path):
    # 20 calls accept the first agent; the next candidate's take more than 10.
    few = (*SMALL, "--policies", "harness", "--seeds", "1", "--set", "budget.calls=30", "--task", task)
    words = ("experiment", "levers", *few, "--out", tmp_path / "report")
    done = sia(tmp_path / "home", *words)
    assert done.returncode == 0, done.stderr
    assert "sia branch levers-taste-harness-00-tested0 --at 0 " in done.stderr
    text = (tmp_path / "report" / "report.md").read_text()
    assert "- budget: 30 calls" in text and "1 of 1 did" in text and "threads for the embedded model" in text
    assert "| levers-taste-harness-00 | `harness` | 0 | 0.000 | 0.000 |" in text
    spent = json.loads((tmp_path / "report" / "curves.json").read_text())["runs"][0]
    assert spent["spent"] == "30 calls" and 20 < spent["calls"] <= 30
    again = sia(tmp_path / "home", *words)
    assert again.returncode == 0 and "1 runs, 1 of them over already" in again.stderr
    assert len(read(tmp_path / "home", "runs")) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--policies", "auto,best"), "no lever policy 'best'; there are: auto, harness"),
        (("--policies", "auto,auto"), "each policy once"),
        (("--set", "lever=weights"), "--policies and --generations say it here"),
        (("--set", "learning.lrr=1"), "did you mean learning.lr"),
        (("--set", "target_model=ollama/m"), "--lever weights would train ollama/m, whose weights are not ours"),
    ],
)
def test_what_cannot_be_an_experiment_is_told_before_anything_is_run(
    tmp_path: Path, task: Path, words: Sequence[str], told: str
):
    refused = sia(tmp_path, "experiment", "levers", "--task", task, *words)
    assert refused.returncode == 2 and told in refused.stderr and not list(tmp_path.iterdir())
