"""Rows in columns: runs, tasks, what the doctor found."""

from collections.abc import Mapping, Sequence
from typing import Any


def runs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "no runs yet: sia run words starts one"
    cells = [
        (
            *(r[name] for name in ("run", "task", "status", "generations", "best", "outcome", "records")),
            (r["started"] or "")[:19],
        )
        for r in rows
    ]
    heads = ("run", "task", "status", "generation", "best", "outcome", "records", "started (UTC)")
    return "\n".join([table(heads, cells), *(r["reason"] for r in rows if r["status"] == "unreadable")])


def tasks_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [(r["task"], r["title"], r["metric"], ", ".join(f"{s} {n}" for s, n in r["splits"].items())) for r in rows]
    return table(("task", "title", "metric", "items"), cells)


def doctor_text(checks: Sequence[Any]) -> str:
    marks = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
    lines: list[str] = []
    for check in checks:
        lines.append(f"{marks[check.status]}  {check.name:<20}{check.detail}")
        if check.fix:
            lines.append(f"{'':<26}mend: {check.fix}")
    return "\n".join(lines)


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The rows under their heads, each column as wide as its widest cell."""
    text = [[("" if cell is None else str(cell)) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[i]) for row in text) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in text
    )
