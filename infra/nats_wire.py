"""How records and envelopes stand on the wire: subjects, headers, bodies."""

import zlib
from collections.abc import Sequence
from typing import Any, cast
from urllib.parse import quote, unquote

from sia_events.infra.delivery import checked_name
from sia_events.infra.nats_partitions import EVENTS, TRACE, WHOLE, Partitions
from sia_events.infra.nats_streams import Message
from sia_events.infra.zstd import zstd
from sia_events.shared.ports import Envelope
from sia_events.shared.record import Record, UnreadableRecord, parse_record

CLOUD_EVENTS = {"Content-Type": "application/cloudevents+json"}
# RFC 8878, section 3.1.1; a level at which envelopes of model calls are 7 % smaller than by zlib's, and done sooner.
ZSTD_FRAME, LEVEL, ENCODING = b"\x28\xb5\x2f\xfd", 9, "zstd"
UNPACKED = 64 * 2**20  # bytes that an envelope's lines take at most: a small body can say that it is a huge one


def subject_of(record: Record, partitions: Partitions = WHOLE) -> str:
    return partitions.subject(EVENTS, record.run, record.type)


def run_of(subject: str) -> str:
    return subject.split(".")[2]


def read_record(message: Message, partitions: Partitions = WHOLE) -> Record:
    """Raises UnreadableRecord for what is no record, or one that belongs under another subject."""
    record = parse_record(message.data)
    try:
        checked_name(record.run)
    except ValueError as error:
        raise UnreadableRecord(str(error)) from error
    if subject_of(record, partitions) != message.subject:
        raise UnreadableRecord(f"a {record.type} of run {record.run!r} under the subject {message.subject}")
    return record


def trace_subject(run: str, kind: str, key: str | None, partitions: Partitions = WHOLE) -> str:
    """Where envelopes of a key stand; without a key, the subjects of all."""
    last = "*" if key is None else quote(key, safe="").replace(".", "%2E")
    return partitions.subject(TRACE, checked_name(run), kind, last)


def read_envelope(message: Message, partitions: Partitions = WHOLE) -> Envelope:
    """Raises UnreadableRecord for what no `trace` wrote."""
    try:
        _, _, run, kind, key, *partition = message.subject.split(".")
        if partition != partitions.last(run):
            raise ValueError("its run has its traces elsewhere")
        lines = tuple(_unpacked(message.data).split(b"\n")) if message.data else ()
    except (ValueError, zlib.error, zstd.ZstdError) as error:
        raise UnreadableRecord(f"no envelope under {message.subject}: {error}") from error
    return Envelope(run, cast(Any, kind), unquote(key), lines)


def packed(lines: Sequence[bytes], limit: int) -> list[bytes]:
    """The lines in bodies of at most `limit` bytes, and UNPACKED before that; halved until they fit."""
    text = b"\n".join(lines)
    if len(text) <= UNPACKED:
        body = zstd.compress(text, LEVEL) if lines else b""
        if len(body) <= limit:
            return [body]
    if len(lines) == 1:
        raise ValueError(f"a trace line of {len(lines[0])} bytes is over the server's limit; put its body in a blob")
    half = len(lines) // 2
    return packed(lines[:half], limit) + packed(lines[half:], limit)


def _unpacked(body: bytes) -> bytes:
    """Envelopes were packed by zlib once, and a stream keeps them as they are."""
    unpacker = zstd.ZstdDecompressor() if body.startswith(ZSTD_FRAME) else zlib.decompressobj()
    text = unpacker.decompress(body, UNPACKED + 1)
    if len(text) > UNPACKED:
        raise ValueError(f"its {len(body)} bytes would be more than {UNPACKED} unpacked")
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("it is cut short, or something stands behind its end")
    return text
