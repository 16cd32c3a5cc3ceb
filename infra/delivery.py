"""How a record is tried again, and what is recorded when a service gives up on it: the same on every bus."""

import random
import re
from contextlib import suppress

import structlog

from sia_events.infra.blobs import BlobsUnavailable
from sia_events.infra.room import is_full
from sia_events.infra.tail import RunIncomplete
from sia_events.shared.events import ServiceFailed
from sia_events.shared.ports import Blobs, Bus, ProviderAway
from sia_events.shared.record import Draft, Record, derived_id

TRIES = 5
LONGEST_S = 30.0

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
log = structlog.get_logger()


def checked_name(run: str) -> str:
    """`run`, if it can name a run: it becomes part of subjects and of file names. Raises ValueError."""
    if not _RUN_NAME.fullmatch(run):
        raise ValueError(f"{run!r} cannot name a run: use 1 to 64 letters, digits, '-' and '_', no '-' or '_' first")
    return run


def delay(tries: int, first: float) -> float:
    """Seconds until the next try after `tries` failed ones: doubling from `first`, up to a quarter of jitter."""
    return min(first * 2.0 ** min(tries - 1, 64), LONGEST_S) * random.uniform(1.0, 1.25)


def is_outage(error: Exception) -> bool:
    """Whether a disk is full or the blobs are away, which is no fault of the record: it waits, and has all its tries.

    Nor could its letter be written meanwhile, which keeps a blob.
    """
    return is_full(error) or isinstance(error, BlobsUnavailable)


def is_last(error: Exception, tries: int) -> bool:
    """Whether a record that failed so often is given up on. Who waited for a provider in vain has tried already."""
    return tries >= TRIES or isinstance(error, ProviderAway)


async def give_up(
    bus: Bus, blobs: Blobs, service: str, record: Record, payload: bytes, sequence: int, error: Exception, tries: int
) -> None:
    """Record that `service` failed on `record`, with the payload kept: a letter each time that it gave up."""
    log.error("gave up on a record", service=service, run=record.run, record=record.type, tries=tries, error=str(error))
    if isinstance(record.event, ServiceFailed):
        return  # a dead letter about a dead letter would never end
    event = ServiceFailed(
        service=service,
        failed=str(record.id),
        sequence=sequence,
        error=_described(error),
        payload=await blobs.put(payload),
        tries=tries,
    )
    letters = [r for r in await bus.history(record.run) if isinstance(r.event, ServiceFailed)]
    nth = sum((each.cause, each.producer) == (record.id, service) for each in letters)
    letter = derived_id(record.run, record.id, service, f"failed {nth}" if nth else "failed")
    await bus.append(record.run, [Draft(event, service, record.id, record.correlation, letter)])


async def give_up_unread(
    bus: Bus, blobs: Blobs, service: str, run: str, payload: bytes, sequence: int, error: Exception
) -> None:
    """Record that a message under the run's subjects is no record. Whoever meets it first does so: the id is the same.

    Where the run has no record at all there is nothing to attach the letter to, and none is written into a run that has
    lost some: then the message is only logged.
    """
    history = await bus.history(run)
    log.error("a message under a run is no record", run=run, sequence=sequence, error=str(error))
    if not history:
        return
    event = ServiceFailed(
        service=service,
        failed=None,
        sequence=sequence,
        error=_described(error),
        payload=await blobs.put(payload),
        tries=1,
    )
    letter = derived_id(run, None, "stream", f"sequence {sequence}")
    with suppress(RunIncomplete):
        await bus.append(run, [Draft(event, service, history[0].id, history[0].correlation, letter)])


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
