"""The streams on JetStream: how they are made, and the two things done with them, reading a stretch and publishing."""

import asyncio
import json
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from sia_events.infra.nats_partitions import EVENTS, ROOTS, TRACE, WHOLE, Partitions, holds_history
from sia_events.shared.ports import BusFull

PLACES = "SIA_PLACES"
ADVISORIES = "SIA_ADVISORIES"

ANSWER_S = 2.0  # an answer that takes longer counts as none: what was asked is then looked up
LOOKS, LOOK_S = 20, 0.05
READ_AT_ONCE, READ_BYTES = 500, 64 * 2**20
DAY_S = 86_400
CUT, AGED = "sia-partitions", "sia-aged"
HISTORY = (EVENTS, TRACE)
IN_PLACE_OF = "Sia-In-Place-Of"
MAX_BATCH = 1000  # the server's own limit

# Somebody else wrote first, or an earlier try of ours did: the tail tells which.
CONFLICTS = {10071, 10164, 10201}
FULL = {10047, 10077}
TOO_LARGE = {10054}
# Nobody knows whether what was asked has been done.
UNANSWERED = (
    nats.errors.TimeoutError,
    nats.errors.NoRespondersError,
    nats.errors.ConnectionClosedError,
    nats.errors.ConnectionReconnectingError,
    nats.errors.StaleConnectionError,
    nats.errors.OutboundBufferLimitError,
    ServiceUnavailableError,
    OSError,
)

_ALL = {"max_msgs": -1, "max_msgs_per_subject": -1, "max_age": 0}
# History is never dropped to make room for more, and nobody can delete it by mistake.
_HISTORY = {"discard": "new", "deny_delete": True, "deny_purge": True, "allow_direct": True, **_ALL}
# What each stream promises; a stream that promises otherwise is changed.
_PROMISES: dict[str, dict[str, Any]] = {
    EVENTS: {"allow_atomic": True, **_HISTORY},
    TRACE: {"compression": "s2", **_HISTORY},
    PLACES: {"subjects": ["sia.places.>"], "max_msgs_per_subject": 1, "discard": "old", "allow_direct": True},
    # Advisories are ordinary messages, lost when nobody listens; here they wait until somebody looks.
    ADVISORIES: {
        "subjects": [f"$JS.EVENT.ADVISORY.CONSUMER.{kind}.>" for kind in ("MAX_DELIVERIES", "MSG_TERMINATED")],
        "discard": "old",
    },
}
# How large each may get, all partitions together; an operator may have given more, or the settings another size.
_SIZES: dict[str, dict[str, float]] = {
    EVENTS: {"max_bytes": 2 * 2**30, "max_msg_size": 2**20, "duplicate_window": 600},
    TRACE: {"max_bytes": 8 * 2**30, "max_msg_size": 8 * 2**20, "duplicate_window": 600},
    PLACES: {"max_bytes": 2**20, "max_msg_size": 2**10},
    ADVISORIES: {"max_bytes": 16 * 2**20, "max_msg_size": 2**16},
}


@dataclass(frozen=True)
class Retention:
    """What history may take: GiB of all partitions together, None: as much as is given it, and 2 and 8 at least.

    Traces go after `trace_days`, None: never. Records always stay: a run is what its records say.
    """

    events_gb: float | None = None
    trace_gb: float | None = None
    trace_days: int | None = None

    def size(self, kind: str) -> int | None:
        """In bytes, where one is set."""
        asked = {EVENTS: self.events_gb, TRACE: self.trace_gb}.get(kind)
        return None if asked is None else round(asked * 2**30)

    @property
    def trace_s(self) -> int:
        """As a stream's max_age: 0 is never."""
        return DAY_S * (self.trace_days or 0)


KEPT = Retention()


class StreamUnfit(Exception):
    """A stream of ours exists with a configuration that breaks a promise and cannot be changed."""


T = TypeVar("T")


@dataclass(frozen=True)
class Message:
    """A stored message; `in_place_of` names the envelope that it puts back, or counts what its run had lost."""

    sequence: int
    subject: str
    data: bytes
    in_place_of: str = ""

    @property
    def place(self) -> tuple[int, ...]:
        """Where an envelope belongs among its run's: its sequence, or that of the lost one, and the part of it."""
        lost, _, part = self.in_place_of.partition(".")
        return (int(lost), int(part)) if lost.isdecimal() and part.isdecimal() else (self.sequence,)


async def heeding(ask: Awaitable[T]) -> T:
    """Await a call of the client, and heed a cancellation that meets its answer or its failure.

    The client waits with `wait_for`, which before Python 3.12 drops a cancellation that comes together with the
    result (https://github.com/python/cpython/issues/86296): a loop of calls would then go on for ever.
    """
    task = asyncio.current_task()
    assert task
    before = task.cancelling()
    try:
        return await ask
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError


async def ensure_streams(
    client: Client, replicas: int = 1, partitions: Partitions = WHOLE, retention: Retention = KEPT
) -> None:
    """Make the streams, and hold those that exist to their promises. Raises StreamUnfit, BusFull."""
    jetstream = client.jetstream()
    await _check_cut(client, partitions)
    for name, promises, sizes in _streams(client, partitions, retention):
        fixed: dict[str, Any] = {"name": name, "storage": "file", "retention": "limits", **promises}
        try:
            found = (await jetstream.stream_info(name)).config
        except NotFoundError:
            told = {CUT: str(partitions.count)} if holds_history(name) else {}
            if fixed.get("max_age"):
                told[AGED] = "yes"
            made = api.StreamConfig(num_replicas=replicas, metadata=told or None, **{**sizes, **fixed})
            try:
                await _apply(jetstream.add_stream, made)
            except BusFull:
                # While several make a stream at once, the server sets room aside for each of them.
                found = await _made_by_another(jetstream, name)
                if found is None:
                    raise
            else:
                continue
        changes: dict[str, Any] = {key: want for key, want in fixed.items() if _value(getattr(found, key)) != want}
        changes.update({size: least for size, least in sizes.items() if 0 < (getattr(found, size) or 0) < least})
        if (fixed.get("max_age") or found.max_age) and not _has_aged(found):
            changes["metadata"] = {**(found.metadata or {}), AGED: "yes"}
        if _value(found.persist_mode) == "async":
            changes["persist_mode"] = "default"
        if changes:
            await _apply(jetstream.update_stream, found.evolve(**changes), changes)


def _streams(
    client: Client, partitions: Partitions, retention: Retention
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, promises and least sizes of each."""
    for kind, always in _PROMISES.items():
        sizes, promises = dict(_SIZES[kind]), dict(always)
        if kind == TRACE:
            promises["max_age"] = retention.trace_s
        if size := retention.size(kind):
            sizes["max_bytes"] = promises["max_bytes"] = size // partitions.count
        sizes["max_msg_size"] = min(sizes["max_msg_size"], client.max_payload)
        if kind not in HISTORY:
            yield kind, promises, sizes
            continue
        if "max_bytes" not in promises:
            sizes["max_bytes"] //= partitions.count
        for name, subjects in partitions.cut(kind).items():
            yield name, {"subjects": [subjects], **promises}, sizes


async def _check_cut(client: Client, partitions: Partitions) -> None:
    """Raises StreamUnfit where history stands here that is cut into another number of streams."""
    ask = json.dumps({"subject": f"{ROOTS[EVENTS]}.>"}).encode()
    reply = json.loads((await client.request("$JS.API.STREAM.LIST", ask, ANSWER_S)).data)
    if error := reply.get("error"):
        raise APIError.from_error(error)
    for found in reply.get("streams") or ():
        count = int((found["config"].get("metadata") or {}).get(CUT, 1))
        if holds_history(found["config"]["name"]) and count != partitions.count:
            raise StreamUnfit(
                f"history on this server is in {count} partitions, and SIA_PARTITIONS asks for {partitions.count}; "
                f"nothing was changed. Set SIA_PARTITIONS={count}, or use another SIA_HOME or server."
            )


def _has_aged(config: api.StreamConfig) -> bool:
    """Whether the stream ever let messages go by their age. The mark stays: what went then was never lost."""
    return AGED in (config.metadata or {})


def _value(setting: Any) -> Any:
    return getattr(setting, "value", setting)


async def _made_by_another(jetstream: JetStreamContext, name: str) -> api.StreamConfig | None:
    for _ in range(LOOKS):
        with suppress(NotFoundError):
            return (await jetstream.stream_info(name)).config
        await asyncio.sleep(LOOK_S)
    return None


async def _apply(call: Any, config: api.StreamConfig, changes: Mapping[str, Any] | None = None) -> None:
    try:
        await call(config)
    except APIError as error:
        if error.err_code in FULL:
            raise BusFull(
                f"the server has no room for stream {config.name} of {config.max_bytes} bytes; "
                "give its JetStream more (max_file_store)"
            ) from error
        wish = f"needs {dict(changes)}" if changes else "cannot be made"
        raise StreamUnfit(
            f"stream {config.name} {wish}: {error.description}. "
            "Its messages are untouched. Change it with the nats tool, or use another server."
        ) from error


async def read(
    client: Client,
    stream: str,
    start: int,
    subject: str | None = None,
    limit: int = 2**62,
    enough: int = 2**62,
    until: int = 2**62,
) -> list[Message]:
    """Up to `limit` messages from sequence `start` on, of one subject (which may hold wildcards) or of all.

    No more is asked for once they have `enough` bytes, or come to the sequence `until`.
    """
    return (await read_on(client, stream, start, subject, limit, enough, until))[0]


async def read_on(
    client: Client,
    stream: str,
    start: int,
    subject: str | None,
    limit: int,
    enough: int = 2**62,
    until: int = 2**62,
) -> tuple[list[Message], int]:
    """As `read`, and how many more there are behind those that were read.

    Batched direct get (NATS ADR-31): no consumer, so nothing is left behind. Raises one of UNANSWERED.
    """
    found: list[Message] = []
    inbox = await client.subscribe(client.new_inbox())
    try:
        pending, size = 1, 0
        while pending and len(found) < limit and size < enough and start <= until:
            # The server sends one message at least, and as many as have so many bytes.
            ask: dict[str, Any] = {"seq": start, "batch": min(limit - len(found), READ_AT_ONCE)}
            ask["max_bytes"] = min(enough, READ_BYTES)
            if subject:
                ask["next_by_subj"] = subject
            await client.publish(_direct(stream), json.dumps(ask).encode(), reply=inbox.subject)
            while "Nats-Sequence" in ((answer := await inbox.next_msg(ANSWER_S)).headers or {}):
                found.append(_stored(answer))
                size += len(answer.data)
                start = found[-1].sequence + 1
            headers = answer.headers or {}
            match headers.get("Status"):
                case "204":
                    pending = int(headers["Nats-Num-Pending"])
                case "404":
                    pending = 0
                case status:
                    raise nats.errors.NoRespondersError if status == "503" else APIError.from_msg(answer)
    finally:
        await inbox.unsubscribe()
    return found, pending


async def last_message(client: Client, stream: str, subject: str) -> Message | None:
    """The last message of the subject (which may hold wildcards); None where there is none that can be read."""
    ask = json.dumps({"last_by_subj": subject}).encode()
    answer = await client.request(_direct(stream), ask, ANSWER_S)
    headers = answer.headers or {}
    if "Nats-Sequence" in headers:
        return _stored(answer)
    if headers.get("Status") == "404":
        return None
    raise APIError.from_msg(answer)


def _direct(stream: str) -> str:
    return f"$JS.API.DIRECT.GET.{stream}"


def _stored(answer: Msg) -> Message:
    headers = answer.headers or {}
    return Message(int(headers["Nats-Sequence"]), headers["Nats-Subject"], answer.data, headers.get(IN_PLACE_OF, ""))


async def publish(client: Client, messages: Sequence[tuple[str, bytes, Mapping[str, str]]]) -> int | None:
    """Publish (subject, body, headers), all or none; the sequence of the last, or None where they met a conflict.

    Several are one atomic batch (NATS ADR-50). Raises BusFull, and one of UNANSWERED when the outcome is unknown.
    """
    if len(messages) > MAX_BATCH:
        raise ValueError(f"{len(messages)} records at once; an atomic append takes {MAX_BATCH} at most")
    try:
        batch = uuid4().hex
        for number, (subject, body, headers) in enumerate(messages[:-1], 1):
            part = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
            await client.publish(subject, body, headers={**headers, **part})
        subject, body, headers = messages[-1]
        if len(messages) > 1:
            part = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(len(messages)), "Nats-Batch-Commit": "1"}
            headers = {**headers, **part}
        reply = json.loads((await client.request(subject, body, ANSWER_S, headers=dict(headers))).data)
    except nats.errors.MaxPayloadError as error:
        raise ValueError(
            f"a message is over the server's {client.max_payload} bytes; put its body in a blob"
        ) from error
    match reply.get("error"):
        case None:
            return None if reply.get("duplicate") else reply["seq"]
        case {"err_code": code} if code in CONFLICTS:
            return None
        case {"err_code": code, "description": text} if code in FULL:
            raise BusFull(
                f"stream {reply.get('stream')} takes no more: {text}. Nothing was dropped; give it more room."
            )
        case {"err_code": code} if code in TOO_LARGE:
            raise ValueError(f"an event is over the limit of stream {reply.get('stream')}; put its body in a blob")
        case {"code": 503, "description": text}:
            raise nats.errors.TimeoutError(text)
        case error:
            raise APIError.from_error(error)


async def counted_last(client: Client, stream: str, subject: str) -> int:
    """The sequence that an expectation of the subject's last one is compared with: 0 where that cannot be read."""
    try:
        return (await client.jetstream().get_last_msg(stream, subject)).seq or 0
    except NotFoundError:
        return 0


async def nothing_behind(client: Client, stream: str, sequence: int) -> bool:
    """Whether no message behind the sequence can be read, by the word of whoever leads the stream."""
    try:
        await client.jetstream().get_msg(stream, sequence + 1, subject=">", next=True)
    except NotFoundError:
        return True
    return False


async def bounds(jetstream: JetStreamContext, stream: str) -> tuple[int, int]:
    """The sequence before which the stream has let everything go by its age, 1 where it never did; and the last."""
    info = await jetstream.stream_info(stream)
    ages = info.config.max_age or _has_aged(info.config)
    return max(1, info.state.first_seq) if ages else 1, info.state.last_seq


async def begins(jetstream: JetStreamContext, stream: str) -> int:
    """The sequence that the stream gave its first message."""
    return max(1, (await jetstream.stream_info(stream)).config.first_seq or 1)


async def begin_behind(jetstream: JetStreamContext, stream: str, sequence: int) -> None:
    """Have a stream without messages give none the sequences up to this one. Another is left alone."""
    info = await jetstream.stream_info(stream)
    if info.state.messages == 0 and info.state.last_seq < sequence:
        await jetstream.delete_stream(stream)  # made again by whoever connects next, if we are killed here
        await _apply(jetstream.add_stream, info.config.evolve(first_seq=sequence + 1))


async def subjects_with(client: Client, stream: str, pattern: str) -> dict[str, int]:
    """The subjects of the stream that match, each with its count of messages, without reading any of them."""
    found: dict[str, int] = {}
    while True:
        ask = json.dumps({"subjects_filter": pattern, "offset": len(found)}).encode()
        reply = json.loads((await client.request(f"$JS.API.STREAM.INFO.{stream}", ask, ANSWER_S)).data)
        if error := reply.get("error"):
            raise APIError.from_error(error)
        found |= (page := reply["state"].get("subjects") or {})
        if not page or len(found) >= reply.get("total", 0):
            return found
