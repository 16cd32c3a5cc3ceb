"""Runs decided again from the log, one or all of them, and the state that a run had at some position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sia_events import app
from sia_events.errors import Unusable
from sia_events.reading import every_lineage, look, records
from sia_events.shared.record import Record
from sia_events.shared.replay import Replayed, replay
from sia_events.shared.run import Run, fold
from sia_events.shared.settings import Settings


@dataclass(frozen=True)
class Stretch:
    """Which positions to decide again; None is the end of the run."""

    first: int = 1
    last: int | None = None


async def one(settings: Settings, run: str, stretch: Stretch, keep_going: bool) -> Replayed:
    """Replay a run. Raises Unusable for positions that it does not have."""
    history = await records(settings, run)
    last = len(history) if stretch.last is None else stretch.last
    if not 1 <= stretch.first <= last <= len(history):
        raise Unusable(f"run {history[-1].run} has positions 1 to {len(history)}, and no {stretch.first} to {last}")
    return _decided(history, stretch, keep_going)


async def every(settings: Settings, keep_going: bool) -> Mapping[str, Replayed | str]:
    """Replay all runs, oldest first; of a run that this release cannot read, why not."""

    def decided(history: Sequence[Record]) -> Replayed:
        return _decided(history, Stretch(), keep_going)

    return await look(settings, lambda log: every_lineage(log, decided))


async def state(settings: Settings, run: str, at: int | None) -> Run:
    """The fold of a run's records up to position `at`; of all of them where it is None. Raises Unusable."""
    found = await records(settings, run)
    if at is not None and not 1 <= at <= len(found):
        raise Unusable(f"run {found[-1].run} has positions 1 to {len(found)}, and no {at}")
    return fold(found[:at])


def _decided(history: Sequence[Record], stretch: Stretch, keep_going: bool) -> Replayed:
    return replay(history, tuple(app.SERVICES.values()), stretch.first, stretch.last, keep_going)
