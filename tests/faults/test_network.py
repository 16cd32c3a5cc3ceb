"""The network between a home and its NATS server is cut, drops everything, or forgets connections; and comes back."""

import asyncio
import os
import random
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from bus_on import note, notes, on, opened, serving, until
from checker import Held, Told, check
from command import sia, start
from disturbed import assert_as_undisturbed, command, log
from link import link
from namespace import POSSIBLE, apart

from sia_events.infra import nats_connection
from sia_events.infra.nats import NatsBus
from sia_events.infra.nats_server import running
from sia_events.shared.ports import Envelope
from sia_events.shared.record import Record, answers


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that says nothing is given up within a second and a half, and not within fifteen."""
    monkeypatch.setattr(nats_connection, "PING_S", 0.5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("megabytes", [0, 6])
async def test_a_connection_that_the_network_forgot_is_made_anew(megabytes: int, tmp_path: Path):
    """Without a word to either end, as a firewall does that is started again; much may be on its way or nothing."""
    async with running(tmp_path / "nats") as url, link(url) as far, on(far.url) as bus:
        first, *_ = await opened(bus, "r")
        far.hush()
        lines = [os.urandom(2**19).hex().encode() for _ in range(megabytes)]
        traced = [asyncio.create_task(bus.trace(Envelope("r", "log", str(n), (line,)))) for n, line in enumerate(lines)]
        written = asyncio.create_task(bus.append("r", notes("r", first, "a")))
        await until(lambda: bus._nats.client.stats["out_msgs"] > megabytes)
        far.forget()
        async with asyncio.timeout(15):
            await asyncio.gather(written, *traced)
        assert [each.lines for each in await bus.traces("r", "log", None)] == [(line,) for line in lines]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("seed", [1, 2])
async def test_what_was_acknowledged_over_a_link_that_fails_again_and_again_is_there_once(seed: int, tmp_path: Path):
    rng = random.Random(seed)
    async with running(tmp_path / "nats") as url, link(url) as far:

        async def disturb() -> None:
            for fault in rng.choice([[far.cut], [far.hush], [far.hush, far.forget]]):
                fault()
            await asyncio.sleep(rng.choice([0.1, 0.7]))  # for so long it is away
            far.mend()

        await assert_each_there_once(rng, far.url, disturb)


@pytest.mark.skipif(not POSSIBLE, reason="a network namespace of one's own takes root, and the program ip")
@pytest.mark.usefixtures("quick")
async def test_what_was_acknowledged_between_namespaces_whose_cable_is_pulled_is_there_once(tmp_path: Path):
    rng = random.Random(1)
    async with apart(tmp_path / "nats") as cable:

        async def disturb() -> None:
            await cable.pull()
            await asyncio.sleep(rng.choice([0.1, 0.7, 2.5]))  # for so long it is away
            await cable.plug()

        await assert_each_there_once(rng, cable.url, disturb)


async def assert_each_there_once(rng: random.Random, url: str, disturb: Callable[[], Awaitable[None]]) -> None:
    """Two writers and a service go on over a network that is disturbed; what they were told is what the stream has."""
    acknowledged: list[Record] = []
    answered: list[int] = []
    async with on(url) as one, on(url) as two:
        first, *_ = await opened(one, "r")
        stop = asyncio.Event()

        async def write(bus: NatsBus, writer: str) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                drafts = notes("r", first, *"ab"[: 1 + number % 2], producer=f"{writer}{number}")
                acknowledged.extend(await bus.append("r", drafts))

        async def answer(record: Record) -> None:
            if record.producer.startswith("w"):
                acknowledged.extend(await two.append("r", answers("r", record, "service", [note("answered")])))
                answered.append(record.position)

        async with serving(two, "service", ["RunResumed"], answer, "r"):
            writers = [asyncio.create_task(write(bus, f"w{n}-")) for n, bus in enumerate((one, two))]
            for _ in range(4):
                await more(acknowledged, rng.randint(5, 20))
                await disturb()
            await more(acknowledged, 10)
            stop.set()
            await asyncio.gather(*writers)
            asked = {record.position for record in acknowledged if record.producer.startswith("w")}
            await until(lambda: asked <= {*answered}, 60)
    async with on(url) as fresh:
        wires = [record.wire for record in await fresh.history("r")]
    told = [("r", record.position, sha256(record.wire).hexdigest()) for record in acknowledged]
    assert check(Told(records=told), Held(stream={"r": wires}, tables={"r": wires})) == []
    assert {at for _, at, _ in told} == set(range(2, len(wires) + 1))


async def more(found: list[Record], count: int) -> None:
    before = len(found)
    await until(lambda: len(found) >= before + count, 60)


@pytest.fixture(scope="module")
def undisturbed(task: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    home = tmp_path_factory.mktemp("undisturbed")
    assert sia(home, *command(task)).returncode == 0
    return log(home)


@asynccontextmanager
async def under_way(task: Path, home: Path, url: str) -> AsyncIterator["subprocess.Popen[str]"]:
    """Services on the bus at `url`, and a run that they drive; both gone at the end."""
    serve = start(home, "serve", SIA_NATS_URL=url)
    try:
        assert serve.stdout and "serving" in await asyncio.to_thread(serve.stdout.readline)
        run = start(home, *command(task), SIA_NATS_URL=url)
        try:
            yield run
        finally:
            run.kill()
            run.communicate()
    finally:
        serve.terminate()
        await asyncio.to_thread(serve.communicate)


async def come_to(bus: NatsBus, position: int) -> None:
    """Wait until the run has come so far."""
    async with asyncio.timeout(60):
        while len(await bus.history("r1")) < position:  # noqa: ASYNC110 - it is other processes that write
            await asyncio.sleep(0.02)


@pytest.mark.slow  # what was being answered when its ack was lost comes again after thirty seconds
async def test_a_run_whose_services_lose_their_bus_and_regain_it_goes_on(
    task: Path, tmp_path: Path, undisturbed: list[Record]
):
    rng = random.Random(1)
    async with running(tmp_path / "nats") as url, link(url) as far, on(url) as near:
        async with under_way(task, tmp_path / "home", far.url) as run:
            for position, fault in zip(sorted(rng.sample(range(3, 30), 3)), (far.cut, far.hush, far.cut), strict=True):
                await come_to(near, position)
                fault()
                await asyncio.sleep(rng.uniform(0.2, 2.5))  # for so long it is away
                far.mend()
            _, talk = await asyncio.to_thread(run.communicate, timeout=120)
            assert run.returncode == 0, talk
        await asyncio.to_thread(assert_as_undisturbed, tmp_path / "home", undisturbed, SIA_NATS_URL=url)
