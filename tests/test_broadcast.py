"""A past run published again: on a real server, to whoever listens, and never under the events' own subjects."""

import asyncio
import signal
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import nats
import pytest
from command import SMALL, log, sia, start, told, tree
from given import recorded
from nats.aio.msg import Msg
from story import proposed, registered, started

from sia_events.broadcasting import schedule, speed_of, subject_of
from sia_events.errors import Unusable
from sia_events.infra.nats_server import running
from sia_events.shared.record import to_wire

pytestmark = pytest.mark.usefixtures("children")


@pytest.fixture(scope="module")
def home(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    assert sia(home, "run", task, *SMALL).returncode == 0
    return home


async def test_whoever_listens_has_the_recorded_bytes_in_order_and_the_streams_have_nothing(home: Path, tmp_path: Path):
    records = log(home)
    heard = list[Msg]()
    async with running(tmp_path / "nats") as url:
        client = await nats.connect(url)

        async def hear(message: Msg) -> None:
            heard.append(message)

        await client.subscribe("sia.replay.r1.>", cb=hear)
        await client.flush()
        words = ("replay", "r1", "--publish", "--speed", "max")
        done = await asyncio.to_thread(sia, home, *words, SIA_NATS_URL=url)
        assert done.returncode == 0 and done.stdout == "28 records of r1 published to sia.replay.r1.*\n", done.stderr
        await client.flush()
        assert (secret := urlsplit(url).username) and secret not in done.stderr, done.stderr
        assert "of r1 to sia.replay.r1.* at 127.0.0.1:" in done.stderr
        async with asyncio.timeout(20):
            while len(heard) < len(records):
                await client.flush()
        assert (await client.jetstream().stream_info("SIA")).state.messages == 0
        await client.close()
    assert [message.data for message in heard] == [to_wire(record) for record in records]
    assert [message.subject for message in heard] == [f"sia.replay.r1.{record.type}" for record in records]


async def test_a_slow_replay_is_interrupted_at_once_and_has_written_nothing(home: Path, tmp_path: Path):
    before = tree(home / "log")
    async with running(tmp_path / "nats") as url:
        client = await nats.connect(url)
        listening = await client.subscribe("mine.r1.*")
        await client.flush()
        words = ("replay", "r1", "--publish", "--speed", "0.0001x", "--subject", "mine.RUN.TYPE")
        process = start(home, *words, SIA_NATS_URL=url)
        first = await listening.next_msg(timeout=60)
        assert first.subject == "mine.r1.TaskRegistered"
        process.send_signal(signal.SIGINT)
        _, talk = await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == 130 and "Traceback" not in talk, talk
        await client.close()
    assert tree(home / "log").keys() == before.keys()


def test_without_a_server_it_starts_one_and_says_where(home: Path):
    done = sia(home, "replay", "r1", "--publish", "--speed", "max", "--json")
    assert done.returncode == 0 and '"records": 28' in done.stdout
    assert "28 records of r1 to sia.replay.r1.* at nats://" in done.stderr


def test_records_wait_as_long_as_they_did_less_by_the_speed_and_a_fork_is_no_wait():
    came = zip(recorded(registered(), started(), proposed()), (0, 20, 15), strict=True)
    later = [replace(record, time=record.time + timedelta(seconds=seconds)) for record, seconds in came]
    assert [wait for wait, _ in schedule(later, 10.0)] == [0, 2.0, 0]
    assert [wait for wait, _ in schedule(later, None)] == [0, 0, 0]
    branch = replace(later[0], run="b1", position=2, time=later[0].time + timedelta(days=3))
    assert [wait for wait, _ in schedule([later[0], branch], 1.0)] == [0, 0]


@pytest.mark.parametrize(
    "pattern", ["sia.events.RUN.TYPE", "sia.trace.RUN.log.x", "$JS.API", "_INBOX.x", "a.*", "a.>", "a b", "", "a..b"]
)
def test_a_subject_that_streams_or_the_server_keep_is_refused(pattern: str):
    with pytest.raises(Unusable, match="--subject"):
        subject_of(pattern, "r1", "RunStarted")


@pytest.mark.parametrize("speed", ["0x", "-1x", "fast", "", "infx"])
def test_a_speed_that_is_none_is_refused(home: Path, speed: str):
    with pytest.raises(Unusable, match="factor"):
        speed_of(speed)
    assert [speed_of(text) for text in ("10x", "0.5x", "2", "max")] == [10.0, 0.5, 2.0, None]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("r1", "--speed", "max"), ("--speed", "--publish")),
        (("r1", "--speed", "1x"), ("--speed", "--publish")),
        (("r1", "--subject", "mine.RUN.TYPE"), ("--subject", "--publish")),
        (("--all", "--subject", "mine.RUN.TYPE"), ("--subject", "--publish")),
        (("r1", "--publish", "--keep-going"), ("--keep-going", "--publish")),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_with_what_it_goes_with(
    home: Path, words: tuple[str, ...], named: tuple[str, ...]
):
    status, said, talk = told(home, "replay", *words)
    assert (status, said) == (2, "") and all(each in talk for each in named), talk


def test_publishing_all_runs_or_a_stretch_is_refused(home: Path):
    for words in (("--all",), ("r1", "--from", "3")):
        assert told(home, "replay", *words, "--publish")[0] == 2


async def test_a_server_that_does_not_let_us_in_is_named_without_what_we_said(home: Path, tmp_path: Path):
    async with running(tmp_path / "nats") as url:
        wrong = f"nats://me:hunter2@{url.rpartition('@')[2]}"
        done = await asyncio.to_thread(sia, home, "status", SIA_NATS_URL=wrong)
    assert done.returncode == 2 and "does not let us in" in done.stderr, done.stderr
    assert "hunter2" not in done.stderr and "Traceback" not in done.stderr and "SIA_NATS_URL" in done.stderr
