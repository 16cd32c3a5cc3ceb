"""Where a figure was taken."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """Machine and software behind a measurement; figures of different environments are not compared."""

    cpu: str
    cores: int
    system: str
    python: str
    torch: str


def environment() -> Environment:
    """This machine, now. `cores` counts those this process may use."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return Environment(
        cpu=models[0].partition(":")[2].strip() if models else platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=version("torch"),
    )
