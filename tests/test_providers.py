"""Each provider's adapter through its real SDK: plain, tools, streams, and every way in which a provider fails."""

import asyncio
import gc
import socket
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from importlib.util import find_spec
from itertools import chain, repeat
from typing import Any

import pytest
from loopback import Fault, Loopback, Reply, ToolCall, Wire

from sia_events.infra.instant import InstantModels
from sia_events.infra.providers.finder import Providers
from sia_events.shared.ports import Chat, Choice, FailedCall, ModelFailed
from sia_events.shared.providers import Kind, Provider, built_in

KEY = "sk-a-key-that-nobody-may-see"
HOSTED = ("openai", "anthropic", "google")
LITELLM = pytest.param("litellm", marks=pytest.mark.skipif(find_spec("litellm") is None, reason="the extra litellm"))
READ = {
    "type": "function",
    "function": {"name": "read", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}},
}
ASKED = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"})
USED = Reply("let me look", tools=(ToolCall("read", {"path": "a.txt"}),), cached_tokens=3)


@asynccontextmanager
async def asking(kind: Kind, *answers: Reply | Fault, **row: Any) -> AsyncIterator[tuple[Loopback, Any]]:
    """A provider that gives these answers, the last of them for ever, and our models that ask it."""
    coming = chain(answers or [Reply()], repeat(answers[-1] if answers else Reply()))

    def script(wire: Wire, body: Mapping[str, Any]) -> Reply | Fault:
        return next(coming)

    async with Loopback(script) as provider:
        url = {"anthropic": provider.anthropic, "google": provider.google}.get(kind, provider.openai)
        table = {kind: Provider(kind=kind, base_url=url, key_env="A_KEY", **row)}
        providers = Providers(table, {"A_KEY": KEY})
        try:
            yield provider, providers.find(f"{kind}/m")
        finally:
            await providers.aclose()


def call(kind: Kind, **changed: Any) -> Chat:
    """litellm wants to be told in the name which of its providers it is."""
    return Chat("litellm/openai/m" if kind == "litellm" else f"{kind}/m", None, ASKED, **changed)


def text(chunks: list[Mapping[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


@pytest.mark.parametrize("kind", [*HOSTED, LITELLM])
async def test_a_reply_comes_back_as_a_chat_completion_with_its_usage(kind: Kind):
    async with asking(kind, Reply("hello you", cached_tokens=3)) as (provider, models):
        reply = await models.chat(call(kind))
    choice = reply["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("hello you", "stop")
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (11, 7, 18)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3
    assert [asked.body["model"] for asked in provider.requests] == ["m"]


@pytest.mark.parametrize("kind", [*HOSTED, LITELLM])
async def test_a_stream_adds_up_to_the_reply_and_ends_with_the_usage(kind: Kind):
    async with asking(kind, USED) as (_, models):
        chunks = [chunk async for chunk in models.stream(call(kind, tools=[READ]))]
    assert text(chunks) == "let me look"
    named, arguments = "", ""
    for chunk in chunks[:-1]:
        for part in chunk["choices"][0]["delta"].get("tool_calls") or ():
            assert part["index"] == 0
            named += part["function"].get("name") or ""
            arguments += part["function"].get("arguments") or ""
    assert (named, arguments) == ("read", '{"path": "a.txt"}')
    assert [c["choices"][0].get("finish_reason") for c in chunks[:-1]][-1] == "tool_calls"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 18
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


@pytest.mark.parametrize("kind", HOSTED)
async def test_the_first_word_of_a_stream_is_here_before_the_provider_has_said_the_second(kind: Kind):
    async with asking(kind, Reply("one two", held=True)) as (provider, models):
        seen: list[Mapping[str, Any]] = []
        async with aclosing(models.stream(call(kind))) as chunks:
            async for chunk in chunks:
                seen.append(chunk)
                if text(seen) == "one ":
                    provider.release()
    assert text(seen) == "one two"


@pytest.mark.parametrize("kind", [*HOSTED, LITELLM])
async def test_a_conversation_with_tools_can_be_gone_on_with(kind: Kind):
    async with asking(kind, USED, Reply("done")) as (_, models):
        first = await models.chat(call(kind, tools=[READ], tool_choice="required"))
        message = first["choices"][0]["message"]
        assert first["choices"][0]["finish_reason"] == "tool_calls"
        assert message["tool_calls"][0]["function"] == {"name": "read", "arguments": '{"path": "a.txt"}'}
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "42"}
        again = Chat(call(kind).model, None, (*ASKED, message, result), tools=[READ])
        second = await models.chat(again)
    assert second["choices"][0]["message"]["content"] == "done"


FAILURES: list[tuple[str, int, FailedCall]] = [
    ("rate_limited", 429, "rate_limited"),
    ("broken", 503, "unavailable"),
    ("overloaded", 503, "unavailable"),
    ("dropped", 503, "unavailable"),
    ("unauthorised", 401, "no_key"),
    ("unknown_model", 404, "unknown_model"),
    ("bad_request", 400, "refused"),
    ("garbage", 502, "garbage"),
    ("empty", 502, "garbage"),
    ("wrong_type", 502, "garbage"),
    ("cut", 502, "garbage"),
]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("fault", "status", "kind_of"), FAILURES, ids=[name for name, _, _ in FAILURES])
@pytest.mark.parametrize("kind", HOSTED)
async def test_each_failure_has_its_kind_and_no_message_has_the_key(
    kind: Kind, fault: Any, status: int, kind_of: FailedCall, streamed: bool
):
    async with asking(kind, Fault(fault)) as (provider, models):
        with pytest.raises(ModelFailed) as raised:
            await _asked(models, call(kind), streamed)
        assert (raised.value.status, raised.value.kind) == (status, kind_of)
        assert kind in str(raised.value)
        assert provider.count == 1, "the gateway tries again, the SDK must not"
    assert KEY not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", [LITELLM])
@pytest.mark.parametrize("fault", [name for name, _, _ in FAILURES])
async def test_litellm_fails_typed_too_though_it_calls_garbage_a_breakdown(kind: Kind, fault: Any, streamed: bool):
    async with asking(kind, Fault(fault)) as (_, models):
        with pytest.raises(ModelFailed) as raised:
            await _asked(models, call(kind), streamed)
    assert raised.value.kind in {kind_of for name, _, kind_of in FAILURES if name == fault} | {"unavailable"}
    assert KEY not in str(raised.value)


async def _asked(models: Any, asked: Chat, streamed: bool) -> None:
    if streamed:
        async for _ in models.stream(asked):
            pass
    else:
        await models.chat(asked)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", HOSTED)
async def test_a_provider_that_hangs_is_given_up_after_its_timeout(kind: Kind, streamed: bool):
    async with asking(kind, Fault("hang"), timeout_s=0.3) as (_, models):
        with pytest.raises(ModelFailed, match=r"no answer in 0\.3 s") as raised:
            await _asked(models, call(kind), streamed)
    assert (raised.value.status, raised.value.kind) == (504, "timeout")


@pytest.mark.parametrize("kind", HOSTED)
async def test_a_provider_that_is_not_there_is_unavailable_and_named(kind: Kind):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    providers = Providers({kind: Provider(kind=kind, base_url=url)}, {})
    with pytest.raises(ModelFailed, match=f"{kind} at {url}") as raised:
        await providers.find(f"{kind}/m").chat(call(kind))
    await providers.aclose()
    assert (raised.value.status, raised.value.kind) == (503, "unavailable")


@pytest.mark.parametrize("kind", HOSTED)
async def test_the_wait_that_a_provider_asks_for_is_handed_on(kind: Kind):
    async with asking(kind, Fault("rate_limited", retry_after="7")) as (_, models):
        with pytest.raises(ModelFailed) as raised:
            await models.chat(call(kind))
    assert raised.value.retry_after == 7.0


@pytest.mark.parametrize("kind", HOSTED)
async def test_a_wait_until_a_date_is_counted_from_the_replys_own_date(kind: Kind):
    async with asking(kind, Fault("rate_limited", retry_after="Fri, 31 Dec 2100 23:59:59 GMT")) as (_, models):
        with pytest.raises(ModelFailed) as raised:
            await models.chat(call(kind))
    assert raised.value.retry_after and raised.value.retry_after > 365 * 86400


@pytest.mark.parametrize("kind", HOSTED)
async def test_a_model_that_declines_has_answered(kind: Kind):
    async with asking(kind, Fault("refusal")) as (_, models):
        choice = (await models.chat(call(kind)))["choices"][0]
        chunks = [chunk async for chunk in models.stream(call(kind))]
    assert choice["message"]["content"] is None
    assert choice["message"]["refusal"]
    assert any(chunk["choices"][0]["delta"].get("refusal") for chunk in chunks[:-1])


@pytest.mark.parametrize("kind", HOSTED)
async def test_a_reply_that_met_the_limit_says_so(kind: Kind):
    async with asking(kind, Reply("half a", finish="length")) as (_, models):
        assert (await models.chat(call(kind)))["choices"][0]["finish_reason"] == "length"
        ends = [c["choices"][0]["finish_reason"] async for c in models.stream(call(kind)) if c["choices"]]
    assert ends[-1] == "length"


@pytest.mark.parametrize("kind", HOSTED)
async def test_a_provider_has_as_many_calls_at_once_as_its_row_allows(kind: Kind):
    two, under_way, most = threading.Barrier(2), set[int](), 0

    def script(wire: Wire, body: Mapping[str, Any]) -> Reply:
        nonlocal most
        under_way.add(threading.get_ident())
        most = max(most, len(under_way))
        two.wait(timeout=30)
        under_way.discard(threading.get_ident())
        return Reply()

    async with asking(kind, concurrency=2) as (provider, models):
        provider.script = script
        await asyncio.gather(*(models.chat(call(kind)) for _ in range(6)))
    assert (provider.count, most) == (6, 2)


@pytest.mark.parametrize("kind", HOSTED)
async def test_choice_calls_are_unsupported_and_nothing_is_asked(kind: Kind):
    async with asking(kind) as (provider, models):
        with pytest.raises(ModelFailed) as raised:
            await models.choose(Choice(f"{kind}/m", None, ASKED, ["a", "b"]))
        assert (raised.value.status, raised.value.kind, provider.count) == (400, "unsupported", 0)


@pytest.mark.parametrize("kind", HOSTED)
async def test_what_is_left_to_the_provider_is_not_sent(kind: Kind):
    async with asking(kind) as (provider, models):
        await models.chat(call(kind, temperature=None, top_p=None))
        await models.chat(call(kind, temperature=0.5, top_p=0.9))
        bare, full = (str(asked.body) for asked in provider.requests)
    assert "temperature" not in bare and "top" not in bare
    assert "0.5" in full and "0.9" in full


async def test_a_sampling_argument_that_a_model_refuses_is_left_out_from_then_on():
    def script(wire: Wire, body: Mapping[str, Any]) -> Reply | Fault:
        refusal = Fault("bad_request", message="`temperature` is deprecated for this model.")
        return refusal if "temperature" in body else Reply()

    async with Loopback(script) as provider:
        providers = Providers({"anthropic": Provider(kind="anthropic", base_url=provider.anthropic)}, {})
        models = providers.find("anthropic/m")
        await models.chat(call("anthropic", temperature=0.0))
        assert ["temperature" in asked.body for asked in provider.requests] == [True, False]
        await models.chat(call("anthropic", temperature=0.0))
        assert provider.count == 3
        await providers.aclose()


async def test_anthropics_own_wire_passes_through_untranslated():
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}], "top_k": 3}
    async with asking("anthropic", USED) as (provider, models):
        assert models.wires == {"anthropic"}
        message = await models.forward("anthropic", body)
        events = [event async for event in models.forward_stream("anthropic", body)]
        assert [asked.body for asked in provider.requests] == [body, {**body, "stream": True}]
    assert [block["type"] for block in message["content"]] == ["text", "tool_use"]
    assert (events[0]["type"], events[-1]["type"]) == ("message_start", "message_stop")


async def test_the_names_of_beta_features_go_where_anthropic_reads_them():
    body = {"model": "m", "max_tokens": 9, "messages": [], "betas": ["one-2026", "two-2026"]}
    async with asking("anthropic") as (provider, models):
        await models.forward("anthropic", body)
        asked = provider.requests[0]
    assert asked.headers["anthropic-beta"] == "one-2026,two-2026"
    assert "betas" not in asked.body


async def test_openais_responses_pass_through_untranslated_where_the_endpoint_has_them():
    body = {"model": "m", "input": "hello", "reasoning": {"effort": "low"}}
    async with asking("openai", USED, responses=True) as (provider, models):
        assert models.wires == {"responses"}
        reply = await models.forward("responses", body)
        events = [event async for event in models.forward_stream("responses", body)]
        assert [asked.body for asked in provider.requests] == [body, {**body, "stream": True}]
    assert [item["type"] for item in reply["output"]] == ["message", "function_call"]
    assert (events[0]["type"], events[-1]["type"]) == ("response.created", "response.completed")


@pytest.mark.parametrize(("kind", "wire"), [("anthropic", "anthropic"), ("openai", "responses")])
@pytest.mark.parametrize(("fault", "status", "kind_of"), FAILURES, ids=[name for name, _, _ in FAILURES])
async def test_what_is_forwarded_fails_as_everything_else_does(
    kind: Kind, wire: Any, fault: Any, status: int, kind_of: FailedCall
):
    body = {"model": "m", "max_tokens": 9, "messages": [], "input": "hello"}
    async with asking(kind, Fault(fault), responses=True) as (_, models):
        with pytest.raises(ModelFailed) as whole:
            await models.forward(wire, body)
        with pytest.raises(ModelFailed) as streamed:
            async for _ in models.forward_stream(wire, body):
                pass
    for raised in (whole, streamed):
        assert (raised.value.status, raised.value.kind) == (status, kind_of)
        assert KEY not in str(raised.value)


async def test_only_openais_own_endpoint_is_taken_to_have_the_responses_api():
    find = Providers(built_in(), {"OPENAI_API_KEY": KEY, "TOGETHER_API_KEY": KEY})
    own: Any = find.find("openai/m")
    other: Any = find.find("together/m")
    assert (own.wires, other.wires) == ({"responses"}, frozenset())
    await find.aclose()


async def test_a_row_without_a_place_is_asked_at_the_vendor_of_its_kind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    find = Providers({"second": Provider(kind="openai")}, {})
    models: Any = find.find("second/m")
    assert models.wires == {"responses"}, "as only OpenAI's own endpoint is taken to have"
    await find.aclose()


async def test_a_provider_is_found_by_the_first_part_of_the_name_and_made_once():
    async with Loopback() as provider:
        row = Provider(kind="openai", base_url=provider.openai)
        instant = InstantModels()
        providers = Providers({"mine": row, "instant": Provider(kind="instant")}, {}, {"instant": instant})
        assert providers.find("mine/some/model") is providers.find("mine/other")
        assert providers.find("instant/first") is instant
        await providers.find("mine/some/model").chat(Chat("mine/some/model", None, ASKED))
        assert provider.requests[0].body["model"] == "some/model"
        await providers.aclose()


@pytest.mark.parametrize(
    ("model", "status", "kind_of", "said"),
    [
        ("nobody/m", 404, "unknown_model", "it is provider/name, of anthropic, google"),
        ("gpt-5", 404, "unknown_model", "'gpt-5'"),
        ("openai/", 404, "unknown_model", "'openai/'"),
        ("openai/gpt-5", 401, "no_key", "the variable OPENAI_API_KEY is not set"),
        ("local/m", 400, "unsupported", "not served here"),
    ],
)
def test_a_model_that_cannot_be_asked_is_refused_with_the_reason(
    model: str, status: int, kind_of: FailedCall, said: str
):
    with pytest.raises(ModelFailed, match=said) as raised:
        Providers(built_in(), {"OPENAI_API_KEY": ""}).find(model)
    assert (raised.value.status, raised.value.kind) == (status, kind_of)


async def test_a_key_of_the_environment_goes_to_no_provider_that_it_was_not_given_to(monkeypatch: pytest.MonkeyPatch):
    for variable in (
        "OPENAI_API_KEY",
        "OPENAI_ADMIN_KEY",
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_AUTH_TOKEN",
        "GEMINI_API_KEY",
    ):
        monkeypatch.setenv(variable, KEY)
    for kind in HOSTED:
        async with Loopback() as provider:
            base = provider.openai if kind == "openai" else provider.url
            providers = Providers({kind: Provider(kind=kind, base_url=base)}, {})  # type: ignore[arg-type]
            await providers.find(f"{kind}/m").chat(call(kind))  # type: ignore[arg-type]
            assert KEY not in str(provider.requests[0].headers)
            await providers.aclose()


async def test_an_sdk_once_loaded_is_nothing_that_the_garbage_collector_looks_through_again():
    providers = Providers(built_in(), {"OPENAI_API_KEY": KEY})
    providers.find("openai/m")
    await providers.aclose()
    assert all(looked_through is not vars(sys.modules["openai"]) for looked_through in gc.get_objects())
