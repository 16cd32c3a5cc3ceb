"""Rollouts out of recorded calls: each with its own reward, by item group, with the token ids that were sampled."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from sia_events.shared.calls import ModelCall, decode_call, encode_call, journal_key
from sia_events.trainer.rollouts import rollouts, to_lines

REWARDS = {"i1#0": 1.0, "i1#1": 0.0, "i2#0": 0.5}


def call(item: str | None, kind: str = "choice", reply: dict[str, Any] | None = None, **more: Any) -> ModelCall:
    prompt = {"prompt_token_ids": [5, 6]}
    choice = {**prompt, "choice": "hot", "index": 1, "logprobs": [-1.5, -0.25], "choice_token_ids": [[7], [8, 9]]}
    tokens = [{"token": "h", "logprob": -0.5}, {"token": "ot", "logprob": -0.125}]
    chat = {**prompt, "choices": [{"token_ids": [11, 12], "logprobs": {"content": tokens}}]}
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
        "reply": reply if reply is not None else choice if kind == "choice" else chat,
    }
    return ModelCall(**{**values, **more})


def test_a_choice_is_a_rollout_with_what_was_drawn_from_and_how_likely_it_was():
    assert rollouts([call("i1#0")], REWARDS) == [
        {
            "kind": "choice",
            "group": "i1",
            "item": "i1#0",
            "reward": 1.0,
            "prompt_ids": [5, 6],
            "temperature": 1.0,
            "index": 1,
            "logprobs": [-1.5, -0.25],
            "choice_ids": [[7], [8, 9]],
            "bias": [0.5, 0.0],
        }
    ]


def test_a_reply_is_a_rollout_with_its_tokens_as_they_were_sampled():
    assert rollouts([call("i2#0", "chat")], REWARDS) == [
        {
            "kind": "completion",
            "group": "i2",
            "item": "i2#0",
            "reward": 0.5,
            "prompt_ids": [5, 6],
            "temperature": 1.0,
            "completion_ids": [11, 12],
            "logprobs": [-0.5, -0.125],
        }
    ]


def test_samples_of_an_item_are_a_group_with_a_reward_each():
    found = rollouts([call("i1#0"), call("i1#1"), call("i2#0")], REWARDS)
    assert [(one["group"], one["reward"]) for one in found] == [("i1", 1.0), ("i1", 0.0), ("i2", 0.5)]


def test_every_call_made_for_an_item_is_a_rollout_with_the_items_reward():
    found = rollouts([call("i1#0", n=0), call("i1#0", "chat", n=1)], REWARDS)
    assert [one["kind"] for one in found] == ["choice", "completion"] and {one["reward"] for one in found} == {1.0}


def test_calls_without_an_item_a_reward_or_a_reply_are_left_out():
    unanswered = call("i1#0", error="no provider")
    assert rollouts([call(None), call("unheard of"), msgspec.structs.replace(unanswered, reply=None)], REWARDS) == []


def test_a_choice_without_bias_says_so():
    assert rollouts([call("i1#0", request={})], REWARDS)[0]["bias"] is None


def test_lines_are_one_json_object_a_rollout():
    found = rollouts([call("i1#0"), call("i2#0", "chat")], REWARDS)
    lines = to_lines(found).splitlines()
    assert [msgspec.json.decode(line) for line in lines] == found and to_lines([]) == b""


@given(st.text(max_size=20), st.integers(0, 2**31), st.floats(0, 1e6), st.dictionaries(st.text(max_size=5), st.text()))
def test_a_recorded_call_is_read_back_as_it_was(item: str, seed: int, usd: float, request: dict[str, str]):
    one = call(item, seed=seed, usd=usd, request=request)
    assert decode_call(encode_call(one)) == one and b"\n" not in encode_call(one)


def test_all_tries_of_an_attempt_share_a_journal():
    assert journal_key("g1a.gate.1~2") == journal_key("g1a.gate.1") == "g1a.gate.1" != journal_key("g1a.gate")
