"""How much a feed hands out at once: so many bytes, packed and unpacked, however large the messages are."""

import asyncio
import random
import zlib
from base64 import b64encode
from pathlib import Path

import nats
import pytest
from bus_on import on
from nats.aio.msg import Msg
from nats.js import api
from nats.js.client import JetStreamContext

from sia_events.infra.nats import FEED_BYTES, NatsBus
from sia_events.infra.nats_feed import Place, keep
from sia_events.infra.nats_server import running
from sia_events.infra.nats_streams import READ_AT_ONCE, Message
from sia_events.infra.nats_wire import UNPACKED, packed, read_envelope
from sia_events.infra.zstd import zstd
from sia_events.shared.ports import Envelope, Feed
from sia_events.shared.record import UnreadableRecord

LARGE = b64encode(random.Random(1).randbytes(4 * 2**20))  # it does not get much smaller when it is packed
LONG = b"long" * (3 * FEED_BYTES // 16)  # it does


async def batch(bus: NatsBus) -> Feed:
    return await anext(bus.feed("recorder"))


async def test_batches_of_large_messages_are_cut_at_so_many_bytes_and_come_again_as_they_were(tmp_path: Path):
    async with running(tmp_path) as url, on(url) as bus, on(url) as other:
        sent = [Envelope("r", "log", f"k{n}", (LARGE + b"%d" % n,)) for n in range(6)]
        sent += [Envelope("r", "log", f"k{n}", (LONG + b"%d" % n,)) for n in range(6, 9)]
        for envelope in sent:
            await bus.trace(envelope)
        came: list[Envelope] = []
        while await bus.lag("recorder"):
            first, again = await batch(bus), await batch(other)
            assert (again.stream, again.first, again.last) == (first.stream, first.first, first.last)
            assert again.envelopes == first.envelopes
            size = sum(len(line) for _, envelope in first.envelopes for line in envelope.lines)
            assert size < FEED_BYTES + len(LONG) and len(first.envelopes) < 4
            came += [envelope for _, envelope in first.envelopes]
            await again.ack()
        assert came == sent


async def test_a_batch_whose_last_messages_were_lost_is_handed_out_with_what_is_left_and_owes_nothing(tmp_path: Path):
    async with running(tmp_path) as url, on(url) as bus:
        for number in range(3):
            await bus.trace(Envelope("r", "log", f"k{number}", (b"{}",)))
        assert (await batch(bus)).last == 3
    (block,) = (tmp_path / "jetstream/$G/streams/SIA_TRACE/msgs").glob("*.blk")
    body = bytearray(block.read_bytes())
    body[body.index(b"sia.trace.r.log.k2") + 100] ^= 1
    block.write_bytes(body)
    async with running(tmp_path) as url, on(url) as bus:
        left = await batch(bus)
        assert (left.last, len(left.envelopes)) == (2, 2)
        await left.ack()
        assert await bus.lag("recorder") == 0
        await bus.trace(Envelope("r", "log", "k3", (b"{}",)))
        assert [envelope.key for _, envelope in (await batch(bus)).envelopes] == ["k3"]


async def test_a_first_batch_that_comes_again_is_read_to_its_end_and_no_further_though_age_has_taken_what_came_before(
    tmp_path: Path,
):
    async with running(tmp_path) as url:
        client = await nats.connect(url)
        stream: JetStreamContext = client.jetstream()
        config = api.StreamConfig(name="SIA_TRACE", subjects=["sia.trace.>"], first_seq=1_000_000, allow_direct=True)
        await stream.add_stream(config)
        bodies = range(2 * READ_AT_ONCE)
        await asyncio.gather(*(stream.publish("sia.trace.r.log.k", packed([b"%d" % n], 999)[0]) for n in bodies))
        async with on(url) as bus:
            await keep(client, "recorder", "SIA_TRACE", Place(acked=0, offered=1_000_001))
            sent = await client.subscribe("_INBOX.>")
            again = await batch(bus)
            assert [sequence for sequence, _ in again.envelopes] == [1_000_000, 1_000_001]
            await client.flush()
            read = [each for each in [await sent.next_msg() for _ in range(sent.pending_msgs)] if stored_in(each)]
            assert len(read) <= READ_AT_ONCE
        await client.close()


def stored_in(message: Msg) -> bool:
    return (message.headers or {}).get("Nats-Stream") == "SIA_TRACE"


async def test_what_would_unpack_to_more_than_any_envelope_is_none(tmp_path: Path):
    bomb = zstd.compress(bytes(UNPACKED + 1))
    assert len(bomb) < 10_000
    async with running(tmp_path) as url, on(url) as bus:
        client = await nats.connect(url)
        stream: JetStreamContext = client.jetstream()
        for body in (bomb, zlib.compress(bytes(UNPACKED + 1)), zstd.compress(b"{}")[:-1], zstd.compress(b"{}") + b"x"):
            await stream.publish("sia.trace.r.log.k", body)
        await stream.publish("sia.trace.r.log.k", zlib.compress(b"{}"))
        await client.close()
        assert [envelope.lines for envelope in await bus.traces("r", "log", "k")] == [(b"{}",)]
        why = [message.why async for message in bus.streams.traced("r")]
    assert [("more than" in each, "cut short" in each) for each in why] == [(1, 0), (1, 0), (0, 1), (0, 1), (0, 0)]


def test_an_envelope_of_more_than_that_goes_in_parts_and_a_line_of_more_is_refused():
    line = bytes(UNPACKED // 2 + 1)
    parts = packed([line, line, b"{}"], 2**20)
    read = [read_envelope(Message(n, "sia.trace.r.log.k", body)).lines for n, body in enumerate(parts, 1)]
    assert [each for lines in read for each in lines] == [line, line, b"{}"] and len(parts) == 2
    with pytest.raises(ValueError, match="put its body in a blob"):
        packed([bytes(UNPACKED + 1)], 2**20)
    with pytest.raises(UnreadableRecord, match="no envelope"):
        read_envelope(Message(1, "sia.trace.r.log.k", b"junk"))
