"""Runs side by side as one HTML page that needs nothing beside itself; whatever a run says is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sia_events.views.comparisons import (
    RUN_HEADS,
    adapter_rows,
    adapter_text,
    aligned,
    gain_text,
    generation_rows,
    harness_text,
    pair_title,
    run_cells,
)

COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bc4c00", "#0a7ea4", "#57606a")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 300, 48, 8, 16, 32
INSET, APART = 44, 10.0
"""What the outermost points stand from the sides, and lines from each other, at most."""

LONG = 60
"""A longer diff is folded, in lines."""
FLIPS = 1000
"""Items that flipped, of one split, before the page says how many more there are."""

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: 13px }
.add { color: #1a7f37 } .del { color: #d1242f } .key { display: inline-block; width: .8em; height: .8em }
svg { max-width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: currentColor }
"""


def comparison_page(compared: Mapping[str, Any]) -> str:
    """The whole page."""
    names = [str(run["run"]) for run in compared["runs"]]
    title, at = escape(", ".join(names)), aligned(compared)
    parts = [
        f"<h1>{title}</h1><p>{escape(at[:1].upper() + at[1:])}.</p>",
        _table(RUN_HEADS, [run_cells(run) for run in compared["runs"]]),
        "<h2>Gate score of the accepted version, by generation</h2>",
        _legend(names),
        _chart(compared, names),
        "<h2>Accepted versions, by generation and split</h2>",
        _table(("gen", "split", *names), generation_rows(compared)),
        *(_pair(pair) for pair in compared["pairs"]),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n' + "\n".join(
        [*parts, "</body></html>\n"]
    )


def _table(heads: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        said = ("" if cell is None else escape(str(cell)) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{each}</{tag}>" for each in said) + "</tr>"

    return f"<table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _legend(names: Sequence[str]) -> str:
    return (
        "<p>"
        + " ".join(
            f'<span class="key" style="background:{_colour(i)}"></span> {escape(name)} ' for i, name in enumerate(names)
        )
        + "</p>"
    )


def _chart(compared: Mapping[str, Any], names: Sequence[str]) -> str:
    """A line a run, with 95 % intervals.

    Shared generations are the same points: lines stand a little apart, and later ones have gaps that show the first.
    """
    rows = compared["generations"]
    points = {name: _gate_scores(rows, name) for name in names}
    ends = [end for line in points.values() for _, score in line for end in (score["low"], score["high"])]
    if not ends:
        return "<p>No version has met the gate.</p>"
    low, high = min(0.0, *ends), max(1.0, *ends)
    last = max(1, len(rows) - 1)
    middle = (len(names) - 1) / 2
    apart = min(APART, (INSET - 8) / max(middle, 1))

    def x(generation: float, i: float) -> float:
        return LEFT + INSET + (WIDTH - LEFT - RIGHT - 2 * INSET) * generation / last + apart * (i - middle)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    marks: list[str] = []
    for step in range(5):
        value = low + (high - low) * step / 4
        marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#8884"/>')
        marks.append(f'<text x="4" y="{y(value) + 4:.1f}">{value:.2f}</text>')
    for row in rows:
        at = f'x="{x(row["generation"], middle):.1f}" y="{HEIGHT - 8}" text-anchor="middle"'
        marks.append(f"<text {at}>g{row['generation']}</text>")
    for i, name in enumerate(names):
        line, stroke = points[name], f'stroke="{_colour(i)}"'
        path = " ".join(f"{x(g, i):.1f},{y(score['value']):.1f}" for g, score in line)
        gaps = f' stroke-dasharray="8 {8 * i}"' if i else ""
        marks.append(f'<polyline points="{path}" fill="none" stroke-width="2" {stroke}{gaps}/>')
        for g, score in line:
            across, down, up = x(g, i), y(score["low"]), y(score["high"])
            marks.append(f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{down:.1f}" y2="{up:.1f}" {stroke}/>')
            marks.append(f'<circle cx="{across:.1f}" cy="{y(score["value"]):.1f}" r="4" fill="{_colour(i)}"/>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(marks)}</svg>'


def _gate_scores(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, Mapping[str, float]]]:
    cells = [(row["generation"], row["runs"][name]) for row in rows]
    return [(generation, cell["scores"]["gate"]) for generation, cell in cells if cell and "gate" in cell["scores"]]


def _pair(pair: Mapping[str, Any]) -> str:
    parts = [f"<h2>{escape(pair_title(pair))}</h2>"]
    if pair["splits"]:
        parts.append(_table(("split", "gain"), [(split, gain_text(found)) for split, found in pair["splits"].items()]))
    for split, found in pair["splits"].items():
        flipped = [(kind, *each.values()) for kind, items in found["flips"].items() for each in items]
        if flipped:
            more = f"<p>and {len(flipped) - FLIPS} more</p>" if len(flipped) > FLIPS else ""
            body = _table(("", "item", "before", "after"), flipped[:FLIPS]) + more
            parts.append(f"<details><summary>{escape(split)}: {len(flipped)} items flipped</summary>{body}</details>")
    parts.append(f"<p>Adapter: {escape(adapter_text(pair, ' → '))}</p>")
    if rows := adapter_rows(pair):
        parts.append(_table(("", "before", "after"), rows))
    for path, diff in pair["files"].items():
        unfolded = "" if diff.count("\n") > LONG else " open"
        parts.append(f"<details{unfolded}><summary>{escape(path)}</summary><pre>{_coloured(diff)}</pre></details>")
    if not pair["files"]:
        parts.append(f"<p>Harness: {escape(harness_text(pair))}</p>")
    return "\n".join(parts)


def _coloured(diff: str) -> str:
    kinds = {"+": "add", "-": "del"}
    return "\n".join(
        f'<span class="{kinds[line[0]]}">{escape(line)}</span>' if line[:1] in kinds else escape(line)
        for line in diff.splitlines()
    )


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
