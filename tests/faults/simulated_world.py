"""The whole loop on a simulated machine: every service, the gateway, the recorder, and a person who looks after it."""

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from command import small_task
from simulated_machine import Machine, this_process
from simulated_ports import SECRET, Box, Door, FaultyBlobs, FaultyBus, FaultyLog, Gateway, Provider

from sia_events.app import SERVICES
from sia_events.event_log import recorder
from sia_events.infra.clickhouse import LogFull, LogUnavailable
from sia_events.infra.memory import MemoryBlobs, MemoryBus
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.budget import Ledger
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.token import TokenDoor
from sia_events.shared.events import (
    Event,
    RunBranched,
    RunPaused,
    RunResumed,
    RunSettings,
    RunStarted,
    TaskRegistered,
    Weights,
    WeightsUpdated,
    WeightUpdateRequested,
)
from sia_events.shared.letters import letters
from sia_events.shared.ports import Bus, BusUnreachable, Log, Ports
from sia_events.shared.record import Record, answers, opening
from sia_events.shared.registration import register
from sia_events.shared.run import fold
from sia_events.shared.service import Service, Work, serve
from sia_events.shared.task import answers as right_answers
from sia_events.shared.task import find_task

ROLLOUTS = {"rollout_items": 2, "rollout_samples": 2}
PATIENCE_S = 600.0
DAYS = 10 * 86_400.0
LOOK_S = 30.0


async def learn(work: Work, asked: WeightUpdateRequested) -> Sequence[Event]:
    """The trainer's perform, with a learner that is a function of the rewards."""
    rewards, parent = await work.ports.blobs.get(asked.rewards), work.run.versions[asked.parent]
    return [
        WeightsUpdated(
            version=f"g{asked.generation}a",
            generation=asked.generation,
            parent=parent.name,
            harness=parent.harness,
            weights=Weights(model=parent.weights.model, adapter=await work.ports.blobs.put(b"learned of " + rewards)),
            algorithm=asked.algorithm,
            rollouts=len(json.loads(rewards)),
            metrics={},
            seconds=0.0,
        )
    ]


LOOP = {**SERVICES, "trainer": replace(SERVICES["trainer"], performs={WeightUpdateRequested: learn})}


@dataclass(frozen=True)
class Build:
    """The code under test; a test may break some of it."""

    serve: Callable[[Service, Bus, Ports, None, int], Awaitable[None]] = serve
    record: Callable[[Bus, Log], Awaitable[None]] = recorder.record
    journal: Callable[[Bus], Journal] = Journal


@dataclass(frozen=True)
class Plan:
    """A run to make: of these settings, or, behind the last record of `past`, a branch. `bodies` are its blobs."""

    settings: RunSettings
    past: Sequence[Record] = ()
    parent: Sequence[Record] = ()
    bodies: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def run(self) -> str:
        return "branch" if self.past else "run"


class World:
    """What survives every process: stream, rows and blobs; and how the processes are put together."""

    def __init__(self, machine: Machine, build: Build, plan: Plan, home: Path) -> None:
        laid = laid_down()
        self._machine, self._build, self._plan = machine, build, plan
        self.public, private = MemoryBlobs(), MemoryBlobs()
        self.public._bodies.update(laid.public, **plan.bodies)
        private._bodies.update(laid.private)
        self.stream = MemoryBus(self.public, machine, retry_delay=0.5)
        self.bus, self.log = FaultyBus(machine, self.stream), FaultyLog(machine)
        self.provider, self.gateway = Provider(machine), Gateway(machine)
        self._at_once = machine.chance.randint(1, 3)
        self._ports = Ports(
            bus=self.bus,
            blobs=FaultyBlobs(machine, self.public),
            sandbox=Box(machine, self.gateway, laid.truth),
            clock=machine,
            door=Door(TokenDoor(Path(), SECRET).token, self.gateway),
            home=home,
            private=private,
        )

    async def whole_run(self) -> None:
        """Until the run is over and the log has it. Raises TimeoutError where that takes days."""
        await self._open()
        for service in LOOP.values():
            self._machine.run(lambda service=service: self._answer(service), (), alone=False)
        self._machine.run(self._answer_models, (), alone=True)
        self._machine.run(self._record, (LogFull, BusUnreachable), alone=True)
        async with asyncio.timeout(DAYS):
            while not await self._over():
                await self._look_after()
                await asyncio.sleep(LOOK_S)

    async def _open(self) -> None:
        plan = self._plan
        events: list[Event] = [laid_down().task, RunStarted(settings=plan.settings, code="simulated")]
        for record in plan.parent:
            self.stream.inject(record.run, record.type, record.wire)
        if plan.past:
            at, state = plan.past[-1].position, fold(plan.past)
            opened = {"parent": state.name, "at": at, "generation": state.generation, "overrides": {}}
            events = [RunBranched(**opened, settings=state.settings, code="simulated")]
        await self.stream.append(plan.run, opening(plan.run, events))

    async def _over(self) -> bool:
        state = fold(await self.stream.history(self._plan.run))
        return state.finished is not None and await self.stream.lag(recorder.NAME) == 0

    async def _look_after(self) -> None:
        """What a person does: has dead letters tried again, holds the run, lets it go on."""
        run = self._plan.run
        history = await self.stream.history(run)
        for service in {each.event.service: None for each in letters(history) if each.state == "open"}:
            await self.stream.again(run, service)
        state, said = fold(history), None
        if state.paused is not None:
            said = RunResumed(reason="looked at")
        elif not state.finished and self._machine.strikes("hold"):
            said = RunPaused(reason="to look at it")
        if said:
            await self.stream.append(run, answers(run, history[-1], "cli", [said]))

    async def _answer(self, service: Service) -> None:
        ports = self._ports if service.name == "evaluator" else replace(self._ports, private=None)
        at_once = self._at_once if service.name in ("target_runner", "evaluator") else 1
        await self._build.serve(service, self.bus, ports, None, at_once)

    async def _answer_models(self) -> None:
        ledger = Ledger(self.bus, self._machine, lambda model, usage: 0.001)
        calls = Calls(self._build.journal(self.bus), lambda model: self.provider, self._machine, ledger, PATIENCE_S)
        self.gateway.open(this_process(), calls)
        await asyncio.get_running_loop().create_future()

    async def _record(self) -> None:
        while True:
            try:
                await self._build.record(self.bus, self.log)  # type: ignore[arg-type]
            except LogUnavailable:
                await asyncio.sleep(0.5)


@dataclass(frozen=True)
class _LaidDown:
    task: TaskRegistered
    public: Mapping[str, bytes]
    private: Mapping[str, bytes]
    truth: Mapping[str, str]


@cache
def laid_down() -> _LaidDown:
    """The small task, registered once for all schedules."""
    with tempfile.TemporaryDirectory() as folder:
        task, public, private = find_task(str(small_task(Path(folder) / "taste"))), MemoryBlobs(), MemoryBlobs()
        registered = asyncio.run(register(task, public, private, ROLLOUTS["rollout_items"]))
        truth = {i: label for split in registered.sizes for i, label in right_answers(task, split).items()}
        return _LaidDown(registered, public._bodies, private._bodies, truth)
