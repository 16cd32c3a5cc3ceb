"""The recorder: what stands on the streams goes into the log, batch by batch, and is acked when it is on disk there."""

import hashlib
from contextlib import aclosing

from sia_events.shared.failpoints import reach
from sia_events.shared.ports import Bus, Feed, Log

NAME = "recorder"


async def record(bus: Bus, log: Log) -> None:
    """Copy until cancelled. Raises what the log raises; nothing is lost by it, the next call begins at that batch."""
    async with aclosing(bus.feed(NAME)) as feed:
        async for batch in feed:
            await store(batch, log)


async def catch_up(bus: Bus, log: Log) -> None:
    """Copy until the log has what the streams have. No other recorder may run."""
    if await bus.lag(NAME) <= 0:
        return
    async with aclosing(bus.feed(NAME)) as feed:
        async for batch in feed:
            await store(batch, log)
            if await bus.lag(NAME) <= 0:
                return


async def rebuild(bus: Bus, log: Log) -> None:
    """Empty the log and copy everything again, until it has caught up with the streams. No other recorder may run.

    The place is given up first: cut short between the two, the log holds too much and not too little.
    """
    await bus.rewind(NAME)
    reach("recorder before clearing the log")
    await log.clear()
    reach("recorder after clearing the log")
    await catch_up(bus, log)


async def store(batch: Feed, log: Log) -> None:
    """Insert a batch, then ack it. Its token is the batch's own, so that a second insert is none."""
    token = _token(batch)
    reach(f"recorder before inserting from {batch.stream}")
    if batch.records:
        await log.append(batch.records, token)
    if batch.envelopes:
        await log.append_traces(batch.envelopes, token)
    reach(f"recorder before acking {batch.stream}")
    await batch.ack()
    reach(f"recorder after acking {batch.stream}")


def _token(batch: Feed) -> str:
    """Its stretch of the stream, and a digest: what is put back on a stream that was lost has sequences of before."""
    held = hashlib.sha256()
    for record in batch.records:
        held.update(record.wire)
    for sequence, envelope in batch.envelopes:
        held.update(f"{sequence} {envelope.run} {envelope.kind} {envelope.key} ".encode())
        for line in envelope.lines:
            held.update(line)
    return f"{batch.stream} {batch.first}-{batch.last} {held.hexdigest()}"


async def lag(bus: Bus) -> int:
    """How many messages the log is behind the streams."""
    return await bus.lag(NAME)
