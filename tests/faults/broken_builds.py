"""Builds that are broken on purpose, to see that the checker tells: each forgets one of the promises in order."""

from collections.abc import Callable, Mapping

from sia_events.event_log import recorder
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


BUILDS: Mapping[str, Callable[[], None]] = {
    each.__name__: each for each in (acks_before_the_insert, gives_before_it_records)
}
