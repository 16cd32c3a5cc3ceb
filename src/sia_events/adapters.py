"""The adapters of a run: what each was learned from, whether it was proved to be served, and what the gate said."""

from collections.abc import Sequence
from typing import Any

from sia_events.shared.events import VersionAccepted, WeightsUpdated
from sia_events.shared.record import Record
from sia_events.shared.run import fold


def adapters(history: Sequence[Record]) -> list[dict[str, Any]]:
    """A row an adapter, in the order they were learned. Those that were refused are kept too, and serve nobody."""
    run = fold(history)

    def verdict(version: str) -> str:
        said = run.verdicts.get(version)
        return "waits" if said is None else "accepted" if isinstance(said, VersionAccepted) else "refused"

    return [
        {
            "version": learned.version,
            "parent": learned.parent,
            "from": run.versions[learned.parent].weights.adapter,
            "adapter": learned.weights.adapter,
            "model": learned.weights.model,
            "algorithm": learned.algorithm,
            "verdict": verdict(learned.version),
            "probe": learned.probe.model_dump() if learned.probe else None,
            "rollouts": learned.rollouts,
            "metrics": dict(learned.metrics),
            "seconds": learned.seconds,
            "manifest": learned.manifest,
        }
        for record in history
        if isinstance(learned := record.event, WeightsUpdated)
    ]
