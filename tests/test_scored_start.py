"""Which model calls an attempt is judged by: those whose replies its last start was given, whoever first asked."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from doors import ToldDoor
from given import NOON, recorded
from story import asked, proposed, started

from sia_events.infra.instant import InstantModels
from sia_events.infra.memory import MemoryBlobs, MemoryBus
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.door import gateway
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.ledger import Unlimited
from sia_events.model_gateway.token import TokenDoor
from sia_events.shared.calls import ModelCall, decode_call
from sia_events.shared.events import AttemptFailed, AttemptRequested, ExecutionLogged
from sia_events.shared.ports import Chat, Envelope, Job, Outcome, Ports
from sia_events.shared.registration import register
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.task import find_task
from sia_events.shared.tree import store_tree
from sia_events.target_runner.service import target_runner

SECRET = "a secret of the tests"


class Slow(InstantModels):
    """Answers when it is let; `asked` is set once somebody waits."""

    def __init__(self) -> None:
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        self.asked.set()
        await self.go.wait()
        return await super().chat(call)


class Notebook(MemoryBus):
    """A bus that tells when somebody has noted a step."""

    def __init__(self) -> None:
        super().__init__()
        self.noted = asyncio.Event()

    async def trace(self, envelope: Envelope) -> None:
        await super().trace(envelope)
        if envelope.kind == "step":
            self.noted.set()


class House:
    """The `Sandbox` port and the `Clock`, with a gateway in the same process: a program asks what its start is to ask.

    The first start, which asks `starts[0]`, is lost, the last one ends well.
    """

    def __init__(self, bus: MemoryBus, starts: Sequence[Sequence[str]], model: InstantModels | None = None) -> None:
        calls = Calls(Journal(bus), lambda name: model or InstantModels(), self, Unlimited(), patience=0.0)
        app = gateway(calls, SECRET, self)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")
        self.starts = list(starts)

    def now(self) -> datetime:
        return NOON

    async def ask(self, token: str, text: str) -> int:
        body = {"model": "m", "messages": [{"role": "user", "content": text}], "metadata": {"item": text[:2]}}
        key = {"authorization": f"Bearer {token}"}
        return (await self.http.post("/v1/chat/completions", json=body, headers=key)).status_code

    async def run(self, job: Job) -> Outcome:
        for text in self.starts.pop(0):
            assert await self.ask(job.env["OPENAI_API_KEY"], text) == 200
        (job.work / "answers.jsonl").write_text("")
        return Outcome("ok", 0, b"", b"", False, 1.0, lost_connections=len(self.starts))


async def attempted(folder: Path, starts: Sequence[Sequence[str]]) -> list[tuple[str, bool]]:
    """The text of every call of the trajectory, and whether it is another start's, after so many starts."""
    blobs = MemoryBlobs()
    bus = MemoryBus(blobs)
    told = await register(find_task("words"), blobs, MemoryBlobs(), 8)
    first = proposed().model_copy(update={"harness": await store_tree(blobs, {"target_agent.py": b""})})
    box = House(bus, starts)
    ports = Ports(bus, blobs, box, box, ToldDoor(folder / "gateway.sock", SECRET), folder)
    records = recorded(told, started(), first)
    for number in range(len(starts)):
        again = asked("g0a", "dev", tries=number, attempt=f"g0a.dev~{number}" if number else "g0a.dev")
        records = recorded(told, started(), first, again)
        (event,) = await target_runner.performs[AttemptRequested](Work(fold(records), records[-1], ports), again)
        assert isinstance(event, AttemptFailed) == (number + 1 < len(starts)), event
    assert isinstance(event, ExecutionLogged)
    made = [decode_call(line) for line in (await blobs.get(event.trajectory)).splitlines()]
    assert event.calls == len(made), "all of them were paid for"
    return sorted((said(call), call.other_start) for call in made)


def said(call: ModelCall) -> str:
    return call.request["messages"][0]["content"]


async def test_a_start_that_asks_otherwise_shares_only_the_calls_that_it_was_given_the_replies_of(tmp_path: Path):
    made = await attempted(tmp_path, [["i1 what", "i2 at noon", "i3 what"], ["i1 what", "i2 at one"]])
    assert made == [("i1 what", False), ("i2 at noon", True), ("i2 at one", False), ("i3 what", True)]


async def test_calls_of_all_starts_are_its_own_where_the_last_one_asked_the_same(tmp_path: Path):
    made = await attempted(tmp_path, [["i1 a"], ["i1 a", "i1 a", "i2 b"], ["i1 a", "i1 a", "i2 b", "i3 c"]])
    assert made == [("i1 a", False), ("i1 a", False), ("i2 b", False), ("i3 c", False)]


async def test_a_reply_that_was_on_its_way_to_a_start_that_was_lost_is_the_next_ones_too(tmp_path: Path):
    bus, model = Notebook(), Slow()
    house = House(bus, [], model)
    door = TokenDoor(tmp_path / "gateway.sock", SECRET)
    fixed = {"run": "r1", "attempt": "g0a.dev", "version": "g0a", "model": "m", "adapter": None, "sample": False}
    first, second = (
        door.token({**fixed, "start": start, "seed": 0, "expires": NOON.timestamp() + 9}) for start in ("one", "two")
    )
    asking = asyncio.create_task(house.ask(first, "i1 a"))
    await model.asked.wait()
    joining = asyncio.create_task(house.ask(second, "i1 a"))
    await bus.noted.wait()
    model.go.set()
    assert [await asking, await joining] == [200, 200]
    (noted,) = await bus.traces("r1", "step", "g0a.dev")
    assert b'"start":"two"' in noted.lines[0]
