"""Figures of the command `sia` as a user meets it: each from fresh processes, beside what it is compared with."""

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil

from sia_events import app
from sia_events.errors import NodeHeld
from sia_events.home import own_nats_url
from sia_events.local_model.weights import MODEL, prepare
from sia_events.shared.calls import ModelCall, decode_call
from sia_events.shared.events import RunSettings
from sia_events.shared.ports import BusUnreachable
from sia_events.shared.settings import Settings

REAL, INSTANT = RunSettings().target_model, "instant/first"
PAIRS, STARTS = 15, 3
SAMPLE_S = 0.25
GLANCE_S = 0.02
GIVE_UP_S = 300.0
TALK = "talk"


@dataclass(frozen=True)
class Figure:
    """One figure: `reached` says whether it meets `goal`, if it has one; `beside` is what it is compared with."""

    name: str
    value: float
    unit: str
    goal: str = ""
    reached: bool | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ran:
    """A finished `sia`: its stdout, seconds by the clock and on the CPU, peak memory of its process tree in MiB."""

    stdout: str
    wall_s: float
    cpu_s: float
    peak_mb: float


def help_above_python() -> Figure:
    """`sia --help` against the bare interpreter, each pair run back to back so that both meet the same load."""
    words = ([sys.executable, "-c", ""], [sys.executable, "-m", "sia_events", "--help"])
    pairs = [[_timed(argv) for argv in words] for _ in range(PAIRS)]
    above = statistics.median(shown - bare for bare, shown in pairs)
    bare = statistics.median(bare for bare, _ in pairs)
    return Figure(
        "sia --help above bare python", above, "s", "<= 0.15", above <= 0.15, {"python -c ''": bare, "pairs": PAIRS}
    )


async def first_model_call(home: Path, model: str, starts: int = STARTS) -> Figure:
    """From starting `sia run words` in a used home until the gateway has its first call; then it is interrupted."""
    await _first_call(home, "cold", model)
    found = [await _first_call(home, f"warm{number}", model) for number in range(starts)]
    made, answered = (statistics.median(column) for column in zip(*found, strict=True))
    imports = statistics.median(_timed([sys.executable, "-c", "import sia_events.driver"]) for _ in range(starts))
    beside = {"first reply": answered, "imports alone": imports, "starts": starts, "model": model}
    return Figure("sia run to its first model call", made, "s", "<= 3", made <= 3, beside)


def whole_run(home: Path, name: str, model: str, seed: int, *more: str) -> tuple[Mapping[str, Any], Ran, float]:
    """A run of `words` to its end: its summary, what it took, and by how many MB it made streams and log grow."""
    before = _kept_mb(home)
    words = ["run", "words", "--run", name, "--seed", str(seed), "--target-model", model, "--json", *more]
    ran = _sia(home, words)
    return json.loads(ran.stdout.splitlines()[-1]), ran, _kept_mb(home) - before


def sealed(seed: int, summary: Mapping[str, Any], ran: Ran) -> list[Figure]:
    """What one whole run on the real model came to."""
    test, took = summary["sealed"], {"CPU": ran.cpu_s}
    first, final, p_value = test["first"], test["final"], test["p_value"]
    accepted = [v["lever"] for v in summary["generations"] if v["accepted"] and v["lever"] in ("harness", "weights")]
    beside = {
        "first": first["value"],
        "interval": f"[{final['low']:.3f}, {final['high']:.3f}]",
        "n": final["n"],
        "p": p_value,
        "accepted": ", ".join(accepted) or "none",
        "model calls": summary["cost"]["model_calls"],
    }
    good = final["value"] >= 0.8 and p_value < 0.001 and final["n"] >= 400
    return [
        Figure(f"sealed test, seed {seed}", final["value"], "", ">= 0.80, p < 0.001", good, beside),
        Figure(f"whole run, seed {seed}", ran.wall_s, "s", "< 600", ran.wall_s < 600, took),
        Figure(f"peak memory, seed {seed}", ran.peak_mb, "MiB", "< 6144", ran.peak_mb < 6144, {}),
    ]


def disk(model: str, grown: Sequence[float], calls: Sequence[int]) -> Figure:
    """Disk a run beyond adapters and blobs: the mean, since what one run leaves to be merged is merged in the next."""
    value = statistics.fmean(grown)
    beside = {"by run": ", ".join(f"{mb:.1f}" for mb in grown), "model calls": statistics.median(calls), "model": model}
    return Figure("streams and log, a run", value, "MB", "<= 5", value <= 5, beside)


def with_model(settings: Settings, home: Path) -> None:
    """Let `home` use the converted model of these settings; converts it there once. Raises ModelNotReady."""
    folder = prepare(settings.home).path
    (home / "models").mkdir(parents=True)
    (home / "models" / MODEL).symlink_to(folder, target_is_directory=True)


async def _first_call(home: Path, name: str, model: str) -> tuple[float, float]:
    """Seconds from the start of a run to its first model call, and to that call's reply."""
    began = time.time()
    with _started(home, ["run", "words", "--run", name, "--target-model", model]) as process:
        async with asyncio.timeout(GIVE_UP_S):
            calls = await _watch(home, name, process)
        process.send_signal(signal.SIGINT)
    made = [(datetime.fromisoformat(call.time).timestamp() - began, call.seconds) for call in calls]
    return min(at for at, _ in made), min(at + took for at, took in made)


async def _watch(home: Path, name: str, process: psutil.Popen) -> list[ModelCall]:
    """The model calls that a run begins with, looked for on its own bus."""
    while process.poll() is None:
        with suppress(NodeHeld, BusUnreachable):
            settings = Settings(home=home)
            async with app.stores(settings.model_copy(update={"nats_url": own_nats_url(settings)})) as node:
                while process.poll() is None:
                    if found := await node.bus.traces(name, "model_call", "g0a.dev"):
                        return [decode_call(line) for envelope in found for line in envelope.lines]
                    await asyncio.sleep(GLANCE_S)
        await asyncio.sleep(GLANCE_S)
    raise _broke(home, "sia run, before it called a model,", process.returncode)


def _sia(home: Path, words: Sequence[str]) -> Ran:
    began, peak, over = time.perf_counter(), [0.0], Event()
    with _started(home, words, stdout=subprocess.PIPE) as process:
        watch = Thread(target=_watch_memory, args=(process, peak, over))
        watch.start()
        try:
            assert process.stdout
            stdout = process.stdout.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            over.set()
            watch.join()
    if status:
        raise _broke(home, f"sia {' '.join(words)}", os.waitstatus_to_exitcode(status))
    return Ran(stdout, time.perf_counter() - began, usage.ru_utime + usage.ru_stime, peak[0])


@contextmanager
def _started(home: Path, words: Sequence[str], stdout: int = subprocess.DEVNULL) -> Iterator[psutil.Popen]:
    environ = {**os.environ, "SIA_HOME": str(home)}
    for outside in ("SIA_NATS_URL", "SIA_LOG_DSN", "SIA_BLOBS_URL"):
        environ.pop(outside, None)
    with (home / TALK).open("ab") as talk:
        process = psutil.Popen([sys.executable, "-m", "sia_events", *words], stdout=stdout, stderr=talk, env=environ)
        try:
            yield process
        except BaseException:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGINT)
            raise
        finally:
            process.wait()


def _broke(home: Path, what: str, status: int) -> RuntimeError:
    """A measured `sia` that failed, with its last words: there is no figure then."""
    return RuntimeError(f"{what} ended with status {status}: {(home / TALK).read_text(errors='replace')[-2000:]}")


def _watch_memory(process: psutil.Popen, peak: list[float], over: Event) -> None:
    """Keep the largest sum of proportional set sizes: a page that processes share is counted once."""
    while not over.wait(SAMPLE_S):
        total = 0
        with suppress(psutil.Error):
            for each in (process, *process.children(recursive=True)):
                with suppress(psutil.Error):
                    total += each.memory_full_info().pss
        peak[0] = max(peak[0], total / 2**20)


def _kept_mb(home: Path) -> float:
    """Disk under streams and log, as allocated."""
    files = [file for part in ("nats", "log") for file in (home / part).rglob("*")]
    size = 0
    for file in files:
        with suppress(FileNotFoundError):
            size += file.lstat().st_blocks * 512
    return size / 1e6


def _timed(argv: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began
