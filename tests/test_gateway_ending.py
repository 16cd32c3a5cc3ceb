"""A gateway that ends: what a provider has been asked is waited for and recorded, and nothing else is begun."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
from gateway_house import COMPATIBLE, House, house
from loopback import Fault, Reply

PATH = "/v1/chat/completions"


def asking(n: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"question {n}"}]}


async def until(happened: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not happened():  # noqa: ASYNC110 - the provider counts in a thread of its own
            await asyncio.sleep(0.005)


async def answered_from_the_journal(there: House, n: int) -> str:
    """What a later start of the program is told by a gateway that is started anew on the same bus."""
    async with house(lambda wire, body: Fault("broken"), bus=there.bus) as later, later.http(COMPATIBLE) as client:
        reply = await client.post(PATH, json=asking(n))
        assert later.provider.count == 0, reply.text
        return reply.json()["choices"][0]["message"]["content"]


async def test_a_reply_under_way_is_recorded_before_the_end_and_not_paid_for_again():
    async with house(lambda wire, body: Fault("hang")) as there, there.http(COMPATIBLE) as client:
        call = asyncio.create_task(client.post(PATH, json=asking(1)))
        await until(lambda: there.provider.count)
        ending = asyncio.create_task(there.calls.end(20))
        await asyncio.sleep(0)
        refused = await client.post(PATH, json=asking(2))
        assert refused.status_code == 500 and "the gateway is ending" in refused.text and not ending.done()
        there.provider.release()
        await ending
        assert (await call).status_code == 200
        assert [each.error for each in await there.recorded()] == [None] and there.provider.count == 1
    assert await answered_from_the_journal(there, 1) == Reply().text


async def test_a_reply_whose_agent_is_gone_is_waited_for_too():
    async with house(lambda wire, body: Fault("hang")) as there:
        async with there.http(COMPATIBLE) as client:
            call = asyncio.create_task(client.post(PATH, json=asking(1)))
            await until(lambda: there.provider.count)
            call.cancel()
        ending = asyncio.create_task(there.calls.end(20))
        await asyncio.sleep(0)
        there.provider.release()
        await ending
        assert len(await there.recorded()) == 1
    assert await answered_from_the_journal(there, 1) == Reply().text


async def test_what_does_not_come_in_time_is_given_up():
    async with house(lambda wire, body: Fault("hang")) as there, there.http(COMPATIBLE) as client:
        call = asyncio.create_task(client.post(PATH, json=asking(1)))
        await until(lambda: there.provider.count)
        await there.calls.end(0.0)
        assert (await call).status_code == 500 and not await there.recorded()


async def test_a_call_that_waits_for_its_turn_is_not_begun():
    async with house(lambda wire, body: Fault("hang")) as there, there.http(COMPATIBLE) as client:
        at_once = 8
        calls = [asyncio.create_task(client.post(PATH, json=asking(n))) for n in range(at_once + 4)]
        await until(lambda: there.provider.count == at_once)
        there.providers.turn_away()
        ending = asyncio.create_task(there.calls.end(20))
        await asyncio.sleep(0)
        there.provider.release()
        await ending
        statuses = sorted([(await call).status_code for call in calls])
        assert statuses == [200] * at_once + [500] * 4
        assert there.provider.count == len(await there.recorded()) == at_once


async def test_a_call_that_waits_for_a_provider_to_come_back_is_given_up_at_once():
    wait = Fault("rate_limited", retry_after="10")
    async with house(lambda wire, body: wait) as there, there.http(COMPATIBLE) as client:
        call = asyncio.create_task(client.post(PATH, json=asking(1)))
        await until(lambda: there.provider.count)
        async with asyncio.timeout(5):
            await there.calls.end(20)
            assert isinstance(reply := await call, httpx.Response) and reply.status_code == 500
        assert there.provider.count == 1 and not await there.recorded()
