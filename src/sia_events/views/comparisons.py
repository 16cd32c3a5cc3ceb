"""Runs side by side as people see them in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from sia_events.shared.summary import shown
from sia_events.views.records import clean
from sia_events.views.tables import table

SPLITS = ("dev", "gate", "test")
FLIPS = 8
SEALED, SPENT = ("first, sealed", "final, sealed", "p"), ("calls", "tokens", "USD", "seconds")
RUN_HEADS = ("run", "lever", "status", "best", *SEALED, *SPENT)


def comparison_text(compared: Mapping[str, Any]) -> str:
    """`sia compare`: a row a run; the incumbents by generation and split; each run against the first."""
    runs = compared["runs"]
    parts = [table(RUN_HEADS, [run_cells(run) for run in runs])]
    parts += ["", f"the accepted version behind each generation; {aligned(compared)}"]
    heads = ("gen", "split", *(str(run["run"]) for run in runs))
    parts.append(table(heads, generation_rows(compared)))
    for pair in compared["pairs"]:
        parts += ["", *pair_lines(pair)]
    return clean("\n".join(parts))


def run_cells(run: Mapping[str, Any]) -> tuple[object, ...]:
    """A run's cells under RUN_HEADS."""
    sealed, cost = run["sealed"], run["cost"]
    scores = (shown(sealed["first"]), shown(sealed["final"]), f"{sealed['p_value']:.2g}") if sealed else ("", "", "")
    dollars = "unknown" if cost["usd"] is None else f"{cost['usd']:.2f}"
    shared = (cost.get("inherited") or {}).get("model_calls", 0)
    calls = f"{cost['model_calls']:,}" + (f" ({shared:,} of its parents)" if shared else "")
    spent = (calls, f"{cost['tokens']:,}", dollars, f"{cost['seconds']:.0f}")
    return (run["run"], run["lever"], run["status"], run["best"], *scores, *spent)


def aligned(compared: Mapping[str, Any]) -> str:
    """Where the runs part, in words."""
    fork = compared["fork"]
    if fork is None:
        return "nothing is shared: these are separate runs"
    return f"the first {fork['position']} records are shared, up to generation {fork['generation']}"


def generation_rows(compared: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """A row a generation in which a run accepted a version, and split: what each run's incumbent scored there."""
    rows: list[tuple[object, ...]] = []
    for each in compared["generations"]:
        cells = [each["runs"][run["run"]] for run in compared["runs"]]
        for split in SPLITS:
            if any(cell and cell["new"] and split in cell["scores"] for cell in cells):
                rows.append((each["generation"], split, *(_cell(cell, split) for cell in cells)))
    return rows


def _cell(cell: Mapping[str, Any] | None, split: str) -> str:
    if cell is None or split not in cell["scores"]:
        return ""
    lever = f" {cell['lever']}" if cell["new"] and cell["lever"] else ""
    return f"{cell['version']}{lever} {shown(cell['scores'][split])}"


def gain_text(found: Mapping[str, Any]) -> str:
    """ "+0.250 [+0.010, +0.490], p = 0.03, 12 items: 4 better, 1 worse"."""
    interval = f"{found['gain']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    items = f"{found['n']} items: {found['better']} better, {found['worse']} worse"
    return f"{interval}, p = {found['p_value']:.2g}, {items}"


def pair_title(pair: Mapping[str, Any]) -> str:
    """Which version is set against which, and where their runs part."""
    old, new = (version or "none accepted" for version in pair["versions"])
    apart = f"apart behind record {pair['fork']['position']}" if pair["fork"] else "nothing is shared"
    return f"{pair['after']} ({new}) against {pair['before']} ({old}), {apart}"


def pair_lines(pair: Mapping[str, Any]) -> list[str]:
    """What one run has over another: gains, items that flipped, adapters and files."""
    lines = [pair_title(pair)]
    for split, found in pair["splits"].items():
        lines.append(f"  {split:<5}{gain_text(found)}")
        for kind, flipped in found["flips"].items():
            if flipped:
                lines.append(f"       {kind}: {_few([each['item'] for each in flipped])}")
    if not pair["splits"]:
        lines.append("  no items that both were scored on")
    lines.append(f"  adapter {adapter_text(pair, ' -> ')}")
    if rows := adapter_rows(pair):
        lines += [f"    {line}" for line in table(("", "before", "after"), rows).splitlines()]
    changed = [f"{path} {_changed(diff)}" for path, diff in pair["files"].items()]
    lines.append(f"  harness {', '.join(changed) or harness_text(pair)}")
    return lines


def harness_text(pair: Mapping[str, Any]) -> str:
    """What there is to say of two harnesses of which no file differs."""
    return "the same" if all(pair["versions"]) else "not compared: one of them is not there"


def adapter_text(pair: Mapping[str, Any], then: str) -> str:
    """The adapter before, and the one after where it is another."""
    return then.join(dict.fromkeys(row["adapter"][:12] if row else "none" for row in pair["adapters"]))


def adapter_rows(pair: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, before, after) of all in which the two adapters were learned otherwise."""
    old, new = (_learned(row) for row in pair["adapters"])
    return [(what, old.get(what, ""), new.get(what, "")) for what in {**old, **new} if old.get(what) != new.get(what)]


def _learned(row: Mapping[str, Any] | None) -> dict[str, str]:
    """How an adapter came about, by name."""
    if row is None:
        return {}
    told = {"version": row["version"], "of": row["parent"], "model": row["model"], "from": (row["from"] or "base")[:12]}
    learned = {"algorithm": row["algorithm"], "rollouts": f"{row['rollouts']:,}", "seconds": f"{row['seconds']:.1f}"}
    return {**told, **learned, **{name: f"{value:.4g}" for name, value in sorted(row["metrics"].items())}}


def _few(items: Sequence[str]) -> str:
    more = f" and {len(items) - FLIPS} more" if len(items) > FLIPS else ""
    return ", ".join(items[:FLIPS]) + more


def _changed(diff: str) -> str:
    if not diff.startswith("---"):
        return f"({diff})"
    body = diff.splitlines()[2:]
    return f"+{sum(line.startswith('+') for line in body)} -{sum(line.startswith('-') for line in body)}"
