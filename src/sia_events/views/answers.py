"""What SQL found, as people see it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sia_events.views.records import clean
from sia_events.views.tables import table

CELL_CHARS = 60


def rows_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; a long cell is cut, and `--json` has all of it."""
    if not rows:
        return "no rows"
    return clean(table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows]))


def views_text(views: Sequence[Mapping[str, Any]]) -> str:
    return table(("view", "columns"), [(view["table"], ", ".join(view["columns"])) for view in views])


def _cell(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= CELL_CHARS else text[: CELL_CHARS - 1] + "…"
