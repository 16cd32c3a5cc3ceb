"""A small run that something happens to, and what has to be so of it afterwards whatever it was."""

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from command import SMALL, answered, log, start

from sia_events.shared.events import RunFinished
from sia_events.shared.record import Record, broken_link


def command(task: Path) -> tuple[object, ...]:
    return ("run", task, "--run", "r1", *SMALL, "--set", "rollout_items=4")


def going(
    task: Path, home: Path, changes: int, begin: "Callable[..., subprocess.Popen[str]]" = start, **more: str
) -> "subprocess.Popen[str]":
    """The run, under way, when it has told of so many changes; of fourteen in all."""
    process = begin(home, *command(task), **more)
    assert process.stderr
    told = [process.stderr.readline() for _ in range(changes)]
    assert all(told), f"it ended with {process.wait()} behind {told}"
    return process


def child_of(pid: int, word: str) -> psutil.Process:
    """The child whose command line has `word` in it."""
    return next(c for c in psutil.Process(pid).children(recursive=True) if any(word in part for part in c.cmdline()))


def facts(records: Sequence[Record]) -> list[str]:
    """What a run amounts to, without what differs from one run to the next: times, and who answered first."""
    timed = {"type", "seconds", "trajectory"}
    return sorted(f"{r.producer} {r.type} {r.event.model_dump_json(exclude=timed)}" for r in records)


def assert_as_undisturbed(home: Path, undisturbed: Sequence[Record], **more: str) -> list[dict[str, Any]]:
    """The same facts, once each, in one chain; stream, tables and blobs agree, and replay does too.

    Among the facts is how many calls are recorded of each attempt: a call that was made again would be one more.
    Returns what is to be found that misleads nobody.
    """
    records = log(home)
    assert isinstance(records[-1].event, RunFinished)
    assert [r.position for r in records] == list(range(1, len(records) + 1)) and broken_link(records) is None
    assert facts(records) == facts(undisturbed)
    found = answered(home, "verify", "--all", **more)
    assert found["left"] == [], found["left"]
    assert not answered(home, "replay", "r1", **more)["diverged"]
    return found["findings"]
