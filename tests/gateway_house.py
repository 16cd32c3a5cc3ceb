"""A gateway on a port, with the real adapters behind it and a scripted provider behind those."""

import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
from loopback import Loopback, Script
from web import served

from sia_events.infra.memory import MemoryBus
from sia_events.infra.providers.finder import Providers
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.door import gateway
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.ledger import Ledger, Unlimited
from sia_events.model_gateway.token import TokenDoor
from sia_events.shared.calls import ModelCall, decode_call
from sia_events.shared.providers import Provider

SECRET = "a secret of the tests"
KEY = "sk-a-key-that-nobody-may-see"
# Providers of one loopback: two that speak a wire of their own natively, two that are asked by translation alone.
ANTHROPIC, OPENAI, COMPATIBLE, GOOGLE = "anthropic/claude", "openai/gpt", "compatible/llama", "google/gemini"


class Clock:
    def now(self) -> datetime:
        return datetime.now(UTC)


@dataclass(frozen=True)
class House:
    """What an agent sees of a gateway, and what stands behind it."""

    url: str
    bus: MemoryBus
    provider: Loopback
    calls: Calls
    providers: Providers

    def token(self, model: str, **claims: Any) -> str:
        expires = (datetime.now(UTC) + timedelta(minutes=10)).timestamp()
        told = {"run": "r1", "attempt": "g0a.dev", "start": "first", "version": "g0a", "model": model}
        more = {"adapter": None, "sample": False, "seed": 1, "expires": expires}
        return TokenDoor(Path(), SECRET).token({**told, **more, **claims})

    def openai(self, model: str, **claims: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.token(model, **claims), max_retries=0)

    def anthropic(self, model: str, **claims: Any) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(base_url=self.url, api_key=self.token(model, **claims), max_retries=0)

    def http(self, model: str, **claims: Any) -> httpx.AsyncClient:
        token = {"authorization": f"Bearer {self.token(model, **claims)}"}
        return httpx.AsyncClient(base_url=self.url, headers=token, timeout=30)

    async def recorded(self, attempt: str = "g0a.dev") -> list[ModelCall]:
        return [decode_call(line) for each in await self.bus.traces("r1", "model_call", attempt) for line in each.lines]


@asynccontextmanager
async def house(
    script: Script | None = None, bus: MemoryBus | None = None, ledger: Ledger | None = None, patience: float = 20.0
) -> AsyncIterator[House]:
    """The gateway of a bus, until the block ends."""
    bus = bus or MemoryBus()
    async with AsyncExitStack() as stack:
        provider = await stack.enter_async_context(Loopback(script))
        providers = Providers(table(provider), {"KEY": KEY})
        stack.push_async_callback(providers.aclose)
        journal = Journal(bus)
        stack.push_async_callback(journal.close)
        calls = Calls(journal, providers.find, Clock(), ledger or Unlimited(), patience)
        url = await stack.enter_async_context(serving(gateway(calls, SECRET, Clock())))
        yield House(url, bus, provider, calls, providers)


def table(provider: Loopback) -> Mapping[str, Provider]:
    return {
        "anthropic": Provider(kind="anthropic", base_url=provider.anthropic, key_env="KEY"),
        "openai": Provider(kind="openai", base_url=provider.openai, key_env="KEY", responses=True),
        "compatible": Provider(kind="openai", base_url=provider.openai, key_env="KEY"),
        "keyless": Provider(kind="openai", base_url=provider.openai, key_env="NO_SUCH_KEY"),
        "google": Provider(kind="google", base_url=provider.google, key_env="KEY"),
        "slow": Provider(kind="openai", base_url=provider.openai, timeout_s=0.3),
    }


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """The application on a free port of 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # asyncio sets this only where it made the socket itself; without it every second reply waits 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with served(app, listening):
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
