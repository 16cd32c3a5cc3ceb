"""given / when / then: past events, an event, the events that a service decides."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from sia_events.shared.events import Event
from sia_events.shared.record import GENESIS, Draft, Record, derived_id, parse_record, place
from sia_events.shared.run import fold
from sia_events.shared.service import Service

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def recorded(*events: Event, run: str = "r1", producer: str = "test") -> list[Record]:
    """The events as a run's records, each caused by the one before."""
    records: list[Record] = []
    for event in events:
        cause = records[-1].id if records else None
        first = records[0].id if records else derived_id(run, None, producer, 0)
        draft = Draft(event, producer, cause, first, derived_id(run, cause, producer, 0))
        chain = records[-1].chain if records else GENESIS
        records.append(place(draft, run, len(records) + 1, chain, NOON))
    return records


def altered(record: Record, **changes: Any) -> Record:
    """The record with attributes changed in its stored bytes, as somebody with access to a store could."""
    return parse_record(msgspec.json.encode({**msgspec.json.decode(record.wire), **changes}, order="sorted"))


class given:
    """`given(service, *past).when(event).then(*expected)`"""

    def __init__(self, service: Service, *past: Event) -> None:
        self.service, self.past = service, past

    def when(self, event: Event) -> "given":
        self.decided: Sequence[Event] = self.service.decides[type(event)](fold(recorded(*self.past, event)), event)
        return self

    def then(self, *expected: Event) -> None:
        assert list(self.decided) == list(expected)

    def then_types(self, *kinds: type[Event]) -> Sequence[Event]:
        assert [type(event) for event in self.decided] == list(kinds)
        return self.decided
