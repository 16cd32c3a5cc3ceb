"""The tree of runs as people see it: a run a line, its branches below it."""

from collections.abc import Mapping, Sequence
from typing import Any

from sia_events.shared.summary import shown
from sia_events.views.records import clean


def tree_text(roots: Sequence[Mapping[str, Any]]) -> str:
    if not roots:
        return "no runs yet: sia run words starts one"
    return clean("\n".join(line for root in roots for line in _lines(root, "", "")))


def _lines(run: Mapping[str, Any], first: str, rest: str) -> list[str]:
    """The run's line behind `first`, and its branches' behind `rest`."""
    lines = [first + _line(run)]
    for branch in run["branches"]:
        last = branch is run["branches"][-1]
        lines += _lines(branch, f"{rest}{'└─ ' if last else '├─ '}", f"{rest}{'   ' if last else '│  '}")
    return lines


def _line(run: Mapping[str, Any]) -> str:
    if run["status"] == "unreadable":
        return f"{run['run']}   {run['reason']}"
    parts = [run["run"]]
    if run["at"] is None:
        parts.append(f"task {run['task']}")
    else:
        changed = ", ".join(f"{name}={value}" for name, value in run["changed"].items())
        parts.append(f"at {run['at']}, generation {run['branched_at_generation']}: {changed or 'nothing changed'}")
    parts.append(run["outcome"] or run["status"])
    if run["best"]:
        parts.append(f"{run['best']} {shown(run['score'])}" if run["score"] else run["best"])
    return "   ".join(parts).replace("\n", " ")
