"""The ports of a simulated machine: the in-memory adapters behind calls that can be lost, late, failed or cut off."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from checker import Line, Reply
from simulated_machine import Machine, Process

from sia_events.infra.clickhouse import LogFull, LogUnavailable
from sia_events.infra.memory import MemoryBlobs, MemoryBus
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.openai_wire import CHAT
from sia_events.model_gateway.token import Claims, TokenRefused, read_token
from sia_events.shared.calls import ModelCall, journal_key
from sia_events.shared.ports import (
    BusFull,
    BusUnreachable,
    Chat,
    Envelope,
    Feed,
    GatewayAway,
    Job,
    ModelFailed,
    Outcome,
)
from sia_events.shared.record import Draft, Record

SECRET = "a secret of the simulation"


class SimulatedFault(OSError):
    """A disk or a box that failed, because the schedule said so."""


class FaultyBus:
    """The `Bus` port, as far as the loop uses it. What `append` and `trace` returned is what clients were told."""

    def __init__(self, machine: Machine, stream: MemoryBus) -> None:
        self._machine, self._stream = machine, stream
        self.told_records: list[tuple[str, int, str]] = []
        self.told_lines: list[Line] = []
        self.sent_lines: list[Line] = []

    async def append(self, run: str, drafts: Sequence[Draft]) -> Sequence[Record]:
        await self._machine.step()
        self._cut("unreachable")
        self._cut("stream full", BusFull)
        records = await self._stream.append(run, drafts)
        if self._machine.strikes("poison"):
            self._stream.inject(run, "Scored", b"no record")
        self._cut("lost ack")
        await self._machine.step()
        self.told_records += [(r.run, r.position, hashlib.sha256(r.wire).hexdigest()) for r in records]
        return records

    async def trace(self, envelope: Envelope) -> None:
        self.sent_lines += lines_of(envelope)
        await self._machine.step()
        self._cut("unreachable")
        self._cut("stream full", BusFull)
        await self._stream.trace(envelope)
        self._cut("lost ack")
        await self._machine.step()
        self.told_lines += lines_of(envelope)

    async def history(self, run: str) -> Sequence[Record]:
        await self._machine.step()
        return await self._stream.history(run)

    async def traces(self, run: str, kind: str, key: str | None) -> Sequence[Envelope]:
        await self._machine.step()
        self._cut("unreachable")
        return await self._stream.traces(run, kind, key)

    async def serve(
        self,
        service: str,
        types: Sequence[str],
        answer: Callable[[Record], Awaitable[None]],
        run: str | None = None,
        at_once: int = 1,
    ) -> None:
        machine = self._machine

        async def later(record: Record) -> None:
            await machine.pause(0, 30)
            await answer(record)

        async def delivered(record: Record) -> None:
            await machine.step()
            if machine.strikes("late"):
                await machine.pause(0, 30)
            if not machine.strikes("twice"):
                return await answer(record)
            for came in await asyncio.gather(answer(record), later(record), return_exceptions=True):
                if came:
                    raise came

        await self._stream.serve(service, types, delivered, run, at_once)

    async def feed(self, name: str, batch: int = 500) -> AsyncIterator[Feed]:
        async with aclosing(self._stream.feed(name, self._machine.chance.randint(1, 9))) as feed:  # type: ignore
            async for each in feed:
                await self._machine.step()

                async def ack(each: Feed = each) -> None:
                    await self._machine.step()
                    self._cut("unreachable")
                    await each.ack()
                    self._cut("lost ack")

                yield replace(each, ack=ack)

    def _cut(self, fault: str, error: type[Exception] = BusUnreachable) -> None:
        if self._machine.strikes(fault):
            raise error(f"simulated: {fault}")


class FaultyBlobs:
    """The `Blobs` port."""

    def __init__(self, machine: Machine, blobs: MemoryBlobs) -> None:
        self._machine, self._blobs = machine, blobs

    async def put(self, body: bytes) -> str:
        await self._machine.step()
        if self._machine.strikes("disk"):
            raise SimulatedFault("simulated: the disk")
        return await self._blobs.put(body)

    async def get(self, digest: str) -> bytes:
        return await self._blobs.get(digest)


class FaultyLog:
    """What the recorder writes to: rows, and tokens of the batches that are in, as the tables keep them."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._away_until = 0.0
        self._tokens: set[str] = set()
        self.records: list[Record] = []
        self.envelopes: list[Envelope] = []

    async def append(self, records: Sequence[Record], token: str) -> None:
        await self._insert(token, lambda: self.records.extend(records))

    async def append_traces(self, envelopes: Sequence[tuple[int, Envelope]], token: str) -> None:
        await self._insert(token, lambda: self.envelopes.extend(envelope for _, envelope in envelopes))

    async def _insert(self, token: str, insert: Callable[[], None]) -> None:
        machine = self._machine
        await machine.step()
        now = machine.loop.time()
        if now >= self._away_until and machine.strikes("log away"):
            self._away_until = now + machine.chance.uniform(0, 60)
        if now < self._away_until:
            raise LogUnavailable("simulated: the log is away")
        if machine.strikes("log full"):
            raise LogFull("simulated: the disk under the log is full")
        if token not in self._tokens:
            self._tokens.add(token)
            insert()
        if machine.strikes("log lost ack"):
            raise LogUnavailable("simulated: the log did not answer")
        await machine.step()


class Provider:
    """The `Models` port: a reply is a function of the request, and every reply is paid for."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.paid: list[str] = []

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        await self._machine.step()
        if self._machine.strikes("provider"):
            raise ModelFailed(503, "simulated: the provider is away")
        await self._machine.pause(0.1, 5)
        self.paid.append(f"{call.seed} {call.messages[0]['content']}")
        if self._machine.strikes("reply lost"):
            raise ModelFailed(504, "simulated: the reply was lost on its way", "timeout")
        said = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
        # By its count of prompt tokens a reply tells which of the payments was for it.
        usage = {"prompt_tokens": len(self.paid), "completion_tokens": 1}
        return {"object": "chat.completion", "model": call.model, "choices": [said], "usage": usage}


class GatewayLost(Exception):
    """The gateway was not there, or its reply did not come."""


class Gateway:
    """What an agent in its box sees of the gateway's process: `calls` are those of the one that is up."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._up: tuple[Process, Calls] | None = None
        self.told: list[Reply] = []

    def open(self, process: Process, calls: Calls) -> None:
        self._up = process, calls

    async def ask(self, token: str, words: str, again: bool) -> Mapping[str, Any] | None:
        """The reply; None where the gateway says no. Raises GatewayLost."""
        if self._up is None or self._up[0].dead:
            raise GatewayLost("nobody listens")
        try:
            claims = read_token(token, SECRET, self._machine.now())
        except TokenRefused:
            return None
        process, calls = self._up
        reply: asyncio.Future[ModelCall] = asyncio.get_running_loop().create_future()
        process.spawn(self._serve(calls, claims, words, again, reply))
        call = await reply
        if self._machine.strikes("connection lost"):
            raise GatewayLost("the connection ended")
        if call.reply is not None:
            self.told.append(reply_of(claims.run, call))
        return call.reply

    async def held_up(self, token: str) -> float:
        if self._up is None or self._up[0].dead:
            raise GatewayAway("nobody listens")
        claims = read_token(token, SECRET, self._machine.now())
        process, calls = self._up
        try:
            seconds = await calls.held.longest(claims.run, claims.start)
        except Exception as error:
            raise GatewayAway("not all is on record") from error
        if process.dead:
            raise GatewayAway("the connection ended")
        return seconds

    async def _serve(
        self, calls: Calls, claims: Claims, words: str, again: bool, reply: "asyncio.Future[ModelCall]"
    ) -> None:
        try:
            said = f"{journal_key(claims.attempt)}: {words}"  # no two attempts ask the same: payments are told apart
            body = {"model": claims.model, "messages": [{"role": "user", "content": said}]}
            call = await (await calls.read(CHAT, claims, body, False, again)).call()
            if not reply.done():
                reply.set_result(call)
        except (Exception, asyncio.CancelledError) as error:
            if not reply.done():
                reply.set_exception(GatewayLost(f"the gateway broke down: {error!r}"))


class Box:
    """The `Sandbox` port, with an agent that asks twice and is right as often as its harness deserves."""

    def __init__(self, machine: Machine, gateway: Gateway, truth: Mapping[str, str]) -> None:
        self._machine, self._gateway, self._truth = machine, gateway, truth

    async def run(self, job: Job) -> Outcome:
        await self._machine.step()
        if self._machine.strikes("box"):
            raise SimulatedFault("simulated: the box")
        await self._machine.pause(0.1, 10)
        items = [json.loads(line)["id"] for line in (job.reads["/data"] / "items.jsonl").read_bytes().splitlines()]
        token = job.env["OPENAI_API_KEY"]
        try:
            for part in range(2):
                if not await self._patiently(token, f"{part}: {', '.join(items)}"):
                    return Outcome("crash", 1, b"", b"no reply", False, 0.0)
        except GatewayLost:
            return Outcome("crash", 1, b"", b"no gateway", False, 0.0, lost_connections=1)
        await self._machine.step()
        spec = job.reads["/agent"] / "harness.json"
        chooses = spec.exists() and json.loads(spec.read_bytes())["answer"] == "choose"
        said = [{"id": item, "answer": self._truth[item.split("#")[0]] if chooses else "?"} for item in items]
        (job.work / "answers.jsonl").write_text("".join(json.dumps(each) + "\n" for each in said))
        return Outcome("ok", 0, b"", b"", False, 0.0)

    async def _patiently(self, token: str, words: str) -> Mapping[str, Any] | None:
        """As the providers' own clients do: a request whose connection was lost is sent again, a few times."""
        for again in (False, True, True):
            try:
                return await self._gateway.ask(token, words, again)
            except GatewayLost:
                await self._machine.pause(0.5, 8)
        raise GatewayLost("three times")


class Door:
    """The `Door` port of the gateway above."""

    socket = Path("/nowhere")

    def __init__(self, token: Callable[[Mapping[str, Any]], str], gateway: Gateway) -> None:
        self.token, self._gateway = token, gateway

    async def held_up(self, token: str) -> float:
        return await self._gateway.held_up(token)


def lines_of(envelope: Envelope) -> list[Line]:
    return [
        Line(envelope.run, envelope.kind, envelope.key, hashlib.sha256(line).hexdigest()) for line in envelope.lines
    ]


def reply_of(run: str, call: ModelCall) -> Reply:
    return Reply((run, journal_key(call.attempt), call.digest, call.n), call.prompt_tokens)
