"""The gateway: a token decides, every reply is on disk before it is given, and none is paid for twice."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from given import NOON

from sia_events.infra.instant import InstantModels
from sia_events.infra.memory import MemoryBus
from sia_events.model_gateway import door
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.ledger import Unlimited
from sia_events.model_gateway.token import TokenDoor, keep_secret
from sia_events.shared.calls import ModelCall, decode_call
from sia_events.shared.ports import BusFull, BusUnreachable, Chat, Choice, Envelope, ModelFailed, Text

SECRET = "a secret of the tests"
CLAIMS: dict[str, Any] = {
    "run": "r1",
    "attempt": "g0a.dev",
    "start": "first",
    "version": "g0a",
    "model": "instant/first",
    "adapter": None,
    "sample": False,
    "seed": 1,
    "expires": (NOON + timedelta(minutes=11)).timestamp(),
}
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
PICK = {**HELLO, "choices": ["hot", "cold"]}


class Noon:
    """The `Clock` port: noon, until it is put forward."""

    def __init__(self) -> None:
        self.time = NOON

    def now(self) -> datetime:
        return self.time


class Counting:
    """The `Models` port on the instant model: keeps what it was asked, and fails first if it is told to."""

    def __init__(self, *failures: ModelFailed) -> None:
        self.asked: list[Chat | Choice | Text] = []
        self.failures = list(failures)
        self.instant = InstantModels()

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        self._count(call)
        return await self.instant.chat(call)

    async def stream(self, call: Chat) -> AsyncIterator[Mapping[str, Any]]:
        self._count(call)
        async for part in self.instant.stream(call):
            yield part

    async def choose(self, call: Choice) -> Mapping[str, Any]:
        self._count(call)
        return await self.instant.choose(call)

    async def logprobs(self, text: Text) -> tuple[float, ...]:
        self._count(text)
        return await self.instant.logprobs(text)

    def _count(self, call: Chat | Choice | Text) -> None:
        self.asked.append(call)
        if self.failures:
            raise self.failures.pop(0)


class House:
    """A gateway on a bus, reached as an agent reaches it. A new house on the same bus is a gateway started again."""

    def __init__(self, bus: MemoryBus, models: Counting, patience: float = 120.0) -> None:
        self.bus, self.models, self.names = bus, models, list[str]()
        self.journal, self.clock = Journal(bus), Noon()
        calls = Calls(self.journal, self.find, self.clock, Unlimited(), patience)
        app = door.gateway(calls, SECRET, self.clock)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")

    def find(self, name: str) -> Counting:
        self.names.append(name)
        return self.models

    async def post(self, path: str, body: Any, token: str | None = None, **claims: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token if token is not None else signed(**claims)}"}
        content = body if isinstance(body, bytes | AsyncIterator) else json.dumps(body).encode()
        return await self.http.post(path, content=content, headers=headers)

    async def chat(self, body: Any = HELLO, **claims: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", body, **claims)

    async def choice(self, body: Any = PICK, **claims: Any) -> httpx.Response:
        return await self.post("/v1/choice", body, **claims)

    async def recorded(self, attempt: str = "g0a.dev") -> list[ModelCall]:
        return [decode_call(line) for each in await self.bus.traces("r1", "model_call", attempt) for line in each.lines]


def signed(secret: str = SECRET, **claims: Any) -> str:
    return TokenDoor(Path(), secret).token({**CLAIMS, **claims})


@pytest.fixture
def house() -> House:
    return House(MemoryBus(), Counting())


async def test_a_chat_is_answered_and_recorded_with_all_that_replay_and_training_need(house: House):
    reply = await house.chat({**HELLO, "metadata": {"item": "i7"}}, adapter="b" * 64)
    assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"] == "ok"
    (call,) = await house.recorded()
    assert call.reply == reply.json() and call.reply["prompt_token_ids"] and call.reply["choices"][0]["token_ids"]
    assert (call.attempt, call.version, call.kind, call.item) == ("g0a.dev", "g0a", "chat", "i7")
    assert (call.model, call.adapter) == ("instant/first", "b" * 64)
    assert call.time == "2026-01-01T12:00:00Z", "the table of calls reads the time in the form that records have"
    assert (call.n, call.prompt_tokens, call.completion_tokens, call.role) == (0, 1, 1, "target")
    assert call.request == {**HELLO, "metadata": {"item": "i7"}} and signed() not in str(call)


async def test_a_choice_is_answered_and_recorded(house: House):
    reply = (await house.choice({**PICK, "bias": [0.0, 1.5]})).json()
    assert reply["choice"] == "hot" and len(reply["logprobs"]) == 2
    (call,) = await house.recorded()
    (asked,) = house.models.asked
    assert call.kind == "choice" and isinstance(asked, Choice) and asked.bias == [0.0, 1.5]


@pytest.mark.parametrize(
    "token",
    [
        "",
        "nonsense",
        signed("another secret"),
        signed()[:-2],
        base64.urlsafe_b64encode(json.dumps(CLAIMS).encode()).decode() + ".x.y",
    ],
)
async def test_without_a_token_of_ours_nothing_is_asked_and_nothing_recorded(token: str, house: House):
    for path in ("/v1/chat/completions", "/v1/choice"):
        assert (await house.post(path, PICK, token=token)).status_code == 401
    assert (await house.http.get("/v1/models", headers={"Authorization": f"Bearer {token}"})).status_code == 401
    assert (await house.http.post("/v1/chat/completions", json=HELLO)).status_code == 401
    assert not house.models.asked and not await house.recorded()


async def test_a_token_is_taken_from_anthropics_header_too(house: House):
    reply = await house.http.post("/v1/chat/completions", json=HELLO, headers={"x-api-key": signed()})
    assert reply.status_code == 200


async def test_a_token_is_good_until_the_moment_that_it_was_signed_for(house: House):
    house.clock.time = NOON + timedelta(minutes=11, microseconds=-1)
    assert (await house.chat()).status_code == 200
    house.clock.time = NOON + timedelta(minutes=11)
    for late in (await house.chat(), await house.choice()):
        assert late.status_code == 401 and "the time of attempt g0a.dev is up" in late.json()["error"]["message"]
    listed = await house.http.get("/v1/models", headers={"Authorization": f"Bearer {signed()}"})
    assert listed.status_code == 401
    assert len(house.models.asked) == len(await house.recorded()) == 1


async def test_a_moment_moved_in_a_token_that_was_signed_moves_nothing(house: House):
    signature = signed().rpartition(".")[2]
    body = signed("another secret", expires=4e9).rpartition(".")[0]
    forged = f"{body}.{signature}"
    assert (await house.post("/v1/chat/completions", HELLO, token=forged)).status_code == 401


def test_a_token_that_never_expires_is_not_made():
    with pytest.raises(msgspec.ValidationError, match="expires"):
        TokenDoor(Path(), SECRET).token({name: claim for name, claim in CLAIMS.items() if name != "expires"})


def test_a_token_with_other_claims_than_the_gateway_knows_is_not_made():
    with pytest.raises(msgspec.ValidationError, match="admin"):
        signed(admin=True)


@pytest.mark.parametrize("name", [None, "instant/first", "first"])
async def test_the_versions_own_model_and_adapter_answer_whether_it_is_named_with_its_provider_or_not(
    name: str | None, house: House
):
    await house.chat(HELLO if name is None else {**HELLO, "model": name}, adapter="c" * 64)
    (asked,) = house.models.asked
    assert house.names == ["instant/first"] and (asked.model, asked.adapter) == ("instant/first", "c" * 64)


@pytest.mark.parametrize("name", ["expensive/best", "best", "", 7, "instant/first "])
async def test_another_model_than_the_tokens_is_refused_and_the_answer_says_which_may_be_asked(name: Any, house: House):
    reply = await house.chat({**HELLO, "model": name}, models=["instant/second"])
    assert reply.status_code == 403 and reply.json()["error"]["type"] == "permission_error"
    assert "instant/first, instant/second" in reply.json()["error"]["message"]
    assert not house.models.asked and not await house.recorded()


async def test_a_token_may_name_more_models_and_those_answer_without_the_versions_adapter(house: House):
    claims: dict[str, Any] = {"models": ["instant/second"], "adapter": "c" * 64, "role": "feedback"}
    await house.chat({**HELLO, "model": "second"}, **claims)
    (asked,) = house.models.asked
    (call,) = await house.recorded()
    assert (asked.model, asked.adapter) == (call.model, call.adapter) == ("instant/second", None)
    assert call.role == "feedback"
    listed = await house.http.get("/v1/models", headers={"Authorization": f"Bearer {signed(**claims)}"})
    assert [model["id"] for model in listed.json()["data"]] == ["instant/first", "instant/second"]


async def test_where_any_model_may_be_named_the_versions_own_answers(house: House):
    await house.chat({**HELLO, "model": "expensive/best"}, any_model=True, adapter="c" * 64)
    (asked,) = house.models.asked
    assert house.names == ["instant/first"] and (asked.model, asked.adapter) == ("instant/first", "c" * 64)


async def test_started_again_the_gateway_gives_the_recorded_replies_and_asks_nobody(house: House):
    first = [(await house.chat()).content, (await house.choice()).content, (await house.chat()).content]
    again = House(house.bus, Counting())
    second = [(await each).content for each in (again.chat(start="x"), again.choice(start="x"), again.chat(start="x"))]
    assert second == first and not again.models.asked
    assert len(await house.recorded()) == 3


async def test_an_attempt_started_again_goes_on_asking_where_its_record_ends(house: House):
    await house.chat()
    again = House(house.bus, Counting())
    await again.chat(start="x")
    await again.chat(start="x")
    assert len(again.models.asked) == 1 and [call.n for call in await house.recorded()] == [0, 1]


async def test_a_second_try_of_an_attempt_shares_the_journal_of_the_first(house: House):
    await house.chat()
    await house.chat(attempt="g0a.dev~1", start="second")
    assert len(house.models.asked) == 1


async def test_another_attempt_another_run_and_another_request_are_asked_anew(house: House):
    for claims in ({}, {"attempt": "g0a.gate"}, {"run": "r2"}):
        await house.chat(start=str(claims), **claims)
    await house.chat({**HELLO, "temperature": 0.5})
    assert len(house.models.asked) == 4


async def test_a_request_whose_keys_stand_in_another_order_is_the_same_request(house: House):
    await house.chat({"messages": HELLO["messages"], "max_tokens": 8})
    await house.chat({"max_tokens": 8, "messages": HELLO["messages"]}, start="x")
    assert len(house.models.asked) == 1


async def test_equal_requests_at_the_same_time_are_numbered_and_each_drawn_with_a_seed_of_its_own(house: House):
    await asyncio.gather(*(house.chat() for _ in range(20)))
    calls = await house.recorded()
    assert sorted(call.n for call in calls) == list(range(20))
    assert len({call.seed for call in calls}) == len({call.call for call in calls}) == 20
    assert {call.seed for call in calls} == {asked.seed for asked in house.models.asked}
    again = House(house.bus, Counting())
    await asyncio.gather(*(again.chat(start="x") for _ in range(20)))
    assert not again.models.asked and len(await house.recorded()) == 20


async def test_seeds_depend_on_the_attempts_seed_and_on_nothing_that_changes_between_starts(house: House):
    await house.chat()
    other = House(MemoryBus(), Counting())
    await other.chat(start="much later")
    third = House(MemoryBus(), Counting())
    await third.chat(seed=2)
    assert house.models.asked[0].seed == other.models.asked[0].seed != third.models.asked[0].seed


async def test_an_attempt_that_samples_draws_at_temperature_1_whatever_it_asks_for(house: House):
    await house.chat({**HELLO, "temperature": 0, "top_p": 0.1}, sample=True)
    await house.choice({**PICK, "temperature": 0}, sample=True)
    chat, choice = house.models.asked
    assert isinstance(chat, Chat) and (chat.temperature, chat.top_p, choice.temperature) == (1.0, 1.0, 1.0)


async def test_an_attempt_that_does_not_sample_gets_what_it_asks_for(house: House):
    body = {**HELLO, "temperature": 0.25, "top_p": 0.5, "max_tokens": 9, "stop": "\n", "seed": 99}
    await house.chat(body)
    (asked,) = house.models.asked
    assert isinstance(asked, Chat)
    assert (asked.temperature, asked.top_p, asked.max_tokens, list(asked.stop)) == (0.25, 0.5, 9, ["\n"])
    assert asked.seed != 99, "seeds are the platform's"


async def test_a_provider_that_fails_is_asked_again():
    house = House(MemoryBus(), Counting(ModelFailed(503, "starting"), ModelFailed(500, "still starting")))
    assert (await house.chat()).status_code == 200
    assert len(house.models.asked) == 3 and [call.error for call in await house.recorded()] == [None]


async def test_a_provider_that_goes_on_failing_is_recorded_as_an_error_and_asked_again_by_the_next_start():
    house = House(MemoryBus(), Counting(ModelFailed(503, "out of order")), patience=0.0)
    reply = await house.chat()
    assert reply.status_code == 503 and "out of order" in reply.json()["error"]["message"]
    (call,) = await house.recorded()
    assert call.reply is None and call.error == "out of order"
    assert (await house.chat(start="next")).status_code == 200
    assert len(house.models.asked) == 2


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_what_a_provider_refuses_is_the_callers_to_know_and_not_asked_again(status: int):
    house = House(MemoryBus(), Counting(ModelFailed(status, "context too long")))
    reply = await house.chat()
    assert (reply.status_code, reply.json()["error"]["message"]) == (status, "context too long")
    assert len(house.models.asked) == 1


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("chat/completions", b"{", "no JSON object"),
        ("chat/completions", b"[]", "no JSON object"),
        ("chat/completions", b"\xff", "no JSON object"),
        ("chat/completions", b"[" * 100_000, "no JSON object"),
        ("chat/completions", {}, "messages"),
        ("chat/completions", {"messages": "hello"}, "messages"),
        ("chat/completions", {**HELLO, "temperature": "hot"}, "temperature"),
        ("chat/completions", {**HELLO, "max_tokens": 5000}, "max_tokens 5000 is over 4096"),
        ("chat/completions", {**HELLO, "functions": []}, "send them as `tools`"),
        ("choice", {**PICK, "stream": True}, "stream"),
        ("chat/completions", {**HELLO, "n": 2}, "n > 1"),
        ("choice", HELLO, "list of choices"),
        ("choice", {**HELLO, "choices": []}, "list of choices"),
        ("choice", {**PICK, "bias": [1.0]}, "1 biases for 2 choices"),
        ("choice", {**PICK, "bias": ["a", "b"]}, "bias"),
        ("choice", {**PICK, "temperature": "hot"}, "temperature"),
        ("choice", {**PICK, "temperature": None}, "temperature"),
        ("chat/completions", {**HELLO, "max_tokens": 0}, "max_tokens"),
        ("chat/completions", {**HELLO, "max_tokens": -5}, "max_tokens"),
        ("chat/completions", {**HELLO, "temperature": -1}, "temperature"),
    ],
)
async def test_a_request_that_cannot_be_served_is_told_why_and_leaves_no_trace(
    path: str, body: Any, message: str, house: House
):
    reply = await house.post(f"/v1/{path}", body)
    assert reply.status_code == 400 and message in reply.json()["error"]["message"]
    assert not house.models.asked and not await house.recorded()


async def test_a_body_without_end_is_cut_off(house: House):
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b"x" * 65536

    reply = await house.post("/v1/chat/completions", endless())
    assert reply.status_code == 413 and sent * 65536 < 2 * door.MAX_BODY


async def test_a_reply_is_on_disk_before_it_is_given():
    class Slow(MemoryBus):
        """A bus whose disk waits until it is told to go on."""

        def __init__(self) -> None:
            super().__init__()
            self.reached, self.go = asyncio.Event(), asyncio.Event()

        async def trace(self, envelope: Envelope) -> None:
            self.reached.set()
            await self.go.wait()
            await super().trace(envelope)

    bus = Slow()
    house = House(bus, Counting())
    asking = asyncio.create_task(house.chat())
    await bus.reached.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    assert not asking.done() and not await house.recorded()
    bus.go.set()
    assert (await asking).status_code == 200 and len(await house.recorded()) == 1


class Full(MemoryBus):
    async def trace(self, envelope: Envelope) -> None:
        raise BusFull("no room")


async def test_a_reply_that_cannot_be_recorded_is_not_given():
    refused = await House(Full(), Counting()).chat()
    assert refused.status_code == 500 and "no room" in refused.text and "choices" not in refused.json()


@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        ("/v1/chat/completions", HELLO, "[DONE]"),
        ("/v1/messages", {**HELLO, "max_tokens": 9}, "message_stop"),
        ("/v1/responses", {"input": "hello"}, "response.completed"),
    ],
)
async def test_a_streamed_reply_that_cannot_be_recorded_ends_in_an_error_and_not_as_a_whole_one(
    path: str, body: dict[str, Any], end: str
):
    whole = await House(MemoryBus(), Counting()).post(path, {**body, "stream": True})
    assert end in whole.text
    cut = await House(Full(), Counting()).post(path, {**body, "stream": True})
    assert "no room" in cut.text and end not in cut.text


async def test_a_reply_that_was_recorded_unheard_is_given_when_it_is_asked_for_again_and_not_paid_for_again():
    class Deaf(MemoryBus):
        """A bus whose answer is lost."""

        async def trace(self, envelope: Envelope) -> None:
            await super().trace(envelope)
            raise BusUnreachable("no answer")

    house = House(Deaf(), Counting())
    assert (await house.chat()).status_code == 500
    assert (await house.chat()).status_code == 200
    assert len(house.models.asked) == len(await house.recorded()) == 1


async def test_closing_waits_until_what_was_answered_is_on_disk(house: House):
    asking = asyncio.create_task(house.chat())
    while not house.models.asked:  # noqa: ASYNC110 - it waits in the journal now, for 10 ms
        await asyncio.sleep(0)
    asking.cancel()
    await house.journal.close()
    assert len(await house.recorded()) == 1
    again = House(house.bus, Counting())
    assert (await again.chat()).status_code == 200 and not again.models.asked


async def test_a_caller_that_goes_away_costs_no_other_its_reply_and_its_own_is_kept():
    house = House(MemoryBus(), Counting())
    bodies = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(8)]
    asking = [asyncio.create_task(house.chat(body)) for body in bodies]
    while len(house.models.asked) < len(bodies):  # noqa: ASYNC110 - as above
        await asyncio.sleep(0)
    asking[0].cancel()
    async with asyncio.timeout(10):
        assert [(await each).status_code for each in asking[1:]] == [200] * 7
    assert (await house.chat(bodies[0], start="x")).status_code == 200
    assert len(house.models.asked) == len(await house.recorded()) == 8


async def test_many_calls_at_once_share_few_writes_and_all_are_there(house: House):
    bodies = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(300)]
    replies = await asyncio.gather(*(house.chat(body) for body in bodies))
    assert {reply.status_code for reply in replies} == {200}
    envelopes = await house.bus.traces("r1", "model_call", "g0a.dev")
    assert sum(len(each.lines) for each in envelopes) == 300 and len(envelopes) < 100


def test_the_secret_is_drawn_once_and_for_its_owner_only(tmp_path: Any):
    secret = keep_secret(tmp_path, None)
    assert keep_secret(tmp_path, None) == secret and len(secret) >= 32
    assert (tmp_path / "gateway.secret").stat().st_mode & 0o077 == 0
    assert keep_secret(tmp_path, "given") == "given"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**HELLO, "stream": True}),
        ("/v1/messages", {**HELLO, "max_tokens": 9}),
        ("/v1/messages", {**HELLO, "max_tokens": 9, "stream": True}),
        ("/v1/responses", {"input": "hello", "stream": True}),
    ],
)
async def test_on_every_wire_and_in_streams_the_record_keeps_what_training_needs(
    path: str, body: dict[str, Any], house: House
):
    reply = await house.post(path, {**body, "metadata": {"item": "i7"}}, sample=True)
    assert reply.status_code == 200 and "ok" in reply.text
    (call,) = await house.recorded()
    (asked,) = house.models.asked
    assert isinstance(asked, Chat) and asked.temperature == 1.0 and call.item == "i7" and call.reply
    whole = await house.models.instant.chat(asked)
    assert call.reply["prompt_token_ids"] == whole["prompt_token_ids"]
    (said,), (meant,) = call.reply["choices"], whole["choices"]
    assert (said["token_ids"], said["logprobs"]) == (meant["token_ids"], meant["logprobs"])


async def test_an_attempt_makes_no_more_calls_than_it_may_and_recorded_ones_are_answered_still(house: House):
    for word in "abc":
        body = {**HELLO, "messages": [{"role": "user", "content": word}]}
        reply = await house.chat(body, calls=2, start=f"first {word}")
        assert reply.status_code == (429 if word == "c" else 200)
    assert "may make 2 model calls" in reply.text
    again = await house.chat({**HELLO, "messages": [{"role": "user", "content": "a"}]}, calls=2, start="again")
    assert again.status_code == 200
