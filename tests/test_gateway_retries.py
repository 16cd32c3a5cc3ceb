"""What an agent's own client sends again: one reply is paid for, and a later start is given it."""

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import openai
import pytest
from gateway_house import COMPATIBLE, House, house
from loopback import Fault, Reply, Wire

from sia_events.infra.memory import MemoryBus

HELLO: Any = [{"role": "user", "content": "hello there"}]
OTHER: Any = [{"role": "user", "content": "something else"}]


def client(there: House, start: str = "first", **options: Any) -> openai.AsyncOpenAI:
    key = there.token(COMPATIBLE, start=start)
    return openai.AsyncOpenAI(base_url=f"{there.url}/v1", api_key=key, **options)


async def said(agent: openai.AsyncOpenAI, messages: Any = HELLO) -> str | None:
    return (await agent.chat.completions.create(model=COMPATIBLE, messages=messages)).choices[0].message.content


async def test_a_reply_that_came_at_the_second_sending_is_given_to_the_first_of_a_later_start():
    replies = [Fault("garbage"), Reply("at last")]
    async with house(lambda wire, body: replies.pop(0)) as there:
        assert await said(client(there, max_retries=1)) == "at last" and there.provider.count == 2
        assert await said(client(there, "second")) == "at last" and there.provider.count == 2
        assert [(call.n, call.fault) for call in await there.recorded()] == [(0, "garbage"), (0, "")]


async def test_who_asks_the_same_several_times_gets_as_many_replies_and_gets_them_again():
    replies = [Reply("one"), Fault("garbage"), Reply("two"), Reply("three")]
    async with house(lambda wire, body: replies.pop(0)) as there:
        for start in ("first", "second"):
            agent = client(there, start, max_retries=1)
            assert [await said(agent) for _ in range(3)] == ["one", "two", "three"]
        assert there.provider.count == 4


async def test_a_client_that_ran_out_of_time_and_asks_again_joins_the_reply_it_paid_for():
    async with house(lambda wire, body: Fault("hang")) as there:
        agent = client(there, max_retries=9, timeout=0.2)
        call = asyncio.create_task(said(agent))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(call), 1.0)
        there.provider.release()
        assert await call == Reply().text
        assert there.provider.count == 1 and len(await there.recorded()) == 1


async def test_an_error_is_on_record_again_once_the_one_before_was_answered():
    replies = [Fault("garbage"), Reply("at last"), Fault("garbage")]
    async with house(lambda wire, body: replies.pop(0)) as there:
        agent = client(there, max_retries=0)
        with pytest.raises(openai.InternalServerError):
            await said(agent)
        assert await said(agent) == "at last"
        with pytest.raises(openai.InternalServerError):
            await said(agent, OTHER)
        assert [call.fault for call in await there.recorded()] == ["garbage", "", "garbage"]


async def test_a_provider_is_waited_for_once_in_an_attempt_and_again_by_its_next_start():
    bus = MemoryBus()
    async with house(lambda wire, body: Fault("overloaded"), bus=bus, patience=0.0) as there:
        agent = client(there, max_retries=2)
        for messages in (HELLO, OTHER):
            with pytest.raises(openai.InternalServerError, match="overloaded"):
                await said(agent, messages)
        assert there.provider.count == 1 and len(await there.recorded()) == 1
    async with house(bus=bus) as there:
        assert await said(client(there, "second")) == Reply().text
        recorded = await there.recorded()
    assert [(call.start, call.fault) for call in recorded] == [("first", "unavailable"), ("second", "")]


async def test_a_client_that_ran_out_of_time_does_not_get_the_reply_of_one_that_asked_the_same_beside_it():
    faults, asked = [Fault("hang")], threading.Event()

    def script(wire: Wire, body: Mapping[str, Any]) -> Reply | Fault:
        asked.set()
        return faults.pop() if faults else Reply("another")

    async with house(script) as there:
        agent = client(there, max_retries=9, timeout=0.4)
        first = asyncio.create_task(said(agent))
        await asyncio.to_thread(asked.wait)
        assert await said(agent) == "another"
        await asyncio.sleep(1.0)
        there.provider.release()
        assert await first == Reply().text and there.provider.count == 2
