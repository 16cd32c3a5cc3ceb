"""Replay: every recorded cause is decided again with today's code and compared, both ways; nothing is called."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sia_events.shared.events import (
    ApprovalGiven,
    ApprovalRefused,
    BudgetChanged,
    BudgetExhausted,
    Event,
    RunCancelled,
    RunPaused,
    RunResumed,
    RunSteered,
    ServiceFailed,
)
from sia_events.shared.record import GENESIS, IMPORTED, Record, answers, broken_link, derived_id
from sia_events.shared.service import Lineage, Service


@dataclass(frozen=True)
class Divergence:
    """The first place where today's code decides otherwise than the log records, or the log contradicts itself."""

    cause: Record
    service: str
    recorded: tuple[Event, ...]
    decided: tuple[Event, ...]
    reason: str


@dataclass(frozen=True)
class Replayed:
    """What a replay found. `pending` counts decisions an unfinished run still owes."""

    records: int
    decisions: int
    performed: int
    pending: int
    divergence: Divergence | None


def replay(records: Sequence[Record], services: Sequence[Service]) -> Replayed:
    """Decide again every cause in `records` (a whole lineage in position order) and compare with what they hold.

    Performed results are read from the records. Each record must have come from somewhere: an answer that no
    service would give, a service's answer that is missing, and a broken hash chain are all divergences.
    """
    if broken := broken_link(records, GENESIS):
        event = (broken.event,)
        return Replayed(len(records), 0, 0, 0, Divergence(broken, broken.producer, event, (), "hash chain broken"))
    lineage = Lineage(records)
    over = lineage.latest.status == "finished"  # a cancelled run was broken off wherever it stood
    decisions = performed = pending = 0
    accounted: set[UUID] = set()
    for cause in records:
        # Nothing of ours decided what was imported, and nothing answers it.
        for service in () if cause.producer == IMPORTED else services:
            given = lineage.given(service, cause)
            recorded = tuple(record.event for record in given)
            run = given[0].run if given else records[-1].run
            accounted.update(record.id for record in given)
            if type(cause.event) in service.performs:
                performed += bool(given)
                decided = recorded
            else:
                decide = service.decides.get(type(cause.event))
                decided = tuple(lineage.decided(decide, cause, run)) if decide else ()
                # The log of a run under way may end before an answer, or inside one that was written as a batch.
                at_the_end = not given or given[-1] is records[-1]
                if not over and at_the_end and len(recorded) < len(decided) and recorded == decided[: len(recorded)]:
                    pending += 1
                    continue
                decisions += bool(given)
            ids = [draft.id for draft in answers(run, cause, service.name, decided)]
            if recorded != decided or [record.id for record in given] != ids:
                found = Divergence(cause, service.name, recorded, decided, _difference(recorded, decided))
                return Replayed(len(records), decisions, performed, pending, found)
    for record in records:
        if record.id not in accounted and not _from_outside(record) and not isinstance(record.event, ServiceFailed):
            found = Divergence(record, record.producer, (record.event,), (), "nothing in the log gave rise to it")
            return Replayed(len(records), decisions, performed, pending, found)
    return Replayed(len(records), decisions, performed, pending, None)


# What people say while a run is under way, and what the gateway says of its budget.
_SAID: dict[str, tuple[type[Event], ...]] = {
    "cli": (ApprovalGiven, ApprovalRefused, BudgetChanged, RunCancelled, RunPaused, RunResumed, RunSteered),
    "model_gateway": (BudgetExhausted, RunPaused),
}


def _from_outside(record: Record) -> bool:
    """Whether somebody outside the services wrote it, as its id says: what opens a run, and what is said to one."""
    if record.producer == IMPORTED:
        return record.id == derived_id(record.run, None, IMPORTED, record.position - 1)
    if record.id in {derived_id(record.run, None, record.producer, index) for index in range(3)}:
        return True
    if not isinstance(record.event, _SAID.get(record.producer, ())):
        return False
    index = f"exhausted {record.event.limit}" if isinstance(record.event, BudgetExhausted) else 0
    return record.id == derived_id(record.run, record.cause, record.producer, index)


def _difference(recorded: tuple[Event, ...], decided: tuple[Event, ...]) -> str:
    if recorded == decided:
        return "not the ids that these answers have"
    return (
        "decided otherwise now" if recorded and decided else "missing from the log" if decided else "no longer decided"
    )
