"""An attempt at the gateway: what its token lets it ask, and what becomes of one whose budget is spent."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from doors import ToldDoor
from given import NOON, recorded
from story import asked, proposed, started
from test_gateway_faults import Purse

from sia_events.infra.instant import InstantModels
from sia_events.infra.memory import MemoryBlobs, MemoryBus
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.door import gateway
from sia_events.model_gateway.journal import Journal
from sia_events.shared.events import AttemptFailed, AttemptRequested, Event, ExecutionLogged
from sia_events.shared.ports import FailedCall, Job, ModelFailed, Outcome, Ports, ProviderAway
from sia_events.shared.registration import register
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.task import find_task
from sia_events.shared.tree import store_tree
from sia_events.target_runner.service import target_runner

SECRET = "a secret of the tests"


class Agent:
    """The `Sandbox` port and the `Clock`: an agent that asks as often as it is told to, and crashes at a refusal."""

    def __init__(self, bus: MemoryBus, calls: int, model: str, budget: int, fault: ModelFailed | None = None) -> None:
        asking = Calls(Journal(bus), self.find, self, Purse(budget), patience=0.0)
        app = gateway(asking, SECRET, self)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")
        self.calls, self.model, self.statuses = calls, model, list[int]()
        self.fault, self.found = fault, 0

    def find(self, name: str) -> InstantModels:
        """What answers, but for the second time that it is asked for."""
        self.found += 1
        if self.fault and self.found == 2:
            raise self.fault
        return InstantModels()

    def now(self) -> datetime:
        return NOON

    async def run(self, job: Job) -> Outcome:
        key = {"authorization": f"Bearer {job.env['OPENAI_API_KEY']}"}
        for n in range(self.calls):
            body = {"model": self.model, "messages": [{"role": "user", "content": str(n)}]}
            reply = await self.http.post("/v1/chat/completions", json=body, headers=key)
            self.statuses.append(reply.status_code)
        if any(status != 200 for status in self.statuses):
            return Outcome("crash", 1, b"", b"APIStatusError", False, 1.0)
        (job.work / "answers.jsonl").write_text("")
        return Outcome("ok", 0, b"", b"", False, 1.0)


async def attempted(
    home: Path,
    calls: int = 1,
    model: str = "local/m",
    budget: int = 9,
    any_model_name: bool = False,
    fault: ModelFailed | None = None,
    bus: MemoryBus | None = None,
) -> tuple[Event, Agent]:
    blobs = MemoryBlobs()
    bus = bus or MemoryBus(blobs)
    agent = Agent(bus, calls, model, budget, fault)
    told = await register(find_task("words"), blobs, MemoryBlobs(), 8)
    opened = started()
    opened = opened.model_copy(
        update={"settings": opened.settings.model_copy(update={"any_model_name": any_model_name})}
    )
    first = proposed().model_copy(update={"harness": await store_tree(blobs, {"target_agent.py": b""})})
    records = recorded(told, opened, first, asked("g0a", "dev"))
    ports = Ports(bus, blobs, agent, agent, ToldDoor(home / "gateway.sock", SECRET), home)
    work = Work(fold(records), records[-1], ports)
    request = records[-1].event
    assert isinstance(request, AttemptRequested)
    events: Sequence[Event] = await target_runner.performs[AttemptRequested](work, request)
    return events[0], agent


async def test_an_attempt_whose_budget_is_spent_failed_for_the_budget_whatever_its_agent_made_of_it(tmp_path: Path):
    event, agent = await attempted(tmp_path, calls=3, budget=1)
    assert agent.statuses == [200, 402, 402]
    assert isinstance(event, AttemptFailed) and event.kind == "budget" and "budget" in event.message


async def test_an_agent_that_asks_for_another_model_than_its_own_is_at_fault_itself(tmp_path: Path):
    event, agent = await attempted(tmp_path, model="gpt-9")
    assert agent.statuses == [403] and isinstance(event, AttemptFailed) and event.kind == "crash"


@pytest.mark.parametrize(("model", "any_model_name"), [("local/m", False), ("m", False), ("gpt-9", True)])
async def test_an_agent_may_name_its_own_model_or_any_where_the_run_says_so(
    tmp_path: Path, model: str, any_model_name: bool
):
    event, agent = await attempted(tmp_path, model=model, any_model_name=any_model_name)
    assert agent.statuses == [200] and isinstance(event, ExecutionLogged)


@pytest.mark.parametrize(
    ("status", "kind"), [(503, "unavailable"), (429, "rate_limited"), (504, "timeout"), (401, "no_key")]
)
async def test_a_provider_that_is_away_fails_no_version_and_its_attempt_is_made_again_from_where_it_was(
    tmp_path: Path, status: int, kind: FailedCall
):
    bus = MemoryBus()
    with pytest.raises(ProviderAway, match=r"g0a\.dev had no answer from local/m: gone"):
        await attempted(tmp_path, calls=3, fault=ModelFailed(status, "gone", kind), bus=bus)
    event, again = await attempted(tmp_path, calls=3, bus=bus)
    assert isinstance(event, ExecutionLogged) and event.calls == 3
    assert again.found == 2, "the first reply was recorded"


async def test_what_an_earlier_start_was_not_answered_is_not_held_against_a_later_one(tmp_path: Path):
    bus = MemoryBus()
    for calls, kind in ((2, AttemptFailed), (1, ExecutionLogged)):
        fault = ModelFailed(502, "nonsense", "garbage")
        event, _ = await attempted(tmp_path, calls=calls, fault=fault, bus=bus)
        assert isinstance(event, kind)
        if isinstance(event, AttemptFailed):
            assert event.kind == "infrastructure" and "nonsense" in event.message
