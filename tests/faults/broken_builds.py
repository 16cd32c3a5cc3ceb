"""Builds that are broken on purpose, to see that the checker tells: each forgets one of the promises in order."""

from collections.abc import Callable, Mapping, Sequence
from uuid import uuid4

from nats.aio.client import Client

from sia_events.event_log import recorder
from sia_events.infra import nats
from sia_events.infra.nats_partitions import ROOTS, TRACE
from sia_events.model_gateway.journal import Journal
from sia_events.shared.calls import ModelCall
from sia_events.shared.ports import Feed, Log


def acks_before_the_insert() -> None:
    """The recorder moves on before the log has the batch."""
    store = recorder.store

    async def acking(batch: Feed, log: Log) -> None:
        await batch.ack()
        await store(batch, log)

    recorder.store = acking


def gives_before_it_records() -> None:
    """The gateway gives a reply away while its record still waits for the next one."""
    record, waiting = Journal.record, list[tuple[Journal, str, ModelCall]]()

    async def recording(journal: Journal, run: str, call: ModelCall) -> None:
        waiting.append((journal, run, call))
        if len(waiting) > 1:
            await record(*waiting.pop(0))

    Journal.record = recording


def sends_envelopes_twice() -> None:
    """An envelope goes out once more under another id, as if the server had not answered."""
    publish = nats.publish

    async def publishing(client: Client, messages: Sequence[tuple[str, bytes, Mapping[str, str]]]) -> int | None:
        ((subject, body, headers), *more) = messages
        if subject.startswith(f"{ROOTS[TRACE]}."):
            await publish(client, [(subject, body, {**headers, "Nats-Msg-Id": uuid4().hex}), *more])
        return await publish(client, messages)

    nats.publish = publishing


BUILDS: Mapping[str, Callable[[], None]] = {
    each.__name__: each for each in (acks_before_the_insert, gives_before_it_records, sends_envelopes_twice)
}
