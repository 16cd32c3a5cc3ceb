"""Rollouts out of recorded calls: whole attempts by item, token ids as sampled, and what is left out."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sia_events.shared.calls import ModelCall, decode_call, encode_call, journal_key
from sia_events.trainer.rollouts import Sample, Source, Step, gather, to_lines

REWARDS = {"i1#0": 1.0, "i1#1": 0.0, "i2#0": 0.5}
PROMPT = {"prompt_token_ids": [5, 6]}
CHOICE = {**PROMPT, "choice": "hot", "index": 1, "logprobs": [-1.5, -0.25], "choice_token_ids": [[7], [8, 9]]}
TOKENS = [{"token": "h", "logprob": -0.5}, {"token": "ot", "logprob": -0.125}]
CHAT = {**PROMPT, "choices": [{"token_ids": [11, 12], "logprobs": {"content": TOKENS}}]}


def call(item: str | None, kind: str = "choice", **more: Any) -> ModelCall:
    values = {
        "call": "c",
        "attempt": "g0a.train.g1",
        "version": "g0a",
        "kind": kind,
        "model": "local/m",
        "item": item,
        "digest": "d" * 64,
        "n": 0,
        "seed": 3,
        "request": {"bias": [0.5, 0.0]} if kind == "choice" else {},
        "reply": CHOICE if kind == "choice" else CHAT,
        "completion_tokens": 2,
    }
    return ModelCall(**{**values, **more})


def source(*calls: ModelCall, **more: Any) -> Source:
    return Source(**{"attempt": "a", "calls": calls, "rewards": REWARDS, "harness": "h", **more})


def left_out(*calls: ModelCall, **options: Any) -> dict[str, int]:
    found, counts = gather([source(*calls)], **options)
    assert found == []
    return {name: count for name, count in counts.items() if name != "no_calls"}


def test_a_choice_is_a_step_with_what_was_drawn_from_and_how_likely_it_was():
    (found,), _ = gather([source(call("i1#0"))])
    step = Step("choice", (5, 6), (-1.5, -0.25), ((7,), (8, 9)), 1, (0.5, 0.0))
    assert found == Sample("a/i1", "i1#0", 1.0, (step,), adapter=None, harness="h", lag=0)


def test_a_reply_is_a_step_with_its_tokens_as_they_were_sampled():
    (found,), _ = gather([source(call("i2#0", "chat"))])
    assert found.steps == (Step("completion", (5, 6), (-0.5, -0.125), completion_ids=(11, 12)),)


def test_samples_of_an_item_are_a_group_with_a_reward_each():
    found, _ = gather([source(call("i1#0"), call("i1#1"), call("i2#0"))])
    assert [(one.group, one.reward) for one in found] == [("a/i1", 1.0), ("a/i1", 0.0), ("a/i2", 0.5)]


def test_all_calls_for_an_item_are_one_attempt_in_the_order_in_which_they_were_made():
    calls = [call("i1#0", "chat", time="t2"), call("i1#0", time="t1"), call("i1#0", "chat", time="t2", n=1)]
    (found,), _ = gather([source(*calls)])
    assert [step.kind for step in found.steps] == ["choice", "completion", "completion"]


def test_rollouts_of_other_weights_make_groups_of_their_own_up_to_a_lag():
    old = source(call("i1#0", adapter="b1"), attempt="b", adapter="b1", lag=1)
    older = source(call("i1#0"), call("i1#0", n=1), call("i1#1"), attempt="c", lag=2)
    found, counts = gather([source(call("i1#0")), old, older], max_lag=1)
    assert [(one.group, one.adapter, one.lag) for one in found] == [("a/i1", None, 0), ("b/i1", "b1", 1)]
    assert counts == {"stale": 2}


def test_what_only_a_start_that_broke_off_was_told_has_no_part_in_the_reward():
    calls = [call("i1#0"), call("i1#0", "chat", n=1, other_start=True), call("i2#0", other_start=True)]
    found, counts = gather([source(*calls)])
    assert [(one.item, len(one.steps)) for one in found] == [("i1#0", 1)] and counts == {"other_start": 2}


def test_a_call_that_is_unfit_leaves_the_rest_of_its_attempt():
    (found,), counts = gather([source(call("i1#0"), call("i1#0", "chat", n=1, adapter="other"))])
    assert (len(found.steps), counts) == (1, {"other_weights": 1})


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (call(None), "no_item"),
        (call("unheard of"), "unrewarded"),
        (call("i1#0", adapter="another"), "other_weights"),
        (call("i1#0", "chat", request={"response_format": {"type": "json_object"}}), "constrained"),
        (call("i1#0", "chat", request={"response_format": {"type": "json_schema", "json_schema": {}}}), "constrained"),
        (call("i1#0", "chat", request={"tool_choice": "required"}), "constrained"),
        (call("i1#0", "chat", request={"tool_choice": {"type": "function", "function": {"name": "f"}}}), "constrained"),
        (call("i1#0", "chat", reply={**PROMPT, "choices": [{"token_ids": []}]}, completion_tokens=0), "empty"),
        (call("i1#0", "chat", reply={"choices": [{"message": {"content": "hot"}}]}), "no_token_ids"),
        (call("i1#0", "chat", reply={"content": [{"type": "text"}]}), "no_token_ids"),
        (call("i1#0", "chat", reply={**PROMPT, "choices": [{"token_ids": [11]}]}), "no_logprobs"),
        (call("i1#0", reply={**CHOICE, "logprobs": [None, 0.0]}), "no_logprobs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_learned_from_is_left_out_and_counted(made: ModelCall, word: str):
    assert left_out(made) == {word: 1}


def test_an_algorithm_that_needs_no_log_probs_takes_replies_without():
    made = call("i1#0", "chat", reply={**PROMPT, "choices": [{"token_ids": [11]}]})
    (found,), counts = gather([source(made)], needs_logprobs=False)
    assert (found.steps[0].logprobs, counts) == (None, {})


@pytest.mark.parametrize(
    "asked", [{"response_format": {"type": "text"}}, {"response_format": None}, {"tool_choice": "auto"}]
)
def test_a_reply_that_could_have_been_any_is_learned_from(asked: dict[str, Any]):
    assert gather([source(call("i1#0", "chat", request=asked))])[1] == {}


def test_what_a_grammar_shaped_is_imitated_or_compared_as_it_stands():
    made = call("i1#0", "chat", request={"tool_choice": "required"})
    (found,), counts = gather([source(made)], needs_logprobs=False)
    assert (found.steps[0].completion_ids, counts) == ((11, 12), {})


def test_a_call_longer_than_the_context_is_left_out():
    assert left_out(call("i1#0"), context=3) == {"too_long": 1}
    assert gather([source(call("i1#0"))], context=4)[1] == {}


def test_single_tries_were_drawn_as_the_agent_asked():
    rewards = {"i1": 1.0}

    def asked(kind: str, **request: Any) -> tuple[list[Sample], dict[str, int]]:
        found, counts = gather([source(call("i1", kind, request=request), rewards=rewards)])
        return found, {name: count for name, count in counts.items() if name != "no_calls"}

    assert asked("choice")[1] == asked("chat", temperature=0)[1] == {"temperature_0": 1}
    assert asked("chat", temperature=0.7)[0][0].steps[0].temperature == 0.7
    assert asked("chat", top_p=0.9)[1] == {"top_p": 1}


def test_lines_are_one_json_object_a_sample():
    found, _ = gather([source(call("i1#0"), call("i2#0", "chat"))])
    lines = to_lines(found).splitlines()
    assert [msgspec.json.decode(line, type=Sample) for line in lines] == found and to_lines([]) == b""


@given(st.text(max_size=20), st.integers(0, 2**31), st.floats(0, 1e6), st.dictionaries(st.text(max_size=5), st.text()))
def test_a_recorded_call_is_read_back_as_it_was(item: str, seed: int, usd: float, request: dict[str, str]):
    one = call(item, seed=seed, usd=usd, request=request)
    assert decode_call(encode_call(one)) == one and b"\n" not in encode_call(one)


def test_all_tries_of_an_attempt_share_a_journal():
    assert journal_key("g1a.gate.1~2") == journal_key("g1a.gate.1") == "g1a.gate.1" != journal_key("g1a.gate")
