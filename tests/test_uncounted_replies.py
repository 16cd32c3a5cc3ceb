"""A reply that tells no count of its tokens is taken to have used all that was set aside for it, on every wire."""

from collections.abc import Mapping
from typing import Any

import pytest
from gateway_house import ANTHROPIC, COMPATIBLE, GOOGLE, OPENAI, Clock, House, house
from loopback import Reply
from story import started
from test_gateway_faults import EVERY_WIRE, Purse

from sia_events.infra.memory import MemoryBus
from sia_events.model_gateway.budget import Ledger
from sia_events.shared.events import Budget, BudgetExhausted
from sia_events.shared.record import opening

UNCOUNTED = Reply("good day", counted=False)
EVERY = pytest.mark.parametrize("model", [COMPATIBLE, OPENAI, ANTHROPIC, GOOGLE])


def a_dollar_a_thousand(model: str, usage: Mapping[str, Any]) -> float | None:
    return (usage["prompt_tokens"] + usage["completion_tokens"]) / 1000


async def asked(there: House, model: str, path: str, body: dict[str, Any], start: str, stream: bool) -> int:
    async with there.http(model, start=start) as client:
        reply = await client.post(path, json={**body, "stream": stream, "metadata": {"start": start}})
        assert reply.status_code != 200 or "good" in reply.text
        return reply.status_code


@EVERY
@EVERY_WIRE
@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_set_aside_is_what_is_recorded_and_settled(
    path: str, body: dict[str, Any], model: str, stream: bool
):
    purse = Purse(calls=9)
    async with house(lambda wire, sent: UNCOUNTED, ledger=purse) as there:
        assert await asked(there, model, path, body, "first", stream) == 200
        (call,) = await there.recorded()
    (reserved,), (usage,) = purse.limits, purse.settled
    assert usage and (usage["prompt_tokens"], usage["completion_tokens"]) == reserved
    assert (call.prompt_tokens, call.completion_tokens, call.usd) == (*reserved, 1.0) and call.reply
    assert min(reserved) > 0 and not purse.held


@EVERY
@EVERY_WIRE
async def test_its_money_counts_against_the_budget_and_is_counted_again_by_a_gateway_that_starts_anew(
    path: str, body: dict[str, Any], model: str
):
    async with house(lambda wire, sent: UNCOUNTED, ledger=(purse := Purse(calls=1))) as there:
        await asked(there, model, path, body, "learn", False)
    worst = sum(purse.limits[0])
    bus = MemoryBus()
    await bus.append("r1", opening("r1", [started(budget=Budget(usd=1.5 * worst / 1000))]))
    for start, stream, status in (("first", False, 200), ("again", True, 402)):
        ledger = Ledger(bus, Clock(), a_dollar_a_thousand)
        async with house(lambda wire, sent: UNCOUNTED, bus=bus, ledger=ledger) as there:
            assert await asked(there, model, path, body, start, stream) == status
            call = (await there.recorded())[0]
            assert (call.usd, call.prompt_tokens + call.completion_tokens) == (pytest.approx(worst / 1000), worst)
    (over,) = [record.event for record in await bus.history("r1") if isinstance(record.event, BudgetExhausted)]
    assert over.limit == "usd" and over.spent == pytest.approx(worst / 1000)


async def test_where_nobody_knows_the_price_the_money_is_unknown_and_not_nothing():
    bus = MemoryBus()
    await bus.append("r1", opening("r1", [started()]))
    ledger = Ledger(bus, Clock(), lambda model, usage: None)
    async with house(lambda wire, sent: UNCOUNTED, bus=bus, ledger=ledger) as there:
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}
        assert await asked(there, COMPATIBLE, path, body, "first", False) == 200
        (call,) = await there.recorded()
    assert call.usd is None and call.prompt_tokens > 0 and call.completion_tokens > 0


@EVERY
async def test_a_reply_that_tells_its_count_is_recorded_by_it(model: str):
    async with house(lambda wire, sent: Reply("good day"), ledger=(purse := Purse(calls=1))) as there:
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}
        assert await asked(there, model, path, body, "first", True) == 200
        (call,) = await there.recorded()
    (usage,) = purse.settled
    assert (call.prompt_tokens, call.completion_tokens) == (11, 7) and usage and usage["completion_tokens"] == 7
