"""Translation between OpenAI's chat completions and other providers' words: conversations, tools, formats, usage."""

from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from sia_events.infra.providers import anthropic_wire, google_wire
from sia_events.infra.providers.chat_parts import Untranslatable
from sia_events.infra.providers.failures import seconds_to_wait
from sia_events.shared.ports import Chat

READ = {"type": "function", "function": {"name": "read", "description": "a file", "parameters": {"type": "object"}}}


def used(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}, **more}


TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "read "}, {"type": "text", "text": "both"}]},
    {"role": "assistant", "content": None, "tool_calls": [used("one"), used("two")]},
    {"role": "tool", "tool_call_id": "one", "content": "1"},
    {"role": "tool", "tool_call_id": "two", "content": "2"},
    {"role": "developer", "content": "In German."},
]


def chat(messages: list[dict[str, Any]] = TALK, **changed: Any) -> Chat:
    return Chat("p/m", None, messages, **changed)


def to_anthropic(call: Chat) -> Mapping[str, Any]:
    return anthropic_wire.request(call, "m")


def to_google(call: Chat) -> Mapping[str, Any]:
    return {**google_wire.config(call), "contents": google_wire.contents(call.messages)}


def test_anthropic_gets_the_results_of_calls_made_side_by_side_in_one_message():
    body = to_anthropic(chat())
    assert body["system"] == "Be brief.\n\nIn German."
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][0]["content"] == [{"type": "text", "text": "read both"}]
    assert body["messages"][1]["content"][1] == {
        "type": "tool_use",
        "id": "two",
        "name": "read",
        "input": {"path": "a"},
    }
    assert [part["tool_use_id"] for part in body["messages"][2]["content"]] == ["one", "two"]


def test_google_gets_each_result_under_the_name_of_the_function_it_is_of():
    body = to_google(chat())
    assert body["system_instruction"] == "Be brief.\n\nIn German."
    assert [turn["role"] for turn in body["contents"]] == ["user", "model", "user"]
    results = [part["function_response"] for part in body["contents"][2]["parts"]]
    assert [(result["id"], result["name"], result["response"]) for result in results] == [
        ("one", "read", {"result": "1"}),
        ("two", "read", {"result": "2"}),
    ]


def test_googles_signature_of_a_call_goes_back_with_the_call_as_it_came():
    signature = bytes(range(240, 256))
    sent = {"functionCall": {"id": "one", "name": "read", "args": {}}, "thoughtSignature": _encoded(signature)}
    reply = google_wire.reply({"candidates": [{"content": {"parts": [sent]}, "finishReason": "STOP"}]}, "m")
    (turn,) = google_wire.contents([reply["choices"][0]["message"]])
    assert turn["parts"][0]["thought_signature"] == signature
    (unsigned,) = google_wire.contents([{"role": "assistant", "tool_calls": [used("one")]}])
    assert unsigned["parts"][0]["thought_signature"] == google_wire.UNSIGNED


@pytest.mark.parametrize(
    ("asked", "anthropic", "google"),
    [
        ("auto", {"type": "auto"}, {"mode": "AUTO"}),
        ("none", {"type": "none"}, {"mode": "NONE"}),
        ("required", {"type": "any"}, {"mode": "ANY"}),
        (
            {"type": "function", "function": {"name": "read"}},
            {"type": "tool", "name": "read"},
            {"mode": "ANY", "allowed_function_names": ["read"]},
        ),
    ],
)
def test_a_choice_of_tool_is_said_in_each_providers_words(asked: Any, anthropic: Any, google: Any):
    call = chat(tools=[READ], tool_choice=asked)
    assert to_anthropic(call)["tool_choice"] == anthropic
    assert to_google(call)["tool_config"] == {"function_calling_config": google}


def test_a_wanted_schema_is_handed_on():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    call = chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert to_anthropic(call)["output_config"] == {"format": {"type": "json_schema", "schema": schema}}
    assert to_google(call)["response_json_schema"] == schema


@pytest.mark.parametrize("translate", [to_anthropic, to_google])
@pytest.mark.parametrize(
    ("messages", "changed", "said"),
    [
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "'image_url'"),
        ([{"role": "narrator", "content": "x"}], {}, "'narrator'"),
        ([{"role": "user", "content": "x"}], {"tools": [{"type": "web_search"}]}, "'web_search'"),
        ([{"role": "user", "content": "x"}], {"response_format": {"type": "grammar"}}, "'grammar'"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "read", "arguments": "{"}}]}],
            {},
            "no JSON",
        ),
    ],
)
def test_what_a_provider_has_no_words_for_is_refused_and_named(
    translate: Callable[[Chat], Any], messages: Any, changed: Any, said: str
):
    with pytest.raises(Untranslatable, match=said):
        translate(chat(messages, **changed))


def test_anthropics_usage_has_the_cache_beside_the_input_and_openais_within_it():
    usage = {"input_tokens": 5, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 20, "output_tokens": 7}
    assert anthropic_wire.usage_of(usage) == {
        "prompt_tokens": 125,
        "completion_tokens": 7,
        "total_tokens": 132,
        "prompt_tokens_details": {"cached_tokens": 100, "cache_write_tokens": 20},
    }


def test_googles_thinking_is_counted_as_output_and_not_shown():
    parts = [{"text": "hm", "thought": True}, {"text": "yes"}]
    usage = {"promptTokenCount": 5, "candidatesTokenCount": 2, "thoughtsTokenCount": 40}
    candidate = {"content": {"parts": parts}, "finishReason": "STOP"}
    reply = google_wire.reply({"candidates": [candidate], "usageMetadata": usage}, "m")
    assert reply["choices"][0]["message"]["content"] == "yes"
    assert reply["usage"]["completion_tokens"] == 42


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Sun, 22 Nov 2026 12:00:30 GMT", "date": "Sun, 22 Nov 2026 12:00:00 GMT"}, 30.0),
        ({"retry-after": "Sun, 22 Nov 2026 11:00:00 GMT", "date": "Sun, 22 Nov 2026 12:00:00 GMT"}, 0.0),
        ({"retry-after": "inf"}, None),
    ],
)
def test_how_long_a_provider_asks_us_to_wait(headers: Mapping[str, str], seconds: float | None):
    assert seconds_to_wait(headers) == seconds


def _encoded(raw: bytes) -> str:
    return urlsafe_b64encode(raw).decode()
