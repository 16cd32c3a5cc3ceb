"""Two processes write to one run on one server: each record stands once, and who comes second is fenced out."""

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from bus_on import kill_server, on, opened
from checker import Held, Told, check

from sia_events.infra.nats_server import running
from sia_events.shared.record import broken_link


class Rival:
    """A writer in a process of its own."""

    def __init__(self, url: str, name: str) -> None:
        here = Path(__file__)
        command = [sys.executable, here.with_name("rival.py"), url, "r", name]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env={"PYTHONPATH": str(here.parent.parent)}
        )
        self.told()

    def ask(self, line: str) -> None:
        assert self.process.stdin
        print(line, file=self.process.stdin, flush=True)

    def told(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())


@contextmanager
def rivals(url: str, *names: str) -> Iterator[list[Rival]]:
    with ExitStack() as stack:
        made = [Rival(url, name) for name in names]
        for each in made:
            stack.callback(each.process.wait)
            stack.callback(each.process.kill)
        yield made


async def test_who_stood_still_between_reading_and_writing_gets_what_the_other_wrote_meanwhile(tmp_path: Path):
    async with running(tmp_path / "nats") as url, on(url) as bus:
        await opened(bus, "r")
        with rivals(url, "one", "two") as (one, two):
            one.process.send_signal(signal.SIGSTOP)
            one.ask("answer 1 late")
            two.ask("answer 1 early")
            early = await asyncio.to_thread(two.told)
            assert early[:2] == [2, "early"]
            two.ask("note more")
            assert (await asyncio.to_thread(two.told))[:2] == [3, "more"]
            one.process.send_signal(signal.SIGCONT)
            assert await asyncio.to_thread(one.told) == early, "its answer is there already, from somebody else"
            one.ask("note mine")
            assert (await asyncio.to_thread(one.told))[:2] == [4, "mine"], (
                "what is its own goes behind what it had not read"
            )
        async with on(url) as fresh:
            history = await fresh.history("r")
    assert len(history) == 4 and broken_link(history) is None


@pytest.mark.parametrize("seed", [1, 2])
async def test_however_two_writers_and_a_dying_server_meet_every_record_stands_once(seed: int, tmp_path: Path):
    rng, told = random.Random(seed), []
    async with running(tmp_path / "nats") as url, on(url) as bus:
        (first,) = await opened(bus, "r")
        with rivals(url, "one", "two") as both:
            for number in range(12):
                # The same question to both at the same time, or something of each one's own; one may stand still.
                words = rng.choice([f"answer {1 + number // 2} x{number}", f"note x{number}"])
                late = rng.choice([None, *both])
                if late:
                    late.process.send_signal(signal.SIGSTOP)
                for each in both:
                    each.ask(words)
                if rng.random() < 0.2:
                    kill_server(tmp_path / "nats")
                told += [await asyncio.to_thread(each.told) for each in both if each is not late]
                if late:
                    late.process.send_signal(signal.SIGCONT)
                    told.append(await asyncio.to_thread(late.told))
                for each in both:
                    each.ask("read")
                    await asyncio.to_thread(each.told)
        async with on(url) as fresh:
            history = await fresh.history("r")
    wires = [record.wire for record in history]
    acknowledged = [("r", at, digest) for at, _, digest in told]
    assert check(Told(records=acknowledged), Held(stream={"r": wires}, tables={"r": wires})) == []
    assert {at for at, *_ in told} == {record.position for record in history} - {first.position}
