"""The streams on JetStream: how they are made, and the two things done with them, reading a stretch and publishing."""

import asyncio
import json
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import nats.errors
from nats.aio.client import Client
from nats.js import JetStreamContext, api
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from sia_events.shared.ports import BusFull

EVENTS = "SIA"
TRACE = "SIA_TRACE"
PLACES = "SIA_PLACES"
ADVISORIES = "SIA_ADVISORIES"

ANSWER_S = 2.0  # an answer that takes longer counts as none: what was asked is then looked up
LOOKS, LOOK_S = 20, 0.05
READ_AT_ONCE = 500
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
    EVENTS: {"subjects": ["sia.events.>"], "allow_atomic": True, **_HISTORY},
    TRACE: {"subjects": ["sia.trace.>"], "compression": "s2", **_HISTORY},
    PLACES: {"subjects": ["sia.places.>"], "max_msgs_per_subject": 1, "discard": "old", "allow_direct": True},
    # Advisories are ordinary messages, lost when nobody listens; here they wait until somebody looks.
    ADVISORIES: {
        "subjects": [f"$JS.EVENT.ADVISORY.CONSUMER.{kind}.>" for kind in ("MAX_DELIVERIES", "MSG_TERMINATED")],
        "discard": "old",
    },
}
# How large each may get at least; an operator may have given more.
_SIZES: dict[str, dict[str, float]] = {
    EVENTS: {"max_bytes": 2 * 2**30, "max_msg_size": 2**20, "duplicate_window": 600},
    TRACE: {"max_bytes": 8 * 2**30, "max_msg_size": 8 * 2**20, "duplicate_window": 600},
    PLACES: {"max_bytes": 2**20, "max_msg_size": 2**10},
    ADVISORIES: {"max_bytes": 16 * 2**20, "max_msg_size": 2**16},
}


class StreamUnfit(Exception):
    """A stream of ours exists with a configuration that breaks a promise and cannot be changed."""


T = TypeVar("T")


@dataclass(frozen=True)
class Message:
    """A stored message."""

    sequence: int
    subject: str
    data: bytes


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


async def ensure_streams(client: Client, replicas: int = 1) -> None:
    """Make the streams, and hold those that exist to their promises. Raises StreamUnfit, BusFull."""
    jetstream = client.jetstream()
    for name, promises in _PROMISES.items():
        fixed: dict[str, Any] = {"name": name, "storage": "file", "retention": "limits", **promises}
        try:
            found = (await jetstream.stream_info(name)).config
        except NotFoundError:
            fits: dict[str, Any] = {size: _within(client, size, least) for size, least in _SIZES[name].items()}
            made = api.StreamConfig(num_replicas=replicas, **fixed, **fits)
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
        for size, least in _SIZES[name].items():
            have = getattr(found, size) or 0
            if 0 < have < _within(client, size, least):
                changes[size] = _within(client, size, least)
        if _value(found.persist_mode) == "async":
            changes["persist_mode"] = "default"
        if changes:
            await _apply(jetstream.update_stream, found.evolve(**changes), changes)


def _within(client: Client, size: str, least: float) -> float:
    return min(least, client.max_payload) if size == "max_msg_size" else least


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
    client: Client, stream: str, start: int, subject: str | None = None, limit: int = 2**62
) -> list[Message]:
    """Up to `limit` messages from sequence `start` on, of one subject (which may hold wildcards) or of all.

    Batched direct get (NATS ADR-31): no consumer, so nothing is left behind. Raises one of UNANSWERED.
    """
    found: list[Message] = []
    inbox = await client.subscribe(client.new_inbox())
    try:
        pending = 1
        while pending and len(found) < limit:
            ask: dict[str, Any] = {"seq": start, "batch": min(limit - len(found), READ_AT_ONCE)}
            if subject:
                ask["next_by_subj"] = subject
            await client.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(ask).encode(), reply=inbox.subject)
            while "Nats-Sequence" in (headers := (answer := await inbox.next_msg(ANSWER_S)).headers or {}):
                found.append(Message(int(headers["Nats-Sequence"]), headers["Nats-Subject"], answer.data))
                start = found[-1].sequence + 1
            match headers.get("Status"):
                case "204":
                    pending = int(headers["Nats-Num-Pending"])
                case "404":
                    pending = 0
                case status:
                    raise nats.errors.NoRespondersError if status == "503" else APIError.from_msg(answer)
    finally:
        await inbox.unsubscribe()
    return found


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


async def last_sequence(jetstream: JetStreamContext, stream: str) -> int:
    return (await jetstream.stream_info(stream)).state.last_seq


async def subjects_with(client: Client, stream: str, pattern: str) -> list[str]:
    """The subjects of the stream that match, without reading any message."""
    found: list[str] = []
    while True:
        ask = json.dumps({"subjects_filter": pattern, "offset": len(found)}).encode()
        reply = json.loads((await client.request(f"$JS.API.STREAM.INFO.{stream}", ask, ANSWER_S)).data)
        if error := reply.get("error"):
            raise APIError.from_error(error)
        found.extend(page := reply["state"].get("subjects") or {})
        if not page or len(found) >= reply.get("total", 0):
            return found
