"""The adapters of a run as people see them."""

from collections.abc import Mapping, Sequence
from typing import Any

from sia_events.views.tables import table


def adapters_text(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "no adapters: the weights lever was not pulled yet"
    heads = ("version", "of", "algorithm", "gate", "adapter", "from", "probe: apart", "moved", "rollouts", "seconds")
    return table(heads, [_cells(row) for row in rows])


def _cells(row: Mapping[str, Any]) -> tuple[object, ...]:
    probe = row["probe"]
    apart, moved = (f"{probe['apart']:.1g}", f"{probe['moved']:.3g}") if probe else ("none made", "")
    names = [digest[:12] if digest else "base" for digest in (row["adapter"], row["from"])]
    told = (row["version"], row["parent"], row["algorithm"], row["verdict"])
    return (*told, *names, apart, moved, row["rollouts"], f"{row['seconds']:.1f}")
