"""Figures of learning: a step and rollouts of ours, beside TRL's and transformers' where they are installed."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sia_events.figures import Figure
from sia_events.local_model.weights import prepare
from sia_events.shared.environment import plain

TIMES_FASTER = 2.0
SINGLY = "transformers.generate, one by one"
COSTS = (("", "CPU s", "cpu_seconds"), (", peak memory", "MB", "peak_mb"), (", its own memory", "MB", "step_mb"))


def learning(home: Path, prompts: int, samples: int, tokens: int) -> list[Figure]:
    """What a step of GRPO on one batch of the embedded model costs, and rollouts a CPU second.

    Each is measured in a process of its own with one thread. What is not installed is not measured.
    """
    with tempfile.TemporaryDirectory(prefix="bench-", dir=home) as scratch:
        folder = Path(scratch)
        (folder / "model").symlink_to(prepare(home).path)
        drawn = {"ours": _measure("sample", folder, prompts, samples, tokens)}
        steps = {"ours": _measure("own", folder)}
        if _there("transformers", "peft"):
            steps["transformers"] = _measure("transformers", folder)
        if _there("trl", "datasets"):
            steps |= {"trl": _measure("trl", folder), "trl recomputing": _measure("trl_recompute", folder)}
        if _there("transformers"):
            drawn[SINGLY] = _measure("one_by_one", folder)
    return [*of_a_step(steps, f"{prompts} x {samples} x {tokens}"), of_rollouts(drawn)]


def of_a_step(steps: Mapping[str, Mapping[str, Any]], size: str) -> list[Figure]:
    """Seconds and memory of a step of ours beside the others', on a batch of prompts x samples x tokens.

    Reached is what is at most the least of TRL's; nothing is where TRL was not measured.
    """
    own, others = steps["ours"], {name: told for name, told in steps.items() if name != "ours"}
    figures = []
    for part, unit, key in COSTS:
        if own[key] is None:
            continue
        theirs = min((told[key] for name, told in others.items() if name.startswith("trl")), default=None)
        reached = None if theirs is None else own[key] <= theirs
        beside = {name: round(told[key], 2) for name, told in others.items()}
        name = f"a step of GRPO{part}" if part else f"a step of GRPO, {size}"
        figures.append(Figure(name, round(own[key], 2), unit, "at most TRL's", reached, beside))
    return figures


def of_rollouts(drawn: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Rollouts a CPU second, beside those of who draws them one by one."""
    rates = {name: told["rollouts"] / told["cpu_seconds"] for name, told in drawn.items()}
    ours = rates.pop("ours")
    reached = ours >= TIMES_FASTER * rates[SINGLY] if rates else None
    beside = {name: round(rate, 3) for name, rate in rates.items()}
    return Figure("rollouts", round(ours, 3), "a CPU s", f">= {TIMES_FASTER:g} x", reached, beside)


def _there(*packages: str) -> bool:
    return all(find_spec(name) for name in packages)


def _measure(what: str, folder: Path, *sizes: int) -> dict[str, Any]:
    env = {**plain(), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "sia_events.learning_bench", what, str(folder), *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"measuring {what} failed: {done.stderr.strip()[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])
