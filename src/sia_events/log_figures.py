"""The figures of the event log: which parts there are, and at which sizes their goals hold."""

from collections.abc import AsyncIterator, Collection
from importlib.util import find_spec
from pathlib import Path

from sia_events import replay_figures, store_figures, stream_figures
from sia_events.figures import Figure, with_model
from sia_events.local_model.weights import CARRIER
from sia_events.shared.settings import Settings

BATCHES, SECONDS, EVENTS, ROWS, REPLAYED = 400, 60.0, 10**6, 10**7, 10**6
DEPTHS = (10**2, 10**4, 10**6)


async def measured(settings: Settings, folder: Path, parts: Collection[str], scale: float) -> AsyncIterator[Figure]:
    """Every figure of these parts as it is found, at `scale` times the sizes that the goals are for.

    The embedded model of `settings`, where it is installed, is there when services start again.
    """

    def home(part: str) -> Path:
        (folder / part).mkdir()
        return folder / part

    if "append" in parts:
        for figure in await stream_figures.durable_append(home("append"), round(BATCHES * scale)):
            yield figure
    if "trace" in parts:
        yield await stream_figures.accepted(home("accepted"), SECONDS * scale)
        for figure in await stream_figures.sustained(home("trace"), SECONDS * scale):
            yield figure
    if "events" in parts:
        whole = home("events")
        yield await store_figures.reconciled(whole, round(EVENTS * scale))
        if None not in (find_spec("torch"), find_spec(CARRIER)):
            with_model(settings, whole)
        yield await store_figures.restart(whole)
    if "rows" in parts:
        for figure in await store_figures.run_by_position(home("rows"), round(ROWS * scale)):
            yield figure
    if "replay" in parts:
        for figure in await replay_figures.replayed(round(REPLAYED * scale)):
            yield figure
    if "branch" in parts:
        depths = [max(1, round(depth * scale)) for depth in DEPTHS]
        for figure in await replay_figures.branched(home("branch"), depths):
            yield figure
