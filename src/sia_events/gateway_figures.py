"""What the gateway costs: each call beside the same call asked of the provider itself, by one client in one run."""

import asyncio
import secrets
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil

from sia_events import app, beside_sia_agent, overheads
from sia_events.bench_servers import LIMIT, NAME, OPEN, RACE, settings_for
from sia_events.feedback_svc.service import feedback_svc
from sia_events.figures import INSTANT, Figure
from sia_events.home import door_socket, own_nats_url
from sia_events.infra.child import Child
from sia_events.model_gateway.token import TokenDoor, keep_secret
from sia_events.shared.calls import decode_call
from sia_events.shared.events import RunSettings
from sia_events.shared.settings import Settings

MODEL = f"{NAME}/bench"
PAIRS, STREAMS, WARM = 400, 150, 30
CALLS, AT_ONCE, RACERS = 2000, 16, 200
FLOOD = "one of many"
GENERATIONS = 6
CHAT = "/v1/chat/completions"
LIMITS = httpx.Limits(max_connections=RACERS, max_keepalive_connections=RACERS)
PLAIN = {"adapter": None, "sample": False, "seed": 0}
READY_S, LOOK_S = 30.0, 0.01


@dataclass(frozen=True)
class Bench:
    """The provider and the gateway, as one client reaches each of them."""

    settings: Settings
    direct: httpx.AsyncClient
    gateway: httpx.AsyncClient
    process: psutil.Process

    def token(self, run: str) -> dict[str, str]:
        """Headers that open the gateway to an attempt of `run`, a new start of it each time."""
        door = TokenDoor(Path(), keep_secret(self.settings.home, None))
        expires = (datetime.now(UTC) + timedelta(hours=1)).timestamp()
        told = {"run": run, "attempt": "g0a.dev", "start": secrets.token_hex(8), "version": "g0a", "model": MODEL}
        return {"Authorization": f"Bearer {door.token({**told, **PLAIN, 'expires': expires})}"}

    async def asked(self) -> int:
        """How many completions the provider was asked for."""
        return (await self.direct.get("/asked")).json()


@asynccontextmanager
async def bench(home: Path, core: int | None = 0) -> AsyncIterator[Bench]:
    """A provider and a gateway in processes of their own, the gateway's bus on the disk of `home`."""
    program = (sys.executable, "-m", "sia_events.bench_servers")
    provider = Child("the provider", program)
    url = (await provider.start())["url"]
    pinned = () if core is None else ("--core", str(core))
    gateway = Child("the gateway", (*program, "--home", str(home), "--provider", url, *pinned))
    try:
        process = psutil.Process((await gateway.start())["pid"])
        settings = settings_for(home, url)
        transport = httpx.AsyncHTTPTransport(uds=str(door_socket(settings)), limits=LIMITS)
        async with (
            httpx.AsyncClient(base_url=url, limits=LIMITS, timeout=60) as direct,
            httpx.AsyncClient(base_url="http://gateway", transport=transport, timeout=60) as inside,
        ):
            found = Bench(settings, direct, inside, process)
            await _up(found)
            yield found
    finally:
        await gateway.close()
        await provider.close()


async def calls(found: Bench, pairs: int = PAIRS, streams: int = STREAMS) -> list[Figure]:
    """What a call through the gateway takes above one asked of the provider: whole ones, and first tokens of streams.

    Each pair is made back to back, so that both meet the same load.
    """
    whole = await _pairs(found, pairs, stream=False)
    first = await _pairs(found, streams, stream=True)
    fsync = await asyncio.to_thread(overheads.fsync_seconds, found.settings.home)
    beside = {"direct p50": whole.direct(0.5), "gateway p50": whole.gateway(0.5), "bare fsync": fsync * 1000}
    tail = {"direct p99": whole.direct(0.99), "gateway p99": whole.gateway(0.99), "pairs": pairs}
    begun = {"direct p50": first.direct(0.5), "gateway p50": first.gateway(0.5), "streams": streams}
    median, worst, token = whole.above(0.5), whole.above(0.99), first.above(0.5)
    return [
        Figure("gateway above a direct call, p50", median, "ms", "<= 3", median <= 3, beside),
        Figure("gateway above a direct call, p99", worst, "ms", "<= 15", worst <= 15, tail),
        Figure("gateway above a direct first token, p50", token, "ms", "<= 5", token <= 5, begun),
    ]


async def rate(found: Bench, calls: int = CALLS) -> Figure:
    """Calls a second with AT_ONCE under way; each has to be answered, to be on disk, and to have been made once."""
    direct_s = await _flood(found.direct, {}, calls // 4)
    before, cpu = await found.asked(), found.process.cpu_times()
    took = await _flood(found.gateway, found.token(OPEN), calls)
    made, after = await found.asked() - before, found.process.cpu_times()
    cpu_ms = 1000 * (after.user + after.system - cpu.user - cpu.system) / calls
    lost = calls - await _recorded(found)
    value = calls / took
    beside = {"lost": lost, "provider asked": made, "gateway CPU ms a call": cpu_ms, "direct": calls // 4 / direct_s}
    good = value >= 200 and not lost and made == calls
    return Figure("calls a second, gateway on one core", value, "/s", ">= 200, none lost", good, beside)


async def race(found: Bench) -> Figure:
    """How many calls get to the provider when RACERS at once meet a budget of LIMIT."""
    before, token = await found.asked(), found.token(RACE)
    replies = await asyncio.gather(
        *(found.gateway.post(CHAT, json=_body(f"race {n}"), headers=token) for n in range(RACERS))
    )
    statuses = Counter(reply.status_code for reply in replies)
    made = await found.asked() - before
    good = made <= LIMIT + 1 and statuses == {200: made, 402: RACERS - made}
    beside = {f"status {status}": times for status, times in sorted(statuses.items())}
    return Figure(f"{RACERS} calls at a budget of {LIMIT}", made, "made", f"<= {LIMIT + 1}", good, beside)


async def generation(folder: Path, sia_agent: Path | None, generations: int = GENERATIONS) -> list[Figure]:
    """Seconds a generation whose harness an instant LLM writes through the backend `direct`: all of them our own.

    Beside it a generation of `sia-agent`, by each of its backends, where an interpreter is named that has it.
    """
    provider = Child("the provider", (sys.executable, "-m", "sia_events.bench_servers"))
    try:
        url = (await provider.start())["url"]
        own = await _own_generation(folder / "direct", url, overheads.WARM + generations)
        if sia_agent is None:
            untold = "not measured: --sia-agent names an interpreter that has it"
            return [replace(own, beside={**own.beside, "sia-agent": untold})]
        return [own] + [
            await asyncio.to_thread(
                beside_sia_agent.generation, folder / backend, sia_agent, url, backend, generations - 1
            )
            for backend in beside_sia_agent.BACKENDS
        ]
    finally:
        await provider.close()


async def _own_generation(home: Path, provider: str, generations: int) -> Figure:
    wanted = RunSettings(
        generations=generations,
        candidates=1,
        lever="harness",
        target_model=INSTANT,
        backend="direct",
        meta_model=MODEL,
        feedback_model=MODEL,
    )
    history = await overheads.driven(settings_for(home, provider), "direct", wanted, feedback_svc)
    return await overheads.a_generation(home, history, "a generation of 1, written by an instant LLM", 0.5)


@dataclass(frozen=True)
class _Pairs:
    """Seconds of calls to either, in the order they were made."""

    straight: Sequence[float]
    through: Sequence[float]

    def direct(self, share: float) -> float:
        return _quantile(self.straight, share)

    def gateway(self, share: float) -> float:
        return _quantile(self.through, share)

    def above(self, share: float) -> float:
        return self.gateway(share) - self.direct(share)


def _quantile(seconds: Sequence[float], share: float) -> float:
    """In milliseconds."""
    return 1000 * (statistics.median(seconds) if share == 0.5 else sorted(seconds)[int(share * len(seconds))])


async def _pairs(found: Bench, pairs: int, stream: bool) -> _Pairs:
    ask = _first_token if stream else _whole
    took: tuple[list[float], list[float]] = [], []
    ways = ((found.direct, {}), (found.gateway, found.token(OPEN)))
    for number in range(WARM + pairs):
        for (client, headers), seconds in zip(ways, took, strict=True):
            # Never a text twice: a call that was made before, streamed or not, would be answered from the journal.
            seconds.append(await ask(client, headers, f"{'stream' if stream else 'whole'} {number}"))
    return _Pairs(took[0][WARM:], took[1][WARM:])


async def _whole(client: httpx.AsyncClient, headers: Mapping[str, str], text: str) -> float:
    began = time.perf_counter()
    (await client.post(CHAT, json=_body(text), headers=headers)).raise_for_status()
    return time.perf_counter() - began


async def _first_token(client: httpx.AsyncClient, headers: Mapping[str, str], text: str) -> float:
    began, first = time.perf_counter(), 0.0
    async with client.stream("POST", CHAT, json={**_body(text), "stream": True}, headers=headers) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not first and '"ok"' in line:
                first = time.perf_counter() - began
    return first


async def _flood(client: httpx.AsyncClient, headers: Mapping[str, str], calls: int) -> float:
    """Seconds for so many calls, AT_ONCE under way all the time."""
    numbers = iter(range(calls))

    async def one_after_another() -> None:
        for number in numbers:
            await _whole(client, headers, f"{FLOOD} {number}")

    began = time.perf_counter()
    await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))
    return time.perf_counter() - began


async def _recorded(found: Bench) -> int:
    """How many calls of the flood are on the stream."""
    settings = found.settings.model_copy(update={"nats_url": own_nats_url(found.settings)})
    async with app.stores(settings) as node:
        envelopes = await node.bus.traces(OPEN, "model_call", None)
    made = [decode_call(line) for envelope in envelopes for line in envelope.lines]
    return sum(call.reply is not None and FLOOD in str(call.request) for call in made)


async def _up(found: Bench) -> None:
    """Wait until the gateway answers: it is told to be ready a moment before it listens."""
    async with asyncio.timeout(READY_S):
        while True:
            try:
                await found.gateway.get("/v1/models")
                return
            except httpx.ConnectError:
                await asyncio.sleep(LOOK_S)


def _body(text: str) -> dict[str, Any]:
    return {"model": MODEL.partition("/")[2], "messages": [{"role": "user", "content": text}], "max_tokens": 16}
