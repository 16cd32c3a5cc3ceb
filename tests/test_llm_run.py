"""A whole run whose agents an LLM writes and answers, by the real command: on a good provider, and on bad ones."""

import json
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import assert_none_left, calls, log, read, sia, start, tree
from llm_author import PLAIN, SMALL, Author, assert_paid_once, prompt, reached
from loopback import Fault, Loopback, Wire
from loopback_wires import Reply

from sia_events.shared.events import (
    AgentProposed,
    AttemptFailed,
    FeedbackGiven,
    HarnessPatched,
    ProposalFailed,
    ServiceFailed,
    VersionAccepted,
)

pytestmark = pytest.mark.usefixtures("children")
RUN = ("--run", "r1", *SMALL)


@pytest.mark.parametrize("backend", ["direct", "agentic"])
def test_an_llm_writes_a_better_agent_and_the_run_replays_with_the_provider_gone(
    backend: str, tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    author = Author()
    with Loopback(author) as provider:
        done = sia(tmp_path, "run", task, *RUN, "--backend", backend, "--json", **reached(provider))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outcome"] == "improved"

    records = log(tmp_path)
    events = {type(record.event): record.event for record in records}
    first, patched, given = events[AgentProposed], events[HarnessPatched], events[FeedbackGiven]
    assert isinstance(first, AgentProposed) and first.written and first.reason == "asks about every item"
    assert first.written.backend == backend and first.written.model == "openai/writes"
    assert isinstance(given, FeedbackGiven) and given.lever == "harness"
    assert isinstance(patched, HarnessPatched) and patched.written and patched.edits == ("target_agent.py",)
    assert [r.event.version for r in records if isinstance(r.event, VersionAccepted)] == ["g0a", "g1a"]

    made = calls(tmp_path)
    assert sorted(call.prompt_tokens for call in made) == list(range(1, len(author.asked) + 1))
    assert_paid_once(author, made)
    assert {call.role for call in made} == {"meta", "feedback", "target"} and {call.fault for call in made} == {""}
    cost = read(tmp_path, "show", "r1")["cost"]
    assert cost["model_calls"] == len(made) and cost["usd"] is None, "nobody knows the price of these models"
    assert cost["tokens"] == sum(call.prompt_tokens + call.completion_tokens for call in made)
    assert not read(tmp_path, "replay", "r1")["diverged"]
    assert len(author.asked) == len(made)
    assert_none_left(children)


def test_a_missing_key_is_told_before_anything_is_created(tmp_path: Path, task: Path):
    home = tmp_path / "home"
    refused = sia(home, "run", task, *RUN, OPENAI_API_KEY="")
    assert refused.returncode == 2 and refused.stdout == ""
    assert (
        "openai/" in refused.stderr and "OPENAI_API_KEY" in refused.stderr and "nothing was written" in refused.stderr
    )
    assert not home.exists() or tree(home) == {}


UNUSABLE: Mapping[str, tuple[Reply | Fault, str]] = {
    "1": (Reply("I would rather talk about it."), "no code"),
    "2": (Reply(json.dumps({"files": {"target_agent.py": "def f(:"}})), "does not compile"),
    "3": (Reply(json.dumps({"files": {"../outside.py": "x = 1\n"}})), "leads out of the harness"),
    "4": (Reply(json.dumps({"files": {"target_agent.py": "#" * 50_000_000}})), "bytes"),
    "5": (Reply(""), "empty"),
    "6": (Reply(json.dumps({"files": {"target_agent.py": PLAIN}})[:200], finish="length"), "cut off"),
    "7": (Fault("refusal"), "the model refused"),
}


@pytest.mark.slow  # a whole run, with tries that are waited for
def test_where_no_reply_can_be_used_the_reference_agent_goes_in_and_the_generation_is_closed(
    tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    def badly(wire: Wire, body: Mapping[str, Any]) -> Reply | Fault:
        place = re.search(r"You write candidate (\d) of 7", prompt(body))
        return UNUSABLE[place[1]][0] if place else Reply("hm")

    with Loopback(badly) as provider:
        done = sia(tmp_path, "run", task, *RUN, "--candidates", "7", "--json", **reached(provider))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outcome"] == "no proven gain"
    events = [record.event for record in log(tmp_path)]
    (first,) = [event for event in events if isinstance(event, AgentProposed)]
    assert first.written is None and "the reference agent goes in its place" in first.reason
    (closed,) = [event for event in events if isinstance(event, ProposalFailed)]
    for told, generation in ((first.reason, 0), (closed.reason, 1)):
        for (_, why), version in zip(UNUSABLE.values(), "abcdefg", strict=True):
            said = told.partition(f"g{generation}{version}: ")[2].partition("; g")[0]
            assert why in said, (version, said)
    # What was written in vain is paid for all the same.
    paid = read(tmp_path, "cost", "r1")["own"]["total"]
    assert paid["calls"] == provider.count == read(tmp_path, "show", "r1")["cost"]["model_calls"]
    assert not read(tmp_path, "replay", "r1")["diverged"]
    assert_none_left(children)


# What is said of it, and in how many tries: where the gateway has waited, a writer does not wait once more.
AWAY = {
    "down": ("1 try: ProviderAway", "the connection failed"),
    "rate_limited": ("1 try: ProviderAway", "limits our rate"),
    "unauthorised": ("1 try: ProviderAway", "refused the key"),
    "garbage": ("5 tries: ModelAway", "gave no usable reply"),
    "empty": ("5 tries: ModelAway", "gave no usable reply"),
    "unknown_model": ("5 tries: ModelAway", "answered 404"),
}


@pytest.mark.parametrize(
    "kind", ["down", *(pytest.param(kind, marks=pytest.mark.slow) for kind in AWAY if kind != "down")]
)
def test_a_provider_that_is_away_for_good_ends_in_a_dead_letter_and_the_run_goes_on_when_it_is_back(
    kind: Any, tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    with Loopback(lambda wire, body: Fault(kind)) as provider:
        variables = {**reached(provider), "SIA_PATIENCE_S": "0.5"}
        died = None if kind == "down" else sia(tmp_path, "run", task, *RUN, **variables)
    died = died or sia(tmp_path, "run", task, *RUN, **variables)
    assert died.returncode == 1, died.stderr
    tries, said = AWAY[kind]
    assert f"meta_svc gave up after {tries}" in died.stderr and said in died.stderr
    assert "sia run --resume r1" in died.stderr
    assert isinstance(log(tmp_path)[-1].event, ServiceFailed)
    author = Author()
    with Loopback(author, provider.port):
        resumed = sia(tmp_path, "run", "--resume", "r1", "--json", **variables)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["outcome"] == "improved"
    assert_paid_once(author, [call for call in calls(tmp_path) if call.reply])
    assert not read(tmp_path, "replay", "r1")["diverged"]
    assert_none_left(children)


def test_who_waits_for_a_provider_that_is_away_is_told_so(
    tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    with Loopback() as provider:
        variables = reached(provider)
    process = start(tmp_path, "run", task, *RUN, **variables)
    assert process.stderr
    told = next((line for line in process.stderr if "does not answer, and is asked again" in line), "")
    assert "openai/writes" in told and "the connection failed" in told
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130 and "sia run --resume r1" in talk
    assert_none_left(children)


@pytest.mark.parametrize("asked", [5, pytest.param(16, marks=pytest.mark.slow)])
def test_a_provider_that_leaves_in_the_midst_of_an_attempt_stops_the_run_until_it_is_back(
    asked: int, tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    """On dev and on the gate of the first version: it is judged by nothing that was not answered."""
    author = Author()

    def leaves(wire: Wire, body: Mapping[str, Any]) -> Reply | Fault:
        return Fault("overloaded") if len(author.asked) >= asked else author(wire, body)

    with Loopback(leaves) as provider:
        variables = {**reached(provider), "SIA_PATIENCE_S": "0.1"}
        stopped = sia(tmp_path, "run", task, *RUN, "--set", "attempt_tries=1", **variables)
        assert provider.count == asked + 1, "one call was waited for, and the agent's later ones were not made"
    assert stopped.returncode == 1, stopped.stderr
    assert "target_runner gave up after 1 try" in stopped.stderr and "is not available" in stopped.stderr
    assert "sia run --resume r1" in stopped.stderr
    last = log(tmp_path)[-1].event
    assert isinstance(last, ServiceFailed)
    with Loopback(author, provider.port):
        resumed = sia(tmp_path, "run", "--resume", "r1", "--json", **variables)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["outcome"] == "improved"
    assert not any(isinstance(record.event, AttemptFailed) for record in log(tmp_path))
    made = [call for call in calls(tmp_path) if call.reply]
    assert_paid_once(author, made)
    assert len(author.asked) == len(made)
    assert not read(tmp_path, "replay", "r1")["diverged"]
    assert_none_left(children)
