"""What a run cost, and what it will: nothing is counted twice, and what nobody knows is never told as 0."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from command import SMALL, answered, sia
from given import recorded
from llm_author import SMALL as WRITTEN
from llm_author import Author, reached
from loopback import Loopback
from story import ACCEPTED, FIRST, accepted, asked, fed_back, feedback_asked, patched, started

from sia_events.cost import CALLS, Calls, cost, generations_of, summary, told
from sia_events.estimate import Earlier, Estimate, Habit, estimate, hosted, items_asked
from sia_events.infra.clickhouse import connect
from sia_events.infra.providers.prices import pricing
from sia_events.log_here import open_log
from sia_events.shared.calls import ModelCall, encode_call, journal_key
from sia_events.shared.events import Budget, Event, HarnessPatchRequested, RunBranched, RunSettings
from sia_events.shared.ports import Envelope
from sia_events.shared.providers import Price
from sia_events.shared.record import Record
from sia_events.shared.settings import Settings
from sia_events.shared.task import find_task
from sia_events.views.costs import cost_text, estimate_text

HOSTED = "openai/gpt-5.4-mini"
WANTED = HarnessPatchRequested(generation=1, parent="g0a", candidates=1, seed=0)
SECOND = (*ACCEPTED, feedback_asked(1), fed_back(1), WANTED, patched("g1a"), asked("g1a", "dev"))


def history(*events: Event, run: str = "r1") -> Sequence[Record]:
    return recorded(*events, run=run)


def calls(key: str, role: str = "target", run: str = "r1", count: int = 2, **more: Any) -> Calls:
    return Calls(
        **{
            "run": run,
            "role": role,
            "model": HOSTED,
            "key": key,
            "calls": count,
            "prompt_tokens": 10 * count,
            "completion_tokens": count,
            "usd": 0.5 * count,
            **more,
        }
    )


def total_of(told: Mapping[str, Any]) -> tuple[int, float | None]:
    return told["total"]["calls"], told["total"]["usd"]


def by(told: Mapping[str, Any], name: str) -> dict[Any, int]:
    return {each[name]: each["calls"] for each in told[f"by_{name}"]}


def test_calls_are_told_by_role_model_and_generation():
    records = history(*SECOND)
    rows = [
        calls("meta.g0a", "meta", count=1, model="anthropic/a"),
        calls("g0a.dev"),
        calls("feedback.g1", "feedback", count=1),
        calls("feedback.g1a", "feedback", count=1),
        calls("g1a.dev", count=3),
    ]
    found = told(records, rows, records[-1].time)
    assert total_of(found["own"]) == (8, 4.0)
    assert by(found["own"], "role") == {"feedback": 2, "meta": 1, "target": 5}
    assert by(found["own"], "model") == {"anthropic/a": 1, HOSTED: 7}
    assert by(found["own"], "generation") == {0: 3, 1: 5}
    assert found["inherited"] is None


def test_rollouts_are_of_the_generation_that_learns_from_them():
    train = asked("g0a", "train", attempt="g0a.train.g2", samples=2)
    records = history(*SECOND, accepted("g1a"), feedback_asked(2), train, asked("g0a", "test"))
    of = generations_of(records)
    assert of["r1", "g0a.dev"] == 0 and of["r1", "g0a.train.g2"] == 2 and of["r1", "g0a.test"] == 2


def test_a_second_try_is_the_same_piece_of_work():
    records = history(*FIRST, asked("g0a", "gate", tries=1))
    assert set(generations_of(records).values()) == {0}
    assert ("r1", journal_key("g0a.gate~1")) in generations_of(records)


def test_an_unknown_price_is_said_and_never_0():
    records = history(*SECOND)
    found = told(records, [calls("g0a.dev"), calls("g1a.dev", usd=0.0, unpriced=2)], records[-1].time)
    whole = found["own"]["total"]
    assert (whole["usd"], whole["priced_usd"], whole["unpriced_calls"]) == (None, 1.0, 2)
    text = cost_text(found)
    assert "1.00 + 2 calls unknown" in text and "0.00" not in text


def test_what_a_branch_shares_with_its_parent_stands_apart_and_against_no_limit_of_its_own():
    parent = history(*SECOND, accepted("g1a"))
    settings = RunSettings(generations=2, budget=Budget(calls=10))
    fork = RunBranched(parent="r1", at=len(parent), generation=1, overrides={}, settings=settings, code="test")
    own = history(fork, feedback_asked(2), asked("g2a", "dev"), run="r2")
    rows = [
        calls("g1a.dev", count=4),
        calls("feedback.g1a", "feedback", count=1),
        # What the parent did behind the fork is its own affair.
        calls("feedback.g2", "feedback", count=7),
        calls("g2a.dev", count=9),
        calls("g2a.dev", run="r2", count=3),
    ]
    found = told([*parent, *own], rows, own[-1].time)
    assert total_of(found["own"]) == (3, 1.5) and by(found["own"], "generation") == {2: 3}
    assert total_of(found["inherited"]) == (5, 2.5) and by(found["inherited"], "generation") == {1: 5}
    assert found["budget"]["calls"] == {"allowed": 10, "spent": 3, "left": 7}
    assert "shared with r1, which paid for it" in cost_text(found)


def test_what_is_left_of_each_limit_is_told():
    opening = [started(budget=Budget(usd=4, minutes=10)) if e.type == "RunStarted" else e for e in FIRST]  # type: ignore[attr-defined]
    records = history(*opening)
    found = told(records, [calls("g0a.dev")], records[0].time + timedelta(minutes=4))["budget"]
    assert found["usd"] == {"allowed": 4, "spent": 1.0, "left": 3.0}
    assert found["minutes"] == {"allowed": 10, "spent": 4.0, "left": 6.0}
    assert found["tokens"] == {"allowed": None, "spent": 22, "left": None}


def test_a_run_without_calls_cost_nothing():
    records = history(*FIRST)
    found = told(records, [], records[-1].time)
    assert total_of(found["own"]) == (0, 0.0) and "budget: no limits" in cost_text(found)


def test_the_log_counts_what_was_paid_for_and_knows_a_price_of_0_from_an_unknown_one(tmp_path: Path):
    common: dict[str, Any] = {"version": "g0a", "kind": "chat", "digest": "d", "n": 0, "seed": 0, "request": {}}
    lines = [
        ModelCall(call="1", attempt="g0a.dev", model="a/b", reply={}, prompt_tokens=5, usd=0.25, **common),
        ModelCall(call="2", attempt="g0a.dev~1", model="a/b", reply={}, prompt_tokens=5, usd=None, **common),
        ModelCall(call="3", attempt="g0a.dev", model="a/b", error="broke off", completion_tokens=3, usd=0.5, **common),
        ModelCall(call="4", attempt="g0a.dev", model="a/b", error="over", fault="budget", **common),
        ModelCall(call="5", attempt="g0a.dev", model="a/b", reply={}, **common),
    ]

    async def counted() -> list[dict[str, Any]]:
        log = connect(f"chdb://{tmp_path}/log")
        try:
            body = tuple(encode_call(line) for line in lines)
            await log.append_traces([(1, Envelope("r1", "model_call", "g0a.dev", body))], "t")
            return [dict(row) for row in await log.query(CALLS, {"runs": ["r1", "r2"]})]
        finally:
            await log.close()

    (row,) = asyncio.run(counted())
    assert Calls(*row.values()) == Calls("r1", "target", "a/b", "g0a.dev", 4, 10, 3, 0.75, 1)


def test_a_summary_counts_what_cost_counts_an_adapters_probes_too(tmp_path: Path):
    settings, records = Settings(home=tmp_path), history(*SECOND)

    def made(role: str, key: str) -> Envelope:
        call = ModelCall(
            call=key,
            attempt=key,
            version="g1a",
            role=role,
            kind="chat",
            model="a/b",
            digest=key,
            n=0,
            seed=0,
            request={},
            reply={},
            prompt_tokens=5,
        )
        return Envelope("r1", "model_call", key, (encode_call(call),))

    async def told_of_both() -> tuple[dict[str, Any], dict[str, Any]]:
        async with open_log(settings) as log:
            await log.append(records, "records")
            await log.append_traces([(1, made("target", "g0a.dev")), (2, made("trainer", "trainer.g1"))], "calls")
        return (await summary(settings, records))["cost"], (await cost(settings, "r1"))["own"]["total"]

    found, total = asyncio.run(told_of_both())
    assert (found["model_calls"], found["tokens"]) == (2, 10)
    assert found["model_calls"] == total["calls"] and found["usd"] == total["usd"]


# ---- before the run

ITEMS = {"dev": 10, "gate": 20, "test": 20}
ONE = Price(input=1_000_000, output=0)  # a dollar a token of the prompt


def dollar_a_token(model: str, usage: Mapping[str, Any]) -> float | None:
    return pricing({}, {"a/*": ONE})(model, usage)


@pytest.mark.parametrize(
    ("settings", "roles", "expected"),
    [
        # One first agent and 2 generations of 3 candidates on dev, three looks at the gate, two sealed tests.
        ({}, {"target": "a/m"}, {"target": 7 * 10 + 3 * 20 + 2 * 20}),
        ({"lever": "weights"}, {"target": "a/m"}, {"target": 3 * 10 + 3 * 20 + 2 * 20}),
        # An LLM writes three first agents too; weights of a hosted model are not ours, so no lever is chosen.
        (
            {"backend": "direct"},
            {"target": "a/m", "meta": "a/m", "feedback": "a/m"},
            {"target": 9 * 10 + 3 * 20 + 2 * 20, "meta": 3, "feedback": 6},
        ),
        ({"backend": "direct", "target_model": "local/m"}, {"feedback": "a/m"}, {"feedback": 6 + 2}),
        ({"backend": "agentic", "turns": 5}, {"meta": "a/m"}, {"meta": 3 * 5}),
    ],
)
def test_the_work_of_a_run_is_foreseen_from_its_settings(settings: Any, roles: Any, expected: Any):
    wanted = RunSettings(**{"generations": 2, "candidates": 3, "target_model": "a/m", **settings})
    found = estimate(wanted, roles, ITEMS, Earlier(), dollar_a_token)
    assert {line.role: line.calls for line in found.lines} == expected
    assert all("assumed" in line.basis for line in found.lines)


def test_what_earlier_runs_took_counts_over_assumptions():
    earlier = Earlier({("target", "a/m"): Habit(1, 7, 3)}, {"dev": 100, "gate": 200})
    wanted = RunSettings(generations=1, candidates=1, target_model="a/m")
    (line,) = estimate(wanted, {"target": "a/m"}, ITEMS, earlier, dollar_a_token).lines
    assert line.calls == 2 * 100 + 2 * 200 + 2 * 20
    assert (line.prompt_tokens, line.completion_tokens, line.usd) == (7 * 640, 3 * 640, 7.0 * 640)
    assert line.basis.count("measured") == 2


def test_an_estimate_says_which_price_nobody_knows_and_which_limit_it_passes():
    wanted = RunSettings(generations=1, candidates=1, target_model="b/m", budget=Budget(usd=5))
    unknown = estimate(wanted, {"target": "b/m"}, ITEMS, Earlier(), dollar_a_token)
    assert unknown.usd is None and "unknown, as nobody here knows the price of b/m" in estimate_text(unknown)
    dear = estimate(wanted, {"target": "a/m"}, ITEMS, Earlier(), dollar_a_token)
    assert dear.passes_limit and "over the limit of 5 USD" in estimate_text(dear)
    assert estimate_text(Estimate((), "")) == "estimate: 0.00 USD: no hosted model plays a role"


def test_items_that_cannot_be_counted_are_assumed_and_never_0():
    wanted = RunSettings(generations=1, candidates=1, target_model="a/m")
    found = estimate(wanted, {"target": "a/m"}, {}, Earlier(), dollar_a_token)
    assert found.lines[0].calls == 600 and "100 assumed" in found.rests_on


def test_a_kernel_is_written_once_an_attempt_however_often_it_is_timed():
    assert items_asked(find_task("trimul")) == {"dev": 1, "gate": 1, "test": 1}


def test_only_roles_that_somebody_bills_are_counted():
    settings = Settings()
    assert hosted(settings, RunSettings()) == {}
    llm = RunSettings(backend="direct", meta_model="anthropic/m", feedback_model="local/m")
    assert hosted(settings, llm) == {"meta": "anthropic/m"}
    assert hosted(settings, RunSettings(target_model="openai/m")) == {"target": "openai/m"}


# ---- by the real command


def test_what_a_run_cost_is_what_its_budget_counted(tmp_path: Path, task: Path):
    made = answered(tmp_path, "run", task, "--run", "r1", *SMALL, "--budget-calls", "500")
    found = answered(tmp_path, "cost", "r1")
    assert total_of(found["own"]) == (made["cost"]["model_calls"], 0.0)
    assert found["budget"]["calls"]["spent"] == made["cost"]["model_calls"]
    assert by(found["own"], "model") == {"instant/first": made["cost"]["model_calls"]}
    answered(tmp_path, "branch", "r1", "--at", "0", "--no-go", "--run", "b1")
    shared = answered(tmp_path, "cost", "b1")
    assert total_of(shared["own"]) == (0, 0.0) and by(shared["inherited"], "generation") == {0: 8 + 12}
    text = sia(tmp_path, "cost", "b1")
    assert text.returncode == 0 and "shared with r1" in text.stdout
    assert sia(tmp_path, "cost", "nobody").returncode == 2


def test_an_llm_run_is_told_by_role_and_the_next_estimate_rests_on_it(tmp_path: Path, task: Path):
    (tmp_path / "config.toml").write_text('[prices."openai/writes"]\ninput = 1000\noutput = 1000\n')
    author = Author()
    with Loopback(author) as provider:
        variables = reached(provider)
        done = sia(tmp_path, "run", task, "--run", "r1", *WRITTEN, "--json", **variables)
    assert done.returncode == 0, done.stderr
    assert "estimate: about" in done.stderr and "nobody here knows the price of openai/answers" in done.stderr
    found = answered(tmp_path, "cost", "r1")
    own = found["own"]
    assert own["total"]["calls"] == len(author.asked) and own["total"]["usd"] is None
    paid = {each["role"]: each["usd"] for each in own["by_role"]}
    assert paid["target"] is None and paid["meta"] == 0.002  # its first call: one token in, one out
    assert by(own, "generation") == {0: 1 + 8 + 12, 1: 1 + 8 + 12 + 2 * 12}
    told = answered(tmp_path, "run", task, "--run", "r2", *WRITTEN, "--dry-run", **variables)
    assert {line["role"]: line["calls"] for line in told["lines"]} == {"target": 64, "meta": 1, "feedback": 1}
    assert all("measured" in line["basis"] and "assumed" not in line["basis"] for line in told["lines"])
    assert sia(tmp_path, "run", task, "--run", "r1", *WRITTEN, "--dry-run", **variables).returncode == 2


def test_a_dry_run_tells_the_price_and_starts_nothing(tmp_path: Path, task: Path):
    hosts = ("--target-model", HOSTED, "--generations", "1", "--candidates", "1")
    without = sia(tmp_path, "run", task, *hosts, "--dry-run", OPENAI_API_KEY="")
    assert without.returncode == 2 and "OPENAI_API_KEY" in without.stderr
    done = sia(tmp_path, "run", task, *hosts, "--dry-run", "--json", OPENAI_API_KEY="k")
    assert done.returncode == 0, done.stderr
    (line,) = json.loads(done.stdout)["lines"]
    assert line["calls"] == 2 * 8 + 2 * 12 + 2 * 12 and line["usd"] > 0
    free = sia(tmp_path, "run", task, *SMALL, "--dry-run")
    assert "no hosted model plays a role" in free.stdout
    assert list(tmp_path.iterdir()) == []
