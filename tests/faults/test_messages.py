"""Messages that come twice, and late: whoever repeats what stands on the stream changes nothing."""

import asyncio
import random
from pathlib import Path

import nats
import pytest
from command import calls, sia
from disturbed import assert_as_undisturbed, command, going, log
from nats.aio.client import Client
from nats.aio.msg import Msg

from sia_events.infra.store_lock import owner

DELAY_S = 0.3


@pytest.fixture(scope="module")
def undisturbed(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("undisturbed")
    assert sia(home, *command(task)).returncode == 0
    return home


async def test_a_run_whose_every_record_is_sent_again_and_late_comes_to_the_same_end(
    task: Path, tmp_path: Path, undisturbed: Path
):
    """Without the ids by which the server would know them: as long after the first time as one likes."""
    process = await asyncio.to_thread(going, task, tmp_path, 1)
    server = owner(tmp_path / "nats")
    assert server and server.dsn
    client, rng, echoed = await connected(server.dsn), random.Random(1), set[asyncio.Task[None]]()

    async def again(message: Msg) -> None:
        await asyncio.sleep(rng.uniform(0, DELAY_S))  # it is late
        await client.publish(message.subject, message.data, headers={"Echo": "1"})

    async def heard(message: Msg) -> None:
        if "Echo" not in (message.headers or {}):
            echoed.add(asyncio.create_task(again(message)))

    # Of the stream: what was published and refused is no record, and sent again it would be a stranger.
    await client.jetstream().subscribe("sia.events.>", cb=heard, ordered_consumer=True)
    _, talk = await asyncio.to_thread(process.communicate, timeout=120)
    await asyncio.wait(echoed, timeout=5)
    await client.close()
    assert process.returncode == 0, talk
    assert len(echoed) > 10
    found = await asyncio.to_thread(assert_as_undisturbed, tmp_path, log(undisturbed))
    assert {(f["kind"], f["store"]) for f in found} == {("doubled", "stream")}
    paid = [await asyncio.to_thread(calls, home) for home in (tmp_path, undisturbed)]
    assert len(paid[0]) == len(paid[1]) > 0


async def connected(url: str) -> Client:
    """A client that goes with its server."""

    async def silently(_: Exception) -> None: ...

    return await nats.connect(url, allow_reconnect=False, error_cb=silently)
