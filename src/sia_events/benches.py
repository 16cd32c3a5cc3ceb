"""`sia bench`: figures of this machine, each beside what it is compared with, measured in one run."""

import json
import os
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sia_events import figures, overheads
from sia_events.figures import INSTANT, REAL, Figure
from sia_events.shared.events import SEEDS_APART
from sia_events.shared.settings import Settings


def kernels(source: Path | None, repeats: int, seed: int, as_json: bool) -> str:
    """TriMul candidates against the reference; see kernel_bench/measure.py for what is guarded."""
    from sia_events.kernel_bench.measure import measure
    from sia_events.kernel_bench.problems import TRIMUL, shipped
    from sia_events.kernel_bench.report import render

    named = (
        {source.name: source.read_text()}
        if source
        else {n: shipped(n) for n in ("reference", "channel_first", "row_blocked")}
    )
    rows = [(name, measure(text, TRIMUL, seed=seed, repeats=repeats)) for name, text in named.items()]
    return json.dumps([{"candidate": name, **asdict(row)} for name, row in rows]) if as_json else render(rows)


async def loop(settings: Settings, seeds: int, quick: bool, as_json: bool) -> str:
    """Every figure of the loop; `quick` leaves out the real model, which takes minutes a seed.

    All is measured under SIA_HOME, on the disk that runs would use, in a folder that is removed in the end.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    found: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=settings.home) as folder:
        model = INSTANT if quick else REAL
        homes = {name: Path(folder) / name for name in ("start", "generation", "publish", "runs")}
        for home in homes.values():
            home.mkdir()
            if not quick:
                figures.with_model(settings, home)
        _tell(found, figures.help_above_python())
        _tell(found, await figures.first_model_call(homes["start"], model))
        for candidates in (1, 3):
            _tell(found, await overheads.generation(homes["generation"], candidates))
        _tell(found, await overheads.publish_to_queryable(homes["publish"]))
        grown: list[float] = []
        calls: list[int] = []
        for seed in range(0, seeds * SEEDS_APART, SEEDS_APART):
            summary, ran, mb = figures.whole_run(homes["runs"], f"seed{seed}", model, seed)
            grown.append(mb)
            calls.append(summary["cost"]["model_calls"])
            if not quick:
                _tell(found, *figures.sealed(seed, summary, ran))
        _tell(found, figures.disk(model, grown, calls))
    return _told(found, load, as_json)


async def gateway(settings: Settings, sia_agent: Path | None, as_json: bool) -> str:
    """Every figure of the gateway, on a provider of its own that answers at once; the disk is that of SIA_HOME.

    `sia_agent` is an interpreter that has the package of that name, if a generation of it shall be measured too.
    """
    from sia_events import beside_sia_agent, gateway_figures

    if sia_agent:
        beside_sia_agent.version_of(sia_agent)
    settings.home.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    found: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=settings.home) as folder:
        async with gateway_figures.bench(Path(folder) / "calls") as servers:
            _tell(found, *await gateway_figures.calls(servers))
            _tell(found, await gateway_figures.rate(servers))
            _tell(found, await gateway_figures.race(servers))
        (Path(folder) / "builtin").mkdir()
        _tell(found, await overheads.generation(Path(folder) / "builtin", candidates=1))
        _tell(found, *await gateway_figures.generation(Path(folder), sia_agent))
    return _told(found, load, as_json)


async def log(settings: Settings, parts: Collection[str], scale: float, as_json: bool) -> str:
    """Figures of the event log; the disk is that of SIA_HOME."""
    from sia_events import log_figures

    settings.home.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    found: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=settings.home) as folder:
        async for figure in log_figures.measured(settings, Path(folder), parts, scale):
            _tell(found, figure)
    return _told(found, load, as_json)


def learn(settings: Settings, size: tuple[int, int, int], as_json: bool) -> str:
    """Figures of learning on the embedded model; `size` is of the batch: prompts, samples of each, tokens of these."""
    from sia_events import learning_figures

    settings.home.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    return _told(learning_figures.learning(settings.home, *size), load, as_json)


def _told(found: Sequence[Figure], load: float, as_json: bool) -> str:
    machine = {"cores": os.cpu_count(), "load before": round(load, 1), "load after": round(os.getloadavg()[0], 1)}
    return (
        json.dumps({"machine": machine, "figures": [asdict(f) for f in found]}) if as_json else render(machine, found)
    )


def render(machine: Mapping[str, Any], found: Sequence[Figure]) -> str:
    """The figures as a table for people."""
    rows = [("figure", "measured", "goal", "", "beside")]
    for figure in found:
        verdict = {True: "reached", False: "MISSED", None: ""}[figure.reached]
        rows.append(
            (figure.name, f"{_short(figure.value)} {figure.unit}".strip(), figure.goal, verdict, _listed(figure.beside))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", _listed(machine)])


def _tell(found: list[Figure], *fresh: Figure) -> None:
    """Keep a figure, and say it at once: the whole takes a while."""
    for figure in fresh:
        found.append(figure)
        print(f"{figure.name}: {_short(figure.value)} {figure.unit}".rstrip(), file=sys.stderr)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
