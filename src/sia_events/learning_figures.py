"""Figures of learning: a step and rollouts of ours, beside TRL's and transformers' where they are installed."""

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sia_events.figures import Figure
from sia_events.local_model.weights import prepare
from sia_events.shared.environment import plain

TIMES_FASTER = 2.0


def learning(home: Path) -> list[Figure]:
    """CPU seconds and peak memory of a step of GRPO on one batch of the embedded model; rollouts a CPU second.

    Each is measured in a process of its own with one thread. What is not installed is not measured.
    """
    with tempfile.TemporaryDirectory(prefix="bench-", dir=home) as scratch:
        folder = Path(scratch)
        (folder / "model").symlink_to(prepare(home).path)
        batched = _measure("sample", folder)
        own = _measure("own", folder)
        others = {"transformers": _measure("transformers", folder)} if _there("transformers", "peft") else {}
        if _there("trl", "datasets"):
            others |= {"trl": _measure("trl", folder), "trl recomputing": _measure("trl_recompute", folder)}
        singly = _measure("one_by_one", folder) if _there("transformers") else None
    figures = []
    for name, unit, key in (("a step of GRPO", "CPU s", "cpu_seconds"), ("peak memory of it", "MB", "peak_mb")):
        beside = {other: round(told[key], 2) for other, told in others.items()}
        theirs = min((told[key] for other, told in others.items() if other.startswith("trl")), default=None)
        reached = None if theirs is None else own[key] <= theirs
        figures.append(Figure(name, round(own[key], 2), unit, "at most TRL's", reached, beside))
    ours = batched["rollouts"] / batched["cpu_seconds"]
    beside, reached = {}, None
    if singly:
        each = singly["rollouts"] / singly["cpu_seconds"]
        beside, reached = {"transformers.generate, one by one": round(each, 3)}, ours >= TIMES_FASTER * each
    return [*figures, Figure("rollouts", round(ours, 3), "a CPU s", f">= {TIMES_FASTER:g} x", reached, beside)]


def _there(*packages: str) -> bool:
    return all(find_spec(name) for name in packages)


def _measure(what: str, folder: Path) -> dict[str, Any]:
    env = {**plain(), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "sia_events.learning_bench", what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"measuring {what} failed: {done.stderr.strip()[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])
