"""Chains of kills: a run is killed at a point, started again with the next one armed, and so on to its end."""

import asyncio
import json
import random
import signal
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess

import psutil
from afterwards import held
from checker import Fault, check
from command import assert_none_left, environment
from forking import Forked
from llm_author import SMALL, Author, reached
from loopback import Loopback
from witness import told

from sia_events.shared.record import Record

KILLED = -signal.SIGKILL
PROGRAM = Path(__file__).with_name("witnessed.py")
# How long it took, and what was paid: a provider here counts its payments where others count tokens.
VARYING = {"type", "seconds", "trajectory", "prompt_tokens", "written", "budget"}


@dataclass
class Chain:
    """Runs on the small task, one after the other in a home of their own, with a provider that counts what is paid.

    `firsts` has for each run how many requests had been paid before it.
    """

    task: Path
    home: Path
    provider: Loopback
    author: Author
    children: Callable[[], list[psutil.Process]]
    backend: str
    broken: str = ""
    killed: list[str] = field(default_factory=list)
    firsts: list[int] = field(default_factory=lambda: [0])

    @property
    def told(self) -> Path:
        return self.home.with_suffix(".told")

    @property
    def past(self) -> Path:
        return self.home.with_suffix(".past")

    @property
    def run(self) -> str:
        return f"r{len(self.firsts)}"

    @property
    def runs(self) -> list[str]:
        return [f"r{number}" for number, _ in enumerate(self.firsts, 1)]

    def go(self, fail_at: str = "") -> CompletedProcess[str]:
        """Start the run, or go on with it, to its end or to the point at which it is to be killed."""
        return self.sia("run", self.task, "--run", self.run, *SMALL, "--backend", self.backend, fail_at=fail_at)

    def sia(self, *words: object, fail_at: str = "") -> CompletedProcess[str]:
        """A command, to its end or to the point at which it is to be killed; behind it nothing runs any more."""
        notes = {"WITNESS_TOLD": str(self.told), "WITNESS_PASSED": str(self.past), "WITNESS_BROKEN": self.broken}
        env = environment(self.home, **reached(self.provider), **notes, SIA_FAIL_AT=fail_at)
        with Forked([*map(str, words)], env, program=str(PROGRAM)) as process:
            try:
                out, talk = process.communicate(timeout=120)
            except BaseException:
                process.kill()
                raise
        assert_none_left(self.children)
        return CompletedProcess(words, process.returncode, out, talk)

    def kill(self, points: Iterable[str]) -> None:
        """Kill at one point after the other; where a run has come past one already, there is another run."""
        for point in points:
            fresh = self.passed().count("sia run after opening") < len(self.firsts)
            while (done := self.go(point)).returncode != KILLED:
                assert done.returncode == 0, f"{point}: {done.returncode}\n{done.stderr}"
                assert not fresh, f"a whole run does not come past {point}"
                self.firsts.append(len(self.author.asked))
                fresh = True
            self.killed.append(point)

    def faults(self) -> list[Fault]:
        """What the checker finds, once nothing runs any more."""
        paid = [
            f"{bisect(self.firsts, number)} {json.dumps(body, sort_keys=True)}"
            for number, body in enumerate(self.author.asked)
        ]
        return check(told(self.told), asyncio.run(held(self.home, paid)))

    def passed(self) -> list[str]:
        """The fail points that were come past, over all starts of all runs."""
        return self.past.read_text().splitlines() if self.past.exists() else []


@contextmanager
def chain(
    task: Path, home: Path, children: Callable[[], list[psutil.Process]], backend: str = "direct", broken: str = ""
) -> Iterator[Chain]:
    author = Author()
    with Loopback(author) as provider:
        yield Chain(task, home, provider, author, children, backend, broken)


def drawn(passed: Sequence[str], seed: int, apart: int) -> Iterator[str]:
    """Points some way apart in what a run came past, round and round: each with how often to come past it first."""
    draw, at = random.Random(seed), 0
    while True:
        to = at + draw.randint(1, 2 * apart)
        if to >= len(passed):
            at = 0
            continue
        # How often the recorder looks is a matter of time: only that it comes past again is sure.
        nth = 1 if passed[to].startswith("recorder") else passed[at : to + 1].count(passed[to])
        yield f"{passed[to]} #{nth}"
        at = to + 1


def facts(records: Sequence[Record]) -> list[str]:
    """What a run amounts to, without what differs from one run to the next: times, and who answered first."""
    return sorted(f"{r.producer} {r.type} {r.event.model_dump_json(exclude=VARYING)}" for r in records)
