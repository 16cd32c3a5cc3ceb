"""Replay: every recorded cause is decided again with today's code and compared, both ways; nothing is called."""

from collections.abc import Sequence
from dataclasses import dataclass

from sia_events.shared.events import Event
from sia_events.shared.record import GENESIS, Record, answers, broken_link
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
    over = lineage.latest.status in ("finished", "cancelled")
    decisions = performed = pending = 0
    for cause in records:
        for service in services:
            given = lineage.given(service, cause)
            if type(cause.event) in service.performs:
                performed += bool(given)
                continue
            decide = service.decides.get(type(cause.event))
            run = given[0].run if given else records[-1].run
            decided = tuple(decide(lineage.state(cause, run), cause.event)) if decide else ()
            recorded = tuple(record.event for record in given)
            # The log of a run under way may end before an answer, or inside one that was written as a batch.
            at_the_end = not given or given[-1] is records[-1]
            if not over and at_the_end and len(recorded) < len(decided) and recorded == decided[: len(recorded)]:
                pending += 1
                continue
            ids = [draft.id for draft in answers(run, cause, service.name, decided)]
            if recorded != decided or [record.id for record in given] != ids:
                reason = (
                    "decided otherwise now"
                    if recorded and decided
                    else "missing from the log"
                    if decided
                    else "no longer decided"
                )
                found = Divergence(cause, service.name, recorded, decided, reason)
                return Replayed(len(records), decisions, performed, pending, found)
            decisions += bool(given)
    return Replayed(len(records), decisions, performed, pending, None)
