"""Whom the gateway kept waiting for its journal, as whoever runs an attempt asks it over its socket."""

import asyncio
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from web import served

from sia_events.infra.instant import InstantModels
from sia_events.infra.memory import MemoryBus
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.door import gateway
from sia_events.model_gateway.held import KEPT, Held
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.ledger import Ledger, Unlimited
from sia_events.model_gateway.token import TokenDoor
from sia_events.shared.ports import BusFull, BusUnreachable, Envelope, GatewayAway

SECRET = "a secret of the tests"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


class Clock:
    def now(self) -> datetime:
        return datetime.now(UTC)


class Slow(MemoryBus):
    """Takes a call on record when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.noted, self.go = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def trace(self, envelope: Envelope) -> None:
        if envelope.kind == "step":  # that a start is given what another one asked for
            self.noted.set()
            return
        self.reached.set()
        await self.go.wait()
        await super().trace(envelope)


class Broken(MemoryBus):
    def __init__(self, error: Exception, times: int = 1000) -> None:
        super().__init__()
        self.errors = [error] * times

    async def trace(self, envelope: Envelope) -> None:
        if self.errors:
            raise self.errors.pop()
        await super().trace(envelope)


@asynccontextmanager
async def opened(bus: MemoryBus, ledger: Ledger | None = None) -> AsyncIterator[TokenDoor]:
    """A gateway on a socket of its own, as a home has it."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
        door = TokenDoor(Path(folder, "gateway.sock"), SECRET)
        listening.bind(str(door.socket))
        listening.listen()
        calls = Calls(Journal(bus), lambda name: InstantModels(), Clock(), ledger or Unlimited(), patience=0.0)
        async with served(gateway(calls, SECRET, Clock()), listening):
            yield door


def token(door: TokenDoor) -> str:
    """For a new start of the same attempt."""
    named = {"run": "r1", "attempt": "g0a.dev", "start": secrets.token_hex(4), "version": "g0a"}
    more = {"model": "instant/first", "adapter": None, "sample": False, "seed": 1, "expires": 2**40}
    return door.token({**named, **more})


async def chat(door: TokenDoor, key: str) -> int:
    transport = httpx.AsyncHTTPTransport(uds=str(door.socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=60) as http:
        reply = await http.post("/v1/chat/completions", json=HELLO, headers={"Authorization": f"Bearer {key}"})
    return reply.status_code


async def test_it_is_told_when_all_is_on_record_and_of_the_start_that_waited_alone():
    bus = Slow()
    async with opened(bus) as door:
        slow, other = token(door), token(door)
        asking = asyncio.create_task(chat(door, slow))
        await bus.reached.wait()
        began = asyncio.get_running_loop().time()
        waiting = asyncio.create_task(door.held_up(slow))
        assert await door.held_up(other) == 0.0
        assert not waiting.done(), "its call is not on record"
        told = asyncio.get_running_loop().time() - began
        bus.go.set()
        assert await asking == 200 and await waiting >= told > 0
        assert await door.held_up(slow) == await waiting, "whenever it is asked"


async def test_who_joins_a_call_of_an_earlier_start_waits_for_its_record_too():
    bus = Slow()
    async with opened(bus) as door:
        first, second = token(door), token(door)
        asking = asyncio.create_task(chat(door, first))
        await bus.reached.wait()
        joining = asyncio.create_task(chat(door, second))
        await bus.noted.wait()
        waiting = asyncio.create_task(door.held_up(second))
        assert await door.held_up(token(door)) == 0.0
        assert not waiting.done(), "the call that it joined is not on record"
        bus.go.set()
        assert [await asking, await joining] == [200, 200]
        assert await waiting >= await door.held_up(first) > 0


async def test_what_was_refused_by_the_bus_and_then_taken_is_on_record():
    bus = Broken(BusUnreachable("the server is away"), times=1)
    async with opened(bus) as door:
        key = token(door)
        assert [await chat(door, key), await chat(door, key)] == [500, 200]
        assert await door.held_up(key) >= 0


async def test_a_look_at_the_budget_that_takes_long_is_no_doing_of_the_agents():
    class Away(Unlimited):
        """A ledger whose history is on a server that is away."""

        def __init__(self) -> None:
            self.reached, self.go = asyncio.Event(), asyncio.Event()

        async def look(self, run: str) -> None:
            self.reached.set()
            await self.go.wait()

    ledger = Away()
    async with opened(MemoryBus(), ledger) as door:
        key = token(door)
        asking = asyncio.create_task(chat(door, key))
        await ledger.reached.wait()
        began = asyncio.get_running_loop().time()
        waiting = asyncio.create_task(door.held_up(key))
        assert await door.held_up(token(door)) == 0.0
        assert not waiting.done()
        told = asyncio.get_running_loop().time() - began
        ledger.go.set()
        assert await asking == 200 and await waiting >= told > 0


async def test_whoever_waits_is_not_forgotten_for_others_and_others_are():
    held, looks = Held(), list[asyncio.Task[float]]()
    with held.waiting("r1", "first"):
        for other in range(2 * KEPT):
            with held.waiting("r1", str(other)):
                pass
        looks.append(asyncio.create_task(held.longest("r1", "first")))
        await asyncio.sleep(0)
        assert not looks[0].done() and len(held) <= KEPT + 1
    assert await looks[0] > 0


@pytest.mark.parametrize("error", [BusFull("no room"), BusUnreachable("the server is away")])
async def test_a_call_that_could_not_be_put_on_record_is_told(error: Exception):
    async with opened(Broken(error)) as door:
        key = token(door)
        assert await chat(door, key) == 500
        with pytest.raises(GatewayAway, match=f"not all of its calls are on record: {type(error).__name__}: {error}"):
            await door.held_up(key)
        assert await door.held_up(token(door)) == 0.0


async def test_a_gateway_that_is_not_there_knows_nothing(tmp_path: Path):
    door = TokenDoor(tmp_path / "nobody.sock", SECRET)
    with pytest.raises(GatewayAway, match="ConnectError"):
        await door.held_up(token(door))


async def test_who_has_no_token_is_told_nothing():
    async with opened(MemoryBus()) as door:
        with pytest.raises(GatewayAway, match="token"):
            await door.held_up("no token")
