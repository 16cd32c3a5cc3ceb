"""Replay: every recorded cause is decided again with today's code and compared, both ways; nothing is called."""

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

from sia_events.shared.events import (
    ApprovalGiven,
    ApprovalRefused,
    AttemptFailed,
    BudgetChanged,
    BudgetExhausted,
    Event,
    LetterDropped,
    RunBranched,
    RunCancelled,
    RunFinished,
    RunPaused,
    RunResumed,
    RunStarted,
    RunSteered,
    ServiceFailed,
)
from sia_events.shared.record import GENESIS, IMPORTED, Record, broken_link, derived_id
from sia_events.shared.service import Lineage, Service


@dataclass(frozen=True)
class Divergence:
    """A place where today's code decides otherwise than the log records, or the log contradicts itself.

    `code` is what wrote the records in question, or the cause where there are none; up to schema 3 a record does not
    tell, and it is what opened the run. None where the log does not tell either.
    """

    cause: Record
    service: str
    recorded: tuple[Event, ...]
    decided: tuple[Event, ...]
    reason: str
    code: str | None = None


@dataclass(frozen=True)
class Replayed:
    """What a replay found. `pending` counts decisions an unfinished run still owes."""

    records: int
    decisions: int
    performed: int
    pending: int
    divergences: tuple[Divergence, ...] = ()

    @property
    def divergence(self) -> Divergence | None:
        """The first of them."""
        return self.divergences[0] if self.divergences else None


def replay(
    records: Sequence[Record],
    services: Sequence[Service],
    first: int = 1,
    last: int | None = None,
    keep_going: bool = False,
) -> Replayed:
    """Decide again every cause in `records` (a whole lineage in position order) and compare with what they hold.

    Performed results are read from the records. Each record must have come from somewhere: an answer that no
    service would give, a service's answer that is missing, and a broken hash chain are all divergences. Only causes
    and records at positions `first` to `last` are judged, on the state that the whole history before them gives.
    It ends at the first divergence, unless it is to `keep_going`.
    """
    found: list[Divergence] = []
    last = len(records) if last is None else last
    lineage, counts = Lineage(records), Counter[str]()
    for divergence in _divergences(records, services, lineage, range(first, last + 1), counts):
        found.append(divergence)
        if not keep_going:
            break
    judged = sum(first <= record.position <= last for record in records)
    return Replayed(judged, counts["decisions"], counts["performed"], counts["pending"], tuple(found))


def _divergences(
    records: Sequence[Record],
    services: Sequence[Service],
    lineage: Lineage,
    judged: Container[int],
    counts: Counter[str],
) -> Iterator[Divergence]:
    """Each divergence at the positions that are judged; `counts` learns of the rest."""
    if broken := broken_link(records, GENESIS):
        code = _code(lineage, broken)
        yield Divergence(broken, broken.producer, (broken.event,), (), "hash chain broken", code)
    deciding = {kind: {each.name for each in services if kind in each.decides} for kind in _decided_by_any(services)}
    nobody = set[str]()
    accounted: set[UUID] = set()
    for cause in records:
        if cause.producer == IMPORTED:
            continue  # nothing of ours decided it, and nothing answers it
        due = deciding.get(type(cause.event), nobody)
        if answered := lineage.answered(cause):
            due = due.union([record.producer for record in answered])
        for service in services if due else ():
            if service.name not in due:
                continue
            given = lineage.given(service, cause)
            accounted.update(record.id for record in given)
            if cause.position not in judged:
                continue
            recorded = tuple(record.event for record in given)
            run = given[0].run if given else records[-1].run
            if type(cause.event) in service.performs:
                counts["performed"] += bool(given)
                decided = recorded
            else:
                decide = service.decides.get(type(cause.event))
                try:
                    decided = tuple(lineage.decided(decide, cause, run)) if decide else ()
                except Exception as error:  # what today's code raises is what there is to be found
                    why = f"deciding fails now: {type(error).__name__}: {error}"
                    yield Divergence(cause, service.name, recorded, (), why, _code(lineage, cause))
                    continue
                # The log of a run under way may end before an answer, or inside one that was written as a batch.
                at_the_end = not given or given[-1] is records[-1]
                begun = at_the_end and len(recorded) < len(decided) and recorded == decided[: len(recorded)]
                # A cancelled run was broken off wherever it stood.
                if begun and lineage.latest.status != "finished":
                    counts["pending"] += 1
                    continue
                counts["decisions"] += bool(given)
                if not decided and _told_again(cause, given, records):
                    decided = recorded
            ids = [derived_id(run, cause.id, service.name, index) for index in range(len(decided))]
            if recorded != decided or [record.id for record in given] != ids:
                code = _code(lineage, given[0] if given else cause)
                yield Divergence(cause, service.name, recorded, decided, _difference(recorded, decided), code)
    for record in records:
        if record.position not in judged or record.id in accounted or isinstance(record.event, ServiceFailed):
            continue
        if not _from_outside(record):
            why, code = "nothing in the log gave rise to it", _code(lineage, record)
            yield Divergence(record, record.producer, (record.event,), (), why, code)


def _decided_by_any(services: Sequence[Service]) -> set[type[Event]]:
    return {kind for service in services for kind in service.decides}


def _code(lineage: Lineage, record: Record) -> str | None:
    """What wrote the record; for those that do not tell, what opened the run in which it stands."""
    before = lineage.records[: record.position]
    opened = [each.event.code for each in before if isinstance(each.event, RunStarted | RunBranched)]
    return record.code or (opened[-1] if opened else None)


def _told_again(cause: Record, given: Sequence[Record], records: Sequence[Record]) -> bool:
    """Whether this is the same end once more: earlier releases told it for each sealed attempt that failed."""
    if not isinstance(cause.event, AttemptFailed) or cause.event.split != "test" or len(given) != 1:
        return False
    if not isinstance(again := given[0].event, RunFinished):
        return False
    before = (r.event for r in records[: given[0].position - 1] if r.run == given[0].run)
    first = next((event for event in before if isinstance(event, RunFinished)), None)
    return first is not None and (first.outcome, first.best, first.sealed) == (again.outcome, again.best, again.sealed)


# What people say while a run is under way, and what the gateway says of its budget.
_SAID: dict[str, tuple[type[Event], ...]] = {
    "cli": (
        ApprovalGiven,
        ApprovalRefused,
        BudgetChanged,
        LetterDropped,
        RunCancelled,
        RunPaused,
        RunResumed,
        RunSteered,
    ),
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
