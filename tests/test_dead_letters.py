"""`sia dlq`: letters are listed and shown, offered to their service again, or dropped; nothing of them is deleted."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from bus_on import note, on, opened, serving, until
from command import answered, sia

from sia_events import app, dead_letters
from sia_events.errors import Unusable
from sia_events.event_log import recorder
from sia_events.home import hold
from sia_events.infra.memory import MemoryBlobs, MemoryBus
from sia_events.infra.nats_server import running
from sia_events.log_here import open_log
from sia_events.shared.events import Event, LetterDropped, RunResumed, RunSteered, ServiceFailed
from sia_events.shared.letters import letters
from sia_events.shared.ports import Blobs, Bus, Ports
from sia_events.shared.record import Record, answers
from sia_events.shared.service import Lineage, Service, Work, answer, gave_up
from sia_events.shared.settings import Settings


async def given_up(bus: Bus, blobs: Blobs, run: str = "r1", tries: int = 5) -> Record:
    """A letter of `tester` on the run's second record."""
    _, second, *_ = await bus.history(run) or await opened(bus, run, note("to be answered"))
    event = ServiceFailed(
        service="tester",
        failed=str(second.id),
        sequence=2,
        error="ValueError: not today",
        payload=await blobs.put(second.wire),
        tries=tries,
    )
    count = len([r for r in await bus.history(run) if isinstance(r.event, ServiceFailed)])
    (letter,) = await bus.append(run, answers(run, second, "tester", [event] * (count + 1))[count:])
    return letter


@pytest.fixture
async def home(tmp_path: Path) -> Path:
    settings = Settings(home=tmp_path)
    async with hold(settings, "test"), app.stores(settings) as node:
        await given_up(node.bus, node.blobs)
    return tmp_path


def test_letters_are_listed_and_shown_with_what_was_kept(home: Path):
    (row,) = answered(home, "dlq", "list")
    assert (row["run"], row["position"], row["service"], row["state"]) == ("r1", 3, "tester", "open")
    shown = answered(home, "dlq", "show", "r1", 3)
    assert '"type":"RunResumed"' in shown["text"] and shown["error"] == "ValueError: not today"
    assert "not today" in sia(home, "dlq", "show", "r1", 3).stdout
    page = (Path(__file__).parent.parent / "docs/sql.md").read_text()
    _, _, query = page.partition("## What did services give up on?\n\n```sql\n")
    (found,) = answered(home, "sql", query.partition("```")[0])
    assert found == {
        "payload": shown["payload"],
        **{k: row[k] for k in ("run", "position", "service", "tries", "error")},
    }
    missing = sia(home, "dlq", "show", "r1", 2)
    assert missing.returncode == 2 and "there are: 3" in missing.stderr


async def test_a_run_that_cannot_be_read_hides_no_letter_of_another(home: Path):
    settings = Settings(home=home)
    async with hold(settings, "test"), app.stores(settings) as node:
        await given_up(node.bus, node.blobs, "r0")
        async with open_log(settings) as log:
            await recorder.catch_up(node.bus, log)
            await log._remove("events", "position", "r0", [2])
    done = sia(home, "dlq", "list", "--json")
    assert done.returncode == 0 and [row["run"] for row in json.loads(done.stdout)] == ["r1"]
    assert "run r0 cannot be read" in done.stderr
    assert sia(home, "dlq", "list", "r0").returncode == 2


def test_a_dropped_letter_is_an_event_and_no_longer_open_and_the_run_replays(home: Path):
    said = answered(home, "dlq", "drop", "r1", 3, "--reason", "lost for good", "--by", "ada")
    assert (said["event"], said["position"]) == ("LetterDropped", 4)
    assert answered(home, "dlq", "list") == []
    (row,) = answered(home, "dlq", "list", "--all")
    assert row["state"] == "dropped"
    again = sia(home, "dlq", "drop", "r1", 3)
    assert again.returncode == 2 and "not open: dropped" in again.stderr


async def test_retry_has_the_services_that_are_up_answer_the_record(tmp_path: Path):
    mended, handed = asyncio.Event(), list[int]()

    async def handle(record: Record) -> None:
        handed.append(record.position)
        if not mended.is_set():
            raise ValueError("not today")

    async with running(tmp_path / "nats") as url, on(url) as bus:
        settings = Settings(home=tmp_path / "home", nats_url=url)
        await opened(bus, "r1", note("to be answered"))
        async with serving(bus, "tester", [RunResumed.__name__], handle):
            await until(lambda: len(handed) >= 5)
            while len(await bus.history("r1")) < 3:  # noqa: ASYNC110 - the letter is written a moment later
                await asyncio.sleep(0.01)
            mended.set()
            before = len(handed)
            said = await dead_letters.retry(settings, "r1", 3)
            assert said == {"run": "r1", "service": "tester", "up": True}
            await until(lambda: len(handed) > before)
        assert handed[-1] == 2
        with pytest.raises(Unusable, match="no dead letter at position 1"):
            await dead_letters.retry(settings, "r1", 1)


@asynccontextmanager
async def in_memory() -> AsyncIterator[tuple[MemoryBus, MemoryBlobs]]:
    blobs = MemoryBlobs()
    yield MemoryBus(blobs), blobs


async def test_a_letter_is_open_until_it_is_answered_or_fails_again_or_is_dropped():
    async with in_memory() as (bus, blobs):
        await given_up(bus, blobs)
        await given_up(bus, blobs)
        history = await bus.history("r1")
        assert [each.state for each in letters(history)] == ["failed again", "open"] and gave_up(history) == {"tester"}
        await bus.append("r1", answers("r1", history[1], "tester", [RunSteered(text="answered")] * 3)[2:])
        history = await bus.history("r1")
        assert [each.state for each in letters(history)] == ["failed again", "answered"] and not gave_up(history)


async def test_what_was_dropped_is_not_given_to_its_service_again():
    asked: list[Event] = []

    async def perform(work: Work, event: Event) -> list[Event]:
        asked.append(event)
        return []

    service = Service("tester", performs={RunResumed: perform})
    async with in_memory() as (bus, blobs):
        letter = await given_up(bus, blobs)
        nothing: object = None
        ports = Ports(bus=bus, blobs=blobs, sandbox=nothing, clock=nothing, door=nothing, home=Path())  # pyright: ignore[reportArgumentType]
        second = (await bus.history("r1"))[1]
        await answer(service, Lineage(), second, "r1", ports)
        assert len(asked) == 1, "a letter alone keeps nobody from trying again"
        dropped = LetterDropped(letter=str(letter.id), by="ada", reason="")
        await bus.append("r1", answers("r1", letter, "cli", [dropped]))
        await answer(service, Lineage(), second, "r1", ports)
        assert len(asked) == 1 and gave_up(await bus.history("r1")) == set()
