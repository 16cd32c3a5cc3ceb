"""Where a run may be left by a branch: behind a generation, or behind any record that leaves something to do."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sia_events import app
from sia_events.errors import Unusable
from sia_events.shared.code import code
from sia_events.shared.events import RunBranched
from sia_events.shared.record import Record, derived_id, opening, place
from sia_events.shared.run import Run, evolve, fold
from sia_events.shared.service import Lineage


@dataclass(frozen=True)
class Fork:
    """Where a branch leaves its parent, and the parent's state there; `closed` where a generation has just ended."""

    at: int
    state: Run
    closed: bool


def closings(history: Sequence[Record]) -> Iterator[Fork]:
    """Behind each verdict that closed a generation, the first agent's first."""
    run, closed = Run(), -1
    for record in history:
        run = evolve(run, record)
        if run.generation > closed and _is_closed(run):
            closed = run.generation
            yield Fork(record.position, run, closed=True)


def at_generation(history: Sequence[Record], generation: int) -> Fork:
    """Behind the verdict that closed `generation`. Raises Unusable."""
    last = -1
    for fork in closings(history):
        last = fork.state.generation
        if last == generation:
            return fork
    have = f"0 to {last}" if last >= 0 else "none yet"
    raise Unusable(f"run {history[-1].run} has no closed generation {generation}; there are: {have}")


def at_position(history: Sequence[Record], position: int) -> Fork:
    """Behind any record that leaves something to do. Raises Unusable."""
    name, last = history[-1].run, len(history)
    if not 1 <= position <= last:
        raise Unusable(f"run {name} has positions 1 to {last} so far, and no {position}")
    start, end = _batch(history, position)
    if position < end:
        before = f"{start - 1} or " if start > 1 else ""
        raise Unusable(
            f"position {position} of run {name} is inside records {start} to {end}, which were written together or not "
            f"at all; branch at {before}{end}"
        )
    before = fold(history[: position - 1])
    state = evolve(before, history[position - 1])
    # Behind its end a run may have had work under way, which brings no other end.
    if state.finished or not _owes(history[:position], state):
        why = "the run is over there" if state.status in ("finished", "cancelled") else f"it is {state.status} there"
        if state.waiting:
            why = f"it waits there for approval of {state.waiting.subject}, and a branch puts its own questions"
        raise Unusable(f"behind position {position} of run {name} nothing is left to do: {why}. Take an earlier one")
    return Fork(position, state, closed=_is_closed(state) and not _is_closed(before))


def _is_closed(run: Run) -> bool:
    """Whether every version of the generation has its verdict, or the generation had no candidate."""
    versions = run.of_generation(run.generation)
    barren = any(failed.generation == run.generation for failed in run.barren)
    return bool(run.incumbent and (barren or versions) and all(v.name in run.verdicts for v in versions))


def _batch(history: Sequence[Record], position: int) -> tuple[int, int]:
    """First and last position of the records that were appended together with the one at `position`."""
    start = end = position
    while end < len(history) and _joins(history, end + 1):
        end += 1
    while _joins(history, start):
        start -= 1
    return start, end


def _joins(history: Sequence[Record], position: int) -> bool:
    """Whether the record at `position` was appended together with the one before it."""
    record = history[position - 1]
    for index in range(1, position):
        before = history[position - 1 - index]
        if before.run != record.run:
            return False
        if record.id in {derived_id(record.run, cause, record.producer, index) for cause in (record.cause, None)}:
            return True
        if (before.cause, before.producer) != (record.cause, record.producer):
            return False
    return False


def _owes(history: Sequence[Record], state: Run) -> bool:
    """Whether a service would act on what stands unanswered behind the last record, if a branch began there."""
    last = history[-1]
    name = f"{last.run} branched"
    event = RunBranched(
        parent=last.run, at=last.position, generation=0, overrides={}, settings=state.settings, code=code()
    )
    fork = place(opening(name, [event])[0], name, last.position + 1, last.chain, last.time)
    lineage = Lineage([*history, fork])
    services = app.SERVICES.values()
    for service in services:
        for cause in lineage.inherited(service, fork):
            if lineage.is_dropped(service, cause):
                continue
            if decide := service.decides.get(type(cause.event)):
                if lineage.decided(decide, cause, name):
                    return True
            elif not any(lineage.given(other, cause) for other in services):
                return True
    return False
