"""The record: an event with its place in a run, its derived id and its link in the hash chain; the wire form."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec

from sia_events.shared.code import code
from sia_events.shared.events import EVENTS, Event

NAMESPACE = UUID("5f4c9e52-2f0d-5b3a-9d3e-6b1f6f0f51a0")
_NAMESPACE = NAMESPACE.bytes
SCHEMA = 4
GENESIS = "0" * 64
# The producer of what another program ran: facts that no service of ours decided, or has to answer.
IMPORTED = "import"


class UnreadableRecord(Exception):
    """Bytes on the stream that are no record this release can read; the message says why."""


class NewerRecord(UnreadableRecord):
    """A record, by what stands around its data, that other code wrote; where it says that it stands.

    A number, a name or a field alone is anybody's: whether it is the run's is for its link in the chain to say.
    """

    def __init__(self, run: str, position: int, chain: str, wire: bytes, code: str | None, why: str) -> None:
        wrote = f"the release that wrote it{f' ({code})' if code else ''}"
        super().__init__(f"record {position} of run {run} {why}. Nothing was changed. Use {wrote}, or a later one.")
        self.run, self.position, self.chain, self.wire = run, position, chain, wire


@dataclass(frozen=True)
class Draft:
    """An event about to be recorded: everything of its record but the place."""

    event: Event
    producer: str
    cause: UUID | None
    correlation: UUID
    id: UUID


@dataclass(frozen=True)
class Record:
    """A fact and where it stands. `cause` is None for the first record of a run only.

    `code` is what wrote it (shared/code.py), None up to schema 3.
    """

    id: UUID
    run: str
    position: int
    producer: str
    cause: UUID | None
    correlation: UUID
    time: datetime
    schema: int
    chain: str
    event: Event
    code: str | None = None
    wire: bytes = field(default=b"", compare=False, repr=False)
    """The bytes it is stored as, which are the bytes that are hashed, whatever became of its event's type since."""

    @property
    def type(self) -> str:
        return type(self.event).__name__


def derived_id(run: str, cause: UUID | None, producer: str, index: int | str) -> UUID:
    """The id of the `index`-th event that `producer` answers to `cause` in `run`: the same on every redelivery.

    A UUID of version 5 in NAMESPACE (RFC 9562, section 5.5).
    """
    name = f"{run}/{cause}/{producer}/{index}"
    # As uuid5 has it, which writes the namespace's bytes anew each time.
    return UUID(bytes=hashlib.sha1(_NAMESPACE + name.encode(), usedforsecurity=False).digest()[:16], version=5)


def opening(run: str, events: Sequence[Event], producer: str = "cli") -> list[Draft]:
    """Drafts of the records that open a run: the first has no cause, the others follow from it."""
    first = derived_id(run, None, producer, 0)
    return [
        Draft(event, producer, None if i == 0 else first, first, derived_id(run, None, producer, i))
        for i, event in enumerate(events)
    ]


def answers(run: str, cause: Record, producer: str, events: Sequence[Event]) -> list[Draft]:
    """Drafts of what `producer` answers to `cause`."""
    return [
        Draft(event, producer, cause.id, cause.correlation, derived_id(run, cause.id, producer, i))
        for i, event in enumerate(events)
    ]


def opens_with(opened: Sequence[Record], record: Record) -> bool:
    """Whether `record`, which comes behind the records that open a run, is one of these."""
    first = opened[0]
    return record.cause == first.id and record.id == derived_id(first.run, None, first.producer, len(opened))


def place(draft: Draft, run: str, position: int, previous_chain: str, time: datetime) -> Record:
    """Put a draft at its position behind the record whose chain is `previous_chain`."""
    record = Record(
        id=draft.id,
        run=run,
        position=position,
        producer=draft.producer,
        cause=draft.cause,
        correlation=draft.correlation,
        time=time.astimezone(UTC),
        schema=SCHEMA,
        chain="",
        event=draft.event,
        code=code(),
    )
    body = cloud_event(record)
    del body["chain"]
    body["chain"] = _digest(previous_chain, _canonical(body))
    return replace(record, chain=body["chain"], wire=_canonical(body))


def link(previous_chain: str, wire: bytes) -> str:
    """SHA-256 over the previous record's chain and this record's canonical bytes without its own chain."""
    body = msgspec.json.decode(wire)
    body.pop("chain", None)
    return _digest(previous_chain, _canonical(body))


def _digest(previous_chain: str, body: bytes) -> str:
    return hashlib.sha256(previous_chain.encode() + body).hexdigest()


def cloud_event(record: Record) -> dict[str, Any]:
    """The record as a CloudEvents 1.0 object in JSON's terms (https://github.com/cloudevents/spec)."""
    body: dict[str, Any] = {
        "specversion": "1.0",
        "id": str(record.id),
        "type": record.type,
        "source": record.producer,
        "subject": record.run,
        "time": record.time.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "run": record.run,
        "position": record.position,
        "producer": record.producer,
        "correlation": str(record.correlation),
        "schema": record.schema,
        "chain": record.chain,
        "data": record.event.model_dump(mode="json", exclude={"type"}),
    }
    if record.cause is not None:
        body["cause"] = str(record.cause)
    if record.code is not None:
        body["code"] = record.code
    return body


def to_wire(record: Record) -> bytes:
    """The record's bytes, as they were first written: one JSON object, keys sorted, no spaces."""
    return record.wire


def _canonical(body: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(body, order="sorted")


class _Wire(msgspec.Struct):
    """What stands on the stream; attributes of other people's are left alone."""

    specversion: Literal["1.0"]
    id: UUID
    type: str
    run: Annotated[str, msgspec.Meta(min_length=1)]
    position: Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
    producer: str
    correlation: UUID
    time: Annotated[datetime, msgspec.Meta(tz=True)]
    schema: Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
    chain: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    data: msgspec.Raw
    cause: UUID | msgspec.UnsetType = msgspec.UNSET
    code: str | None = None
    # Told by others of the above, for readers who know CloudEvents alone.
    source: msgspec.Raw = msgspec.Raw()
    subject: msgspec.Raw = msgspec.Raw()
    datacontenttype: msgspec.Raw = msgspec.Raw()


class _Ours(_Wire, forbid_unknown_fields=True):
    """Without any of other people's."""


_read_ours = msgspec.json.Decoder(_Ours).decode
_read_any = msgspec.json.Decoder(_Wire).decode
_NOT_SO = (msgspec.DecodeError, ValueError, KeyError, TypeError, RecursionError)


def _read(wire: bytes) -> _Wire:
    str(wire, "utf-8")  # of what is not looked into here nobody else would say so
    try:
        return _read_ours(wire)
    except msgspec.DecodeError:
        body = _read_any(wire)
        msgspec.json.decode(wire)  # other people's attributes are hashed too: a link over them must be possible
        return body


def parse_record(wire: bytes) -> Record:
    """Read a record of this or any earlier schema; the one door where old records are mended.

    Raises NewerRecord for a record of a later schema, of an unknown type or with data that its type does not have, and
    UnreadableRecord for what is no record at all.
    """
    try:
        body = _read(wire)
    except _NOT_SO as error:
        raise UnreadableRecord(f"not a record: {type(error).__name__}: {error}") from error

    def unknown(why: str) -> NewerRecord:
        return NewerRecord(body.run, body.position, body.chain, wire, body.code, why)

    if body.schema > SCHEMA:
        raise unknown(f"is of schema {body.schema}; this release reads up to {SCHEMA}")
    kind = EVENTS.get(body.type)
    if kind is None:
        raise unknown(f"is of the unknown event type {body.type!r}")
    try:
        data = bytes(body.data)
        for version in range(body.schema, SCHEMA):
            if upcast := UPCASTS.get((body.type, version)):
                data = msgspec.json.encode(upcast(msgspec.json.decode(data)))
        event = kind.model_validate_json(data)
    except _NOT_SO as error:
        altered = f"sia verify {body.run} tells whether it was altered"
        raise unknown(f"has data that no {body.type} has here ({altered}): {error}") from error
    # What the class itself does, at a third of its time.
    record = object.__new__(Record)
    record.__dict__.update(
        id=body.id,
        run=body.run,
        position=body.position,
        producer=body.producer,
        cause=None if body.cause is msgspec.UNSET else body.cause,
        correlation=body.correlation,
        time=body.time,
        schema=body.schema,
        chain=body.chain,
        event=event,
        code=body.code,
        wire=wire,
    )
    return record


Upcast = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def _never_paused(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run that says nothing of a pause knew none: the threshold that came must not decide otherwise in its replay."""
    return {**data, "settings": {"pause_after_failures": 0, **data["settings"]}}


# (type, schema it was written under) -> the same data one schema later.
UPCASTS: dict[tuple[str, int], Upcast] = {
    (opens, schema): _never_paused for opens in ("RunStarted", "RunBranched") for schema in (1, 2)
}


def broken_link(records: Sequence[Record], previous_chain: str = GENESIS) -> Record | None:
    """The first record whose chain does not follow from the one before it, or None when the chain is whole."""
    for record in records:
        if not follows(previous_chain, record.wire, record.chain):
            return record
        previous_chain = record.chain
    return None


def follows(previous_chain: str, wire: bytes, chain: str) -> bool:
    """Whether `chain`, which the record `wire` tells as its own, is its link behind `previous_chain`."""
    # As we write a record, its chain is one stretch of its bytes, behind its cause: without that, they are what was
    # hashed. Bytes that somebody has put otherwise are taken apart.
    rest = wire.replace(b'"chain":"%b",' % chain.encode(), b"", 1)
    try:
        return _digest(previous_chain, rest) == chain or link(previous_chain, wire) == chain
    except (RecursionError, ValueError):  # nested too deep, or no JSON to the end: nobody appends such
        return False
