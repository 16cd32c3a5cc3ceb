"""A service is a value: a name and two tables. The live runner, replay and the tests take the same value."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from sia_events.shared.events import (
    AttemptRequested,
    Event,
    FeedbackRequested,
    HarnessPatchRequested,
    LetterDropped,
    RunBranched,
    RunStarted,
    ServiceFailed,
)
from sia_events.shared.failpoints import reach
from sia_events.shared.letters import letters
from sia_events.shared.ports import BudgetSpent, Bus, Ports
from sia_events.shared.record import IMPORTED, Record, answers, opens_with
from sia_events.shared.run import Run, evolve, fold

KEPT_EVERY = 64
KEPT_RUNS = 64
HELD_S = 1.0
# What opens new work; judging what an attempt wrote, and learning, whose calls only look, go on while a run is held.
BEGINNINGS = (RunStarted, AttemptRequested, FeedbackRequested, HarnessPatchRequested)


@dataclass(frozen=True)
class Work:
    """What a perform is given: the state up to and including its cause, the cause, and the ports."""

    run: Run
    cause: Record
    ports: Ports


Decide = Callable[[Run, Any], Sequence[Event]]
Perform = Callable[[Work, Any], Awaitable[Sequence[Event]]]


@dataclass(frozen=True)
class Service:
    """`decides` is pure: (state, event) -> events. `performs` touches the world and reports what came back.

    An event type stands in one of the two tables at most, so that (cause, service) names one answer.
    """

    name: str
    decides: Mapping[type[Event], Decide] = field(default_factory=dict)
    performs: Mapping[type[Event], Perform] = field(default_factory=dict)

    def __post_init__(self) -> None:
        both = self.decides.keys() & self.performs.keys()
        if both:
            raise ValueError(f"{self.name} both decides and performs {sorted(kind.__name__ for kind in both)}")

    @property
    def types(self) -> tuple[type[Event], ...]:
        """The event types it answers, and RunBranched: a branch inherits what its parent left unanswered."""
        return tuple(dict.fromkeys([*self.decides, *self.performs, RunBranched]))


class Lineage:
    """The records of a run and the state after each, a branch's parents first; extended as records arrive.

    A decide sees the state up to and including its cause, never more. The one thing a branch adds to a state it
    inherits is its own opening: its overrides, and what was said with them, hold for every cause it answers, also for
    its parent's.
    """

    def __init__(self, records: Sequence[Record] = ()) -> None:
        self.records: list[Record] = []
        # The last position folded, and the state after it: whoever decides one cause behind the other folds once.
        self._at, self._folded = 0, Run()
        # A state after each record would grow with the square of a run's length: some are kept, the rest folded again.
        self._kept = [self._folded]
        self._last = 0, self._folded
        self._answered: dict[UUID | None, list[Record]] = {}
        # What opens a branch, by its name: where it leaves its parent, and what was said with that.
        self._openings: dict[str, list[Record]] = {}
        # (position that held the run, position that let it go on): what lies between was decided at the latter.
        self._holds: list[tuple[int, int]] = []
        self._held_at = 0
        self.extend(records)

    def extend(self, records: Sequence[Record]) -> None:
        """Take over the records behind those already known; `records` is the whole history."""
        for record in records[len(self.records) :]:
            self.records.append(record)
            self._answered.setdefault(record.cause, []).append(record)
            if isinstance(record.event, RunBranched):
                self._openings[record.run] = [record]
            elif (opened := self._openings.get(record.run)) and opens_with(opened, record):
                opened.append(record)

    @property
    def latest(self) -> Run:
        """The state after all of them."""
        self._fold(len(self.records))
        return self._folded

    def state(self, cause: Record, run: str) -> Run:
        """The fold on which `run` decides its answer to `cause`.

        A hold that ended before the fork stays one for what it kept back: the record that ended it was answered for it.
        """
        state = self._after(cause.position)
        opened = self._openings.get(run)
        if opened is None or opened[0].position <= cause.position:
            return state
        forked = replace(fold(opened, state), released=state.released)
        self._fold(opened[0].position)
        if any(held < cause.position < going < opened[0].position for held, going in self._holds):
            return replace(forked, paused=state.paused, exhausted=state.exhausted, cancelled=state.cancelled)
        return forked

    def decided(self, decide: Decide, cause: Record, run: str) -> Sequence[Event]:
        """What `run` decides on `cause`. What a branch's parent answered with nothing, its settings do not reopen."""
        opened = self._openings.get(run)
        if opened is not None and cause.position < opened[0].position:
            before = self._after(cause.position)
            if not before.held and not decide(before, cause.event):
                return ()
        return decide(self.state(cause, run), cause.event)

    def _after(self, position: int) -> Run:
        """The state after the record at `position`: the next one, or from the nearest one kept before it."""
        if position >= self._at:
            self._fold(position)
            return self._folded
        nearest = position // KEPT_EVERY
        at, state = nearest * KEPT_EVERY, self._kept[nearest]
        if at < self._last[0] <= position:
            at, state = self._last
        self._last = position, fold(self.records[at:position], state)
        return self._last[1]

    def _fold(self, position: int) -> None:
        """Go on up to the record at `position`."""
        for record in self.records[self._at : position]:
            held = self._folded.held
            self._folded = evolve(self._folded, record)
            self._at += 1
            if self._folded.held and not held:
                self._held_at = record.position
            # A branch goes on without deciding what its parent's hold kept back: it inherits that.
            if held and not self._folded.held and not isinstance(record.event, RunBranched):
                self._holds.append((self._held_at, record.position))
            if self._at % KEPT_EVERY == 0:
                self._kept.append(self._folded)

    def answered(self, cause: Record) -> Sequence[Record]:
        """Every record that `cause` gave rise to, whoever wrote it."""
        return self._answered.get(cause.id, ())

    def given(self, service: Service, cause: Record) -> list[Record]:
        """What the service answered to `cause`; a dead letter is no answer."""
        mine = (record for record in self.answered(cause) if record.producer == service.name)
        return [record for record in mine if not isinstance(record.event, ServiceFailed)]

    def is_dropped(self, service: Service, cause: Record) -> bool:
        """Whether a person gave up on what the service would answer, behind its last dead letter about it."""
        mine = (record for record in self.answered(cause) if record.producer == service.name)
        failed = [record for record in mine if isinstance(record.event, ServiceFailed)]
        said = self.answered(failed[-1]) if failed else ()
        return any(record.producer == "cli" and isinstance(record.event, LetterDropped) for record in said)

    def inherited(self, service: Service, fork: Record) -> list[Record]:
        """Records before `fork` that the service handles and had not answered there."""
        handled = {*service.decides, *service.performs}
        return [r for r in self.records[: fork.position - 1] if type(r.event) in handled and not self.given(service, r)]


def gave_up(records: Iterable[Record]) -> set[str]:
    """The services that gave up on one of the records, and have not answered it since; nor has a person let them."""
    return {each.record.producer for each in letters(records) if each.state == "open" and each.event.failed}


async def answer(service: Service, lineage: Lineage, cause: Record, run: str, ports: Ports) -> None:
    """Answer one record: decide or perform, and append what comes of it. A second time changes nothing.

    What was imported is over and asks for no answer.
    """
    if cause.producer == IMPORTED:
        return
    lineage.extend(await ports.bus.history(run))
    causes = lineage.inherited(service, cause) if isinstance(cause.event, RunBranched) else []
    if type(cause.event) in {*service.decides, *service.performs}:
        causes.append(cause)
    for one in causes:
        if lineage.given(service, one) or lineage.is_dropped(service, one):
            continue
        reach(f"{service.name} before answering {one.type}")
        if decide := service.decides.get(type(one.event)):
            events = lineage.decided(decide, one, run)
        else:
            events = await _performed(service, lineage, Work(lineage.state(one, run), one, ports))
        if events:
            reach(f"{service.name} before publishing on {one.type}")
            await ports.bus.append(run, answers(run, one, service.name, events))
            reach(f"{service.name} after publishing on {one.type}")


async def _performed(service: Service, lineage: Lineage, work: Work) -> Sequence[Event]:
    """What comes of performing; where the run's budget ends in the midst of it, once there is more.

    What begins something waits while the run is held. Of a cancelled run nothing more comes.
    """
    waits = isinstance(work.cause.event, BEGINNINGS)
    while True:
        if waits and not await _goes_on(lineage, work):
            return []
        try:
            return await service.performs[type(work.cause.event)](work, work.cause.event)
        except BudgetSpent:
            await asyncio.sleep(HELD_S)
            waits = True


async def _goes_on(lineage: Lineage, work: Work) -> bool:
    """Return when the run is not held; False when it is cancelled, and never will be."""
    while True:
        lineage.extend(await work.ports.bus.history(work.run.name))
        if not lineage.latest.held:
            return True
        if lineage.latest.cancelled is not None:
            return False
        await asyncio.sleep(HELD_S)


async def serve(service: Service, bus: Bus, ports: Ports, run: str | None = None, at_once: int = 1) -> None:
    """Answer records from the bus until cancelled; of one run, or of all.

    However many are answered `at_once`, each decide sees the state up to its own cause: what is decided is the same.
    """
    lineages: OrderedDict[str, Lineage] = OrderedDict()

    async def handle(record: Record) -> None:
        lineage = lineages.setdefault(record.run, Lineage())
        lineages.move_to_end(record.run)
        if len(lineages) > KEPT_RUNS:
            lineages.popitem(last=False)
        await answer(service, lineage, record, record.run, ports)

    await bus.serve(service.name, [kind.__name__ for kind in service.types], handle, run, at_once)
