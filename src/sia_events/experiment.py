"""`sia experiment levers`: policies of the lever side by side, each seed of each an ordinary run; then the report."""

import asyncio
import csv
import json
import os
import platform
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import psutil

from sia_events import driver, reading
from sia_events.cost import CALLS, Calls
from sia_events.errors import Unusable
from sia_events.estimate import Estimate, before_each
from sia_events.experiment_ends import branch_to_test, end
from sia_events.experiment_figures import Outcome, outcome
from sia_events.experiment_report import NO_BUDGET, curves, report, scores_csv, shown
from sia_events.run_settings import differences
from sia_events.shared.events import SEEDS_APART, LeverPolicy, RunSettings
from sia_events.shared.ports import Log
from sia_events.shared.record import Record
from sia_events.shared.run import fold
from sia_events.shared.settings import Settings
from sia_events.shared.task import Task, find_task
from sia_events.starting import suited
from sia_events.views.costs import dollars, estimate_text

VERSIONS = ("torch", "numpy", "scipy", "tokenizers", "safetensors", "transformers", "peft", "trl")


@dataclass(frozen=True)
class Planned:
    """One run of the experiment, by the name it has among all runs."""

    name: str
    settings: RunSettings


async def levers(
    settings: Settings,
    task: str,
    policies: Sequence[LeverPolicy],
    seeds: int,
    wanted: RunSettings,
    prefix: str | None,
    out: Path | None,
    as_json: bool,
) -> dict[str, Any]:
    """Have every run there is to be, one after another, and write the report; returns where and what it shows.

    How many there are and what they cost about is told before the first. A run that is over is not had again, one that
    was cut short goes on: the same command goes on with an experiment. One that is out of budget is over, and what it
    has is tested beyond the budget. Raises Unusable where a run of a planned name was asked for otherwise, or one of
    them could not be had: then none is.
    """
    chosen = find_task(task)
    named = prefix or re.sub(r"[^A-Za-z0-9_-]", "-", f"levers-{chosen.name}")[:40]
    plan = planned(named, policies, seeds, wanted)
    for each in plan:
        if suited(chosen, each.settings)[0] != each.settings:
            raise Unusable(f"{chosen.path}: here this task has one lever: nothing to compare")
    foreseen = await before_each(settings, task, {each.name: each.settings for each in plan})
    over = await _over(settings, plan)
    print(*announced(named, plan, over, foreseen), sep="\n", file=sys.stderr, flush=True)
    for number, each in enumerate(plan, start=1):
        already = " is over already" if each.name in over else ""
        print(f"{each.name}: run {number} of {len(plan)}{already}", file=sys.stderr, flush=True)
        if not already:
            await _have(settings, task, each, as_json)
    outcomes = [await _came_to(settings, each.name) for each in plan]
    folder = out or Path(named)
    heading = described(chosen, plan, outcomes, settings.model_threads)
    picture = write(folder, outcomes, policies, heading)
    return {
        "folder": str(folder.absolute()),
        "shows": shown(outcomes, policies),
        "picture": picture,
        "left_out": [each.run for each in outcomes if not each.tested],
    }


def planned(prefix: str, policies: Sequence[LeverPolicy], seeds: int, wanted: RunSettings) -> list[Planned]:
    """Every policy with a seed before the next seed: what is there after an hour is a whole comparison."""
    drawn = [wanted.seed + SEEDS_APART * k for k in range(seeds)]
    return [
        Planned(f"{prefix}-{policy}-{k:02d}", wanted.model_copy(update={"lever": policy, "seed": seed}))
        for k, seed in enumerate(drawn)
        for policy in policies
    ]


def announced(
    named: str, plan: Sequence[Planned], over: Collection[str], foreseen: Mapping[str | None, Estimate]
) -> list[str]:
    """How many runs there will be, and what those that are not there yet cost about: together, and one of a policy."""
    head = f"{named}: {len(plan)} runs, {len(over)} of them over already"
    fresh = {each.name: foreseen[each.name] for each in plan if each.name in foreseen and each.name not in over}
    if not any(each.lines for each in fresh.values()):
        return [f"{head}. {estimate_text(Estimate((), ''))}"]
    costs = [each.usd for each in fresh.values()]
    known = f"about {dollars(sum(cost or 0.0 for cost in costs))} USD{' and what is unknown' if None in costs else ''}"
    of_policy = {each.settings.lever: fresh[each.name] for each in plan if each.name in fresh}
    return [
        f"{head}. Those not begun, {len(fresh)}, cost {known}:",
        *(f"  a run of {policy}: {estimate_text(each)}" for policy, each in of_policy.items()),
    ]


async def _over(settings: Settings, plan: Sequence[Planned]) -> set[str]:
    """Names of the planned runs that are over. Raises Unusable where one was asked for otherwise than planned."""
    over: set[str] = set()
    there = {row["run"] for row in await reading.all_runs(settings)}
    for each in plan:
        if each.name in there:
            history = await reading.records(settings, each.name)
            run = fold(history)
            if other := differences(run.settings, each.settings):
                had = " ".join(f"--set {name}={_stated(run.settings, name)}" for name in other)
                raise Unusable(
                    f"run {each.name} exists with another {', '.join(other)}; give the experiment another --run NAME, "
                    f"or go on with it as it was begun: {had}"
                )
            if run.finished or await _is_tested(settings, history, there):
                over.add(each.name)
    return over


def _stated(settings: RunSettings, name: str) -> str:
    """A setting's value as --set takes it."""
    value = settings.model_dump(mode="json")[name]
    return value if isinstance(value, str) else json.dumps(value)


async def _is_tested(settings: Settings, history: Sequence[Record], there: Collection[str]) -> bool:
    """Whether a run that is out of budget has its branch to the sealed test, and that is over."""
    found = branch_to_test(history)
    if found is None or found[0] not in there:
        return False
    return fold(await reading.records(settings, found[0])).finished is not None


async def _have(settings: Settings, task: str, wanted: Planned, as_json: bool) -> None:
    """Follow the run to its end. What it says on stdout goes to stderr: there is one report on stdout."""
    try:
        with redirect_stdout(StringIO() if as_json else sys.stderr):
            await driver.run(settings, task, wanted.name, wanted.settings, resume=False, as_json=as_json)
            await end(settings, wanted.name, as_json)
    except asyncio.CancelledError:
        print("the same command goes on with the experiment", file=sys.stderr)
        raise


async def _came_to(settings: Settings, run: str) -> Outcome:
    """What the run came to, with the branch on which it was tested where it was out of budget."""

    async def ask(log: Log) -> Outcome:
        calls = [Calls(*row.values()) for row in await log.query(CALLS, {"runs": [run]})]
        history = await reading.lineage(log, run)
        found = branch_to_test(history)
        branch = await reading.lineage(log, found[0]) if found and found[0] in await log.runs() else ()
        return outcome(history, calls, branch)

    return await reading.look(settings, ask)


def described(task: Task, plan: Sequence[Planned], outcomes: Sequence[Outcome], model_threads: int) -> dict[str, str]:
    """What the experiment was had on: task, settings that are not as usual, budget, seeds, versions and hardware."""
    asked, usual = plan[0].settings.model_dump(), RunSettings().model_dump()
    limits = asked.pop("budget")
    threads = "1 thread" if model_threads == 1 else f"{model_threads} threads"
    own = {name: value for name, value in asked.items() if name not in ("lever", "seed") and value != usual[name]}
    return {
        "task": task.name,
        "generations": str(plan[0].settings.generations),
        "model": plan[0].settings.target_model,
        "seeds": ", ".join(map(str, dict.fromkeys(each.settings.seed for each in plan))),
        "settings": json.dumps(own) if own else "as usual",
        "budget": ", ".join(f"{most:g} {limit}" for limit, most in limits.items() if most is not None) or NO_BUDGET,
        "code": ", ".join(sorted({each.code for each in outcomes})),
        "versions": ", ".join([f"Python {platform.python_version()}", *filter(None, map(_version, VERSIONS))]),
        "hardware": (
            f"{_processor()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB; "
            f"{threads} for the embedded model"
        ),
        "system": platform.platform(),
    }


def write(folder: Path, outcomes: Sequence[Outcome], policies: Sequence[str], heading: Mapping[str, str]) -> bool:
    """Write report.md, scores.csv, curves.json and, where matplotlib is there, curves.png; whether it was."""
    folder.mkdir(parents=True, exist_ok=True)
    data = curves(outcomes, policies, heading)
    picture = find_spec("matplotlib") is not None
    if picture:
        draw(data["mean_gate_score"], outcomes, folder / "curves.png")
    (folder / "curves.json").write_text(_in_lines(data))
    rows = scores_csv(outcomes)
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    (folder / "report.md").write_text(report(outcomes, policies, heading, picture))
    return picture


def _in_lines(data: Mapping[str, Any]) -> str:
    """As JSON, of which each run is a line: its items would fill a thousand."""
    head = json.dumps({name: value for name, value in data.items() if name != "runs"}, indent=1)
    runs = ",\n  ".join(map(json.dumps, data["runs"]))
    return f'{head.removesuffix("}").rstrip()},\n "runs": [\n  {runs}\n ]\n}}\n'


def draw(mean: Mapping[str, Sequence[float]], outcomes: Sequence[Outcome], file: Path) -> None:
    """The gate score by generation: a policy's mean as a line, its runs as faint ones."""
    from matplotlib.figure import Figure  # an extra, and slow to import
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for place, (policy, values) in enumerate(mean.items()):
        for each in outcomes:
            if each.policy == policy:
                axes.plot(range(len(each.curve)), each.curve, color=f"C{place}", alpha=0.2, linewidth=1)
        axes.plot(range(len(values)), values, color=f"C{place}", marker="o", label=policy)
    axes.set_xlabel("generation")
    axes.set_ylabel("gate score of the incumbent")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


def _version(package: str) -> str:
    try:
        return f"{package} {installed(package)}"
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
