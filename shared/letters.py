"""Dead letters: what a service gave up on, and what became of it since."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal
from uuid import UUID

from sia_events.shared.events import LetterDropped, ServiceFailed
from sia_events.shared.record import Record


@dataclass(frozen=True)
class Letter:
    """A dead letter. It is open until its record is answered, its service fails again, or a person drops it."""

    record: Record
    event: ServiceFailed
    state: Literal["open", "answered", "failed again", "dropped"] = "open"


def letters(records: Iterable[Record]) -> list[Letter]:
    """The dead letters among the records, oldest first."""
    found: dict[UUID, Letter] = {}
    # The last letter of a service about a record; one about what is no record of the run stands alone.
    last: dict[tuple[UUID | None, str], UUID] = {}
    for record in records:
        event, about = record.event, (record.cause, record.producer)
        if isinstance(event, LetterDropped):
            if record.cause and record.cause in found:
                found[record.cause] = replace(found[record.cause], state="dropped")
            continue
        before = found[last[about]] if about in last else None
        if before and before.state == "open":
            again = isinstance(event, ServiceFailed)
            found[before.record.id] = replace(before, state="failed again" if again else "answered")
        if isinstance(event, ServiceFailed):
            found[record.id] = Letter(record, event)
            if event.failed:
                last[about] = record.id
    return list(found.values())
