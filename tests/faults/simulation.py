"""Runs of the whole loop in which things go wrong as a seed says, and what has to hold of each when it is over.

Which faults there are, and how often, is drawn too: schedules with few kinds of faults find others than those with all
(Groce et al. 2012, "Swarm testing", ISSTA).
"""

import json
import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from checker import Held, Told, check
from simulated_machine import Machine
from simulated_ports import lines_of, reply_of
from simulated_world import LOOP, ROLLOUTS, Build, Plan, World

from sia_events.errors import Unusable
from sia_events.forks import at_position
from sia_events.shared.calls import decode_call, journal_key
from sia_events.shared.events import RunSettings, ServiceFailed
from sia_events.shared.record import Record
from sia_events.shared.replay import replay

RATES = {
    "kill": 0.01,
    "power cut": 0.002,
    "stop": 0.01,
    "replace": 1.0,
    "slow": 0.02,
    "unreachable": 0.05,
    "lost ack": 0.05,
    "stream full": 0.05,
    "late": 0.1,
    "twice": 0.2,
    "poison": 0.02,
    "disk": 0.03,
    "box": 0.1,
    "provider": 0.2,
    "reply lost": 0.1,
    "connection lost": 0.1,
    "log away": 0.1,
    "log full": 0.05,
    "log lost ack": 0.1,
    "clock set": 0.03,
    "hold": 0.3,
}
"""The highest rate of each fault, at each place where it can happen."""

RUNS: Sequence[Mapping[str, Any]] = (
    {"generations": 1, "lever": "harness", "candidates": 2},
    {"generations": 1, "lever": "weights"},
    {"generations": 2, "lever": "alternate", "candidates": 2},
)
BRANCHES = 0.4
WHOLE = Build()

# What a run records of how it went, and in what stands how often a thing was tried and what that took.
TRIES = ("AttemptFailed", "ServiceFailed", "RunPaused", "RunResumed")
VARIES = {"trajectory", "calls", "prompt_tokens", "completion_tokens", "usd", "seconds", "tries", "evidence", "rewards"}


@dataclass(frozen=True)
class Simulated:
    """How a schedule ended: the run's own records, and all that is on the stream, as bytes.

    `wrong` is everything that must not be; `happened` counts the faults that struck.
    """

    records: Sequence[Record]
    bodies: Mapping[str, bytes]
    stream: bytes
    happened: Mapping[str, int]
    wrong: Sequence[str]

    def __str__(self) -> str:
        lines = [f"  {r.position:3} {r.time:%H:%M:%S} {r.producer} {r.event!r:.160}" for r in self.records]
        return "\n".join([f"{dict(self.happened)}", *lines, *self.wrong])


def simulate(seed: int, build: Build = WHOLE) -> Simulated:
    """One run, or a branch of one, under the faults that the seed draws, to its end."""
    chance = random.Random(seed)
    rates = {fault: most * chance.random() for fault, most in RATES.items() if chance.random() < 0.5}
    kind = chance.randrange(len(RUNS))
    fork = chance.choice(forks(kind)) if chance.random() < BRANCHES else None
    ended = _scheduled(Machine(chance, rates, calm=chance.uniform(30, 400)), build, _plan(kind, fork))
    return replace(ended, wrong=[*ended.wrong, *_against(undisturbed(kind, fork), ended.records)])


@cache
def undisturbed(kind: int, fork: int | None = None) -> Simulated:
    """The run of that kind, or its branch behind the position `fork`, in which nothing goes wrong."""
    ended = _scheduled(Machine(random.Random(kind), {}, calm=0.0), WHOLE, _plan(kind, fork))
    assert not ended.wrong and not ended.happened, str(ended)
    return ended


@cache
def forks(kind: int) -> Sequence[int]:
    """The positions of that run behind which a branch may begin."""
    records, found = undisturbed(kind).records, []
    for position in range(1, len(records)):
        with suppress(Unusable):
            found.append(at_position(records, position).at)
    return found


def decisions(records: Sequence[Record]) -> Counter[str]:
    """What was asked, chosen and judged, less how often it was tried and what that took."""
    told: Counter[str] = Counter()
    for record in records:
        if record.type in TRIES or getattr(record.event, "tries", 0):
            continue
        said: dict[str, Any] = record.event.model_dump(mode="json", exclude=VARIES)
        if "attempt" in said:
            said["attempt"] = journal_key(said["attempt"])
        told[f"{record.producer} {json.dumps(said, sort_keys=True)}"] += 1
    return told


def _plan(kind: int, fork: int | None) -> Plan:
    settings = RunSettings(target_model="local/simulated", attempt_tries=10, **ROLLOUTS, **RUNS[kind])
    if fork is None:
        return Plan(settings)
    trunk = undisturbed(kind)
    return Plan(settings, trunk.records[:fork], trunk.records, trunk.bodies)


def _scheduled(machine: Machine, build: Build, plan: Plan) -> Simulated:
    # Work folders of attempts come and go by the thousand: in memory, where there is such a file system.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as home:
        world = World(machine, build, plan, Path(home))
        with suppress(TimeoutError):  # by then the run lacks its end, which is told
            machine.simulate(world.whole_run)
    every = [message.read for message in world.stream._events if isinstance(message.read, Record)]
    own = [record for record in every if record.run == plan.run]
    wrong = [*_of_copies(world, every), *machine.unexpected, *_of_letters(own)]
    for found in replay([*plan.past, *own], list(LOOP.values()), keep_going=True).divergences:
        wrong.append(f"replay: {found.reason}: {found}")
    stream = [message.wire for message in world.stream._events]
    lines = [line for each in world.stream._envelopes for line in each.lines]
    return Simulated(own, world.public._bodies, b"\n".join([*stream, *lines]), machine.happened, wrong)


def _of_copies(world: World, records: Sequence[Record]) -> list[str]:
    """What clients were told, against the stream, the rows and the journal."""
    calls = [
        (each.run, decode_call(line))
        for each in world.stream._envelopes
        if each.kind == "model_call"
        for line in each.lines
    ]
    held = Held(
        stream=_wires(records),
        tables=_wires(world.log.records),
        lines=[line for each in world.stream._envelopes for line in lines_of(each)],
        tabled_lines=[line for each in world.log.envelopes for line in lines_of(each)],
        journal=[reply_of(run, call) for run, call in calls if call.reply is not None],
        paid=world.provider.paid,
    )
    told = Told(world.bus.told_records, world.bus.told_lines, world.gateway.told, world.bus.sent_lines)
    return [str(fault) for fault in check(told, held)]


def _wires(records: Sequence[Record]) -> dict[str, list[bytes]]:
    wires: dict[str, list[bytes]] = {}
    for record in records:
        wires.setdefault(record.run, []).append(record.wire)
    return wires


def _of_letters(records: Sequence[Record]) -> list[str]:
    """A service may give up on what the schedule broke, and on nothing else."""
    given_up = [record.event.error for record in records if isinstance(record.event, ServiceFailed)]
    return [error for error in given_up if "simulated: " not in error and "UnreadableRecord" not in error]


def _against(whole: Simulated, records: Sequence[Record]) -> list[str]:
    """What the run does not amount to, or amounts to beside, what it would have if nothing had gone wrong."""
    expected, found = decisions(whole.records), decisions(records)
    lacking, odd = expected - found, found - expected
    return [*(f"not decided: {each}" for each in lacking), *(f"decided: {each}" for each in odd)]
