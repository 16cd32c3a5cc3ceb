"""History cut into several streams: each run stands in one of them, and whoever reads or copies sees no difference."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import nats
import pytest
from bus_on import branch, note, notes, on, opened, serving, until
from command import SMALL, answered, sia

from sia_events.infra.nats_partitions import EVENTS, TRACE, Partitions
from sia_events.infra.nats_server import running
from sia_events.infra.nats_streams import StreamUnfit
from sia_events.shared.ports import Envelope
from sia_events.shared.record import Record, broken_link, opening

EIGHT = Partitions(8)
RUNS = [f"r{number}" for number in range(1, 21)]


def test_a_run_has_one_stream_in_every_process_and_many_runs_spread_over_all():
    code = "from sia_events.infra.nats_partitions import *; print(Partitions(8).of(EVENTS, 'r1'))"
    told = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert told.stdout.strip() == EIGHT.of(EVENTS, "r1") == "SIA_5", "a store that is there would not be found again"
    spread = Counter(EIGHT.of(EVENTS, f"run-{number}") for number in range(800))
    assert set(spread) == set(EIGHT.cut(EVENTS)) and min(spread.values()) > 60
    assert EIGHT.of(TRACE, "r1") == "SIA_TRACE_5"
    assert EIGHT.subject(EVENTS, "r1", "Scored") == "sia.events.r1.Scored.5"
    assert Partitions().subject(EVENTS, "r1", "Scored") == "sia.events.r1.Scored"


async def test_runs_are_spread_kept_in_order_copied_served_and_branched_over_eight_streams(tmp_path: Path):
    got: dict[str, list[str]] = {run: [] for run in RUNS}

    async def answer(record: Record) -> None:
        got[record.run].append(record.type)

    async with running(tmp_path / "nats") as url, on(url, partitions=8) as bus, on(url, partitions=8) as other:
        for run in RUNS:
            first, *_ = await opened(bus, run, note("a"))
            await bus.trace(Envelope(run, "log", "k", (run.encode(),)))
            await other.append(run, notes(run, first, "b", "c"))
        assert sorted(await other.runs()) == sorted(RUNS) == sorted(await other.streams.runs())
        async with serving(other, "svc", ["RunResumed"], answer):
            await until(lambda: all(len(each) == 3 for each in got.values()))

        copied: dict[str, list[int]] = {run: [] for run in RUNS}
        traced: list[str] = []
        async for batch in bus.feed("recorder"):
            for record in batch.records:
                assert batch.stream == bus.streams.holding("SIA", record.run)
                copied[record.run].append(record.position)
            for _, envelope in batch.envelopes:
                assert batch.stream == bus.streams.holding("SIA_TRACE", envelope.run)
                traced.append(envelope.run)
            await batch.ack()
            if not await bus.lag("recorder"):
                break
        assert all(positions == [1, 2, 3, 4] for positions in copied.values()) and sorted(traced) == sorted(RUNS)

        parent = next(run for run in RUNS if EIGHT.of(EVENTS, run) != EIGHT.of(EVENTS, "child"))
        await bus.append("child", opening("child", [branch(parent, 3)]))
        history = await other.history("child")
        assert [record.position for record in history] == [1, 2, 3, 4] and broken_link(history) is None


@pytest.mark.parametrize(("made", "asked"), [(1, 8), (8, 1), (8, 4)])
async def test_history_that_is_cut_otherwise_is_refused_and_left_as_it_is(made: int, asked: int, tmp_path: Path):
    async with running(tmp_path / "nats") as url:
        async with on(url, partitions=made) as bus:
            await opened(bus, "r", note("a"))
        client = await nats.connect(url)
        before = await client.jetstream().streams_info()
        with pytest.raises(StreamUnfit, match=f"in {made} partitions.*nothing was changed. Set SIA_PARTITIONS={made}"):
            async with on(url, partitions=asked):
                pass
        assert [each.config for each in await client.jetstream().streams_info()] == [each.config for each in before]
        await client.close()
        async with on(url, partitions=made) as bus:
            assert len(await bus.history("r")) == 2


@pytest.mark.slow  # six commands; above is the same of the bus alone
def test_a_run_goes_through_a_home_of_eight_partitions_and_what_reads_it_sees_no_difference(task: Path, tmp_path: Path):
    eight = {"SIA_PARTITIONS": "8"}
    ran = sia(tmp_path, "run", task, *SMALL, **eight)
    assert ran.returncode == 0, ran.stderr
    assert answered(tmp_path, "rebuild", **eight)
    found = answered(tmp_path, "verify", "--all", **eight)
    assert found["findings"] == [] and found["records"] > 10 and found["lines"] > 0
    file = tmp_path / "r1.sia.tar.zst"
    answered(tmp_path, "archive", "r1", file, **eight)
    there = tmp_path / "elsewhere"
    assert answered(there, "restore", file)["records"] == found["records"]
    refused = sia(tmp_path, "run", task, *SMALL)
    assert refused.returncode == 2 and "Set SIA_PARTITIONS=8" in refused.stderr
