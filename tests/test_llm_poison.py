"""A request that its provider fails for ever, by the real command: who made it is given up, and an outage is not."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import assert_none_left, calls, log, read, sia
from llm_author import HINT, SMALL, Author, prompt, reached
from loopback import Fault, Loopback, Wire
from loopback_wires import Reply

from sia_events.shared.events import (
    AgentProposed,
    AttemptFailed,
    HarnessPatched,
    Scored,
    ServiceFailed,
    VersionRejected,
)

pytestmark = pytest.mark.usefixtures("children")
RUN = ("--run", "r1", *SMALL)
FAULTS = [
    Fault("broken"),
    pytest.param(Fault("rate_limited"), marks=pytest.mark.slow),
    pytest.param(Fault("forbidden"), marks=pytest.mark.slow),
]


class Poisoned(Author):
    """An author whose provider fails every request that has all of these words in it, and no other."""

    def __init__(self, fault: Fault, *words: str) -> None:
        super().__init__()
        self.fault, self.words = fault, words

    def __call__(self, wire: Wire, body: Mapping[str, Any]) -> Reply | Fault:
        if all(word in prompt(body) for word in self.words):
            return self.fault
        return super().__call__(wire, body)


def gone_on_once(home: Path, task: Path, author: Poisoned, *words: str) -> tuple[dict[str, Any], str]:
    """What the run came to, stopped once and gone on with once; and what was said when it stopped."""
    with Loopback(author) as provider:
        variables = {**reached(provider), "SIA_PATIENCE_S": "0.1"}
        stopped = sia(home, "run", task, *RUN, *words, **variables)
        assert stopped.returncode == 1 and "sia run --resume r1" in stopped.stderr, stopped.stderr
        resumed = sia(home, "run", "--resume", "r1", "--json", **variables)
    assert resumed.returncode == 0, resumed.stderr
    assert not read(home, "replay", "r1")["diverged"]
    return json.loads(resumed.stdout), stopped.stderr


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_an_attempt_whose_request_fails_the_provider_again_is_given_up_and_the_run_goes_on(
    fault: Fault, tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    # The second version's, on one of its items: the first version asks without the hint.
    summary, said = gone_on_once(tmp_path, task, Poisoned(fault, HINT, "dish 2"))
    assert "target_runner gave up after 1 try: ProviderAway" in said
    assert summary["outcome"] == "no proven gain" and summary["best"] == "g0a"
    events = [record.event for record in log(tmp_path)]
    failures = [event for event in events if isinstance(event, AttemptFailed)]
    assert {(each.version, each.kind) for each in failures} == {("g1a", "infrastructure")}
    assert all("Its provider answers others: it is given up" in each.message for each in failures)
    made = {(call.digest, call.n) for call in calls(tmp_path) if call.attempt.startswith("g1a.dev")}
    assert failures[-1].calls == len(made), "what told it from an outage is paid for too"
    (out,) = [event for event in events if isinstance(event, VersionRejected)]
    assert out.version == "g1a" and "it is given up" in out.reason
    assert {event.version for event in events if isinstance(event, Scored)} == {"g0a"}
    assert sum(isinstance(event, ServiceFailed) for event in events) == 1, "nobody is asked to look a second time"
    assert_none_left(children)


def test_a_candidate_whose_prompt_fails_the_provider_again_is_left_out_and_the_others_go_on(
    tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    poisoned = Poisoned(Fault("broken"), "# Change the harness", "You write candidate 2 of 2")
    summary, said = gone_on_once(tmp_path, task, poisoned, "--candidates", "2")
    assert "feedback_svc gave up after 1 try: ProviderAway" in said
    assert summary["outcome"] == "improved"
    (patched,) = [record.event for record in log(tmp_path) if isinstance(record.event, HarnessPatched)]
    assert patched.version == "g1a" and "left out: g1b: given up, since its provider answers others" in patched.reason
    assert_none_left(children)


@pytest.mark.slow  # a whole run, with tries that are waited for
def test_where_no_first_version_can_be_asked_for_the_reference_agent_goes_in(
    tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    summary, said = gone_on_once(tmp_path, task, Poisoned(Fault("garbage"), "# Write a first agent"))
    assert "meta_svc gave up after 5 tries: ModelAway" in said and summary["outcome"] == "improved"
    (first,) = [record.event for record in log(tmp_path) if isinstance(record.event, AgentProposed)]
    assert first.written is None and "given up, since its provider answers others" in first.reason
    assert_none_left(children)


@pytest.mark.parametrize(
    "kind", ["overloaded", *(pytest.param(k, marks=pytest.mark.slow) for k in ("unauthorised", "hang"))]
)
def test_no_version_is_judged_by_an_outage_however_often_the_run_is_gone_on_with(
    kind: Any, tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    author = Author()

    def leaves(wire: Wire, body: Mapping[str, Any]) -> Reply | Fault:
        return Fault(kind) if len(author.asked) >= 5 else author(wire, body)

    (tmp_path / "config.toml").write_text("[providers.openai]\ntimeout_s = 0.5\n")
    with Loopback(leaves) as provider:
        variables = {**reached(provider), "SIA_PATIENCE_S": "0.1"}
        stops = [sia(tmp_path, "run", task, *RUN, **variables), sia(tmp_path, "run", "--resume", "r1", **variables)]
    stops.append(sia(tmp_path, "run", "--resume", "r1", **variables))
    for stopped in stops:
        assert stopped.returncode == 1 and "target_runner gave up after 1 try" in stopped.stderr, stopped.stderr
    events = [record.event for record in log(tmp_path)]
    assert sum(isinstance(event, ServiceFailed) for event in events) == len(stops)
    assert not any(isinstance(event, AttemptFailed) for event in events)
    assert_none_left(children)
