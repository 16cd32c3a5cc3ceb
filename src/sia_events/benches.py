"""`sia bench`: figures of this machine, each beside what it is compared with, measured in one run."""

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sia_events import app, driver, views
from sia_events.infra.instant import InstantModels
from sia_events.shared.events import RunFinished, RunSettings, RunStarted
from sia_events.shared.ports import Envelope
from sia_events.shared.record import answers, opening
from sia_events.shared.settings import Settings


def kernels(source: Path | None, repeats: int, seed: int, as_json: bool) -> str:
    """TriMul candidates against the reference; see kernel_bench/measure.py for what is guarded."""
    from sia_events.kernel_bench.measure import measure
    from sia_events.kernel_bench.problems import TRIMUL, shipped
    from sia_events.kernel_bench.report import render

    named = {source.name: source.read_text()} if source else {n: shipped(n) for n in ("reference", "channel_first", "row_blocked")}
    rows = [(name, measure(text, TRIMUL, seed=seed, repeats=repeats)) for name, text in named.items()]
    return json.dumps([{"candidate": name, **asdict(row)} for name, row in rows]) if as_json else render(rows)
