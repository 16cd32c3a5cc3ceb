"""The log's benchmark measures what it says: small versions of its parts on real engines; none is held to its goal."""

from itertools import islice
from pathlib import Path

import pytest

from sia_events import app, replay_figures, store_figures, stream_figures
from sia_events.instant_run import instant_run, long_run
from sia_events.shared.events import RunFinished
from sia_events.shared.record import broken_link, parse_record
from sia_events.shared.replay import replay
from sia_events.stream_figures import NEWS


def test_an_instant_run_comes_to_its_end_and_is_what_the_services_decide():
    records = instant_run("one", generations=3)
    found = replay([parse_record(record.wire) for record in records], tuple(app.SERVICES.values()))
    assert isinstance(records[-1].event, RunFinished) and len(records) > 3 * 10
    assert not found.divergences and found.decisions > 0 and not found.pending


def test_a_long_run_is_a_whole_chain():
    records = list(islice(long_run("long", 50, NEWS), 60))
    assert [record.position for record in records] == list(range(1, 51)) and broken_link(records) is None


async def test_appends_are_timed_beside_raw_batches_of_the_same_bodies(tmp_path: Path):
    alone, several = await stream_figures.durable_append(tmp_path, batches=2)
    for figure in (alone, several):
        assert figure.beside["ratio"] == pytest.approx(figure.value / figure.beside["raw nats-py"])
    assert (alone.beside["batches"], several.beside["batches"]) == (2, 16)


@pytest.mark.slow
async def test_trace_events_are_counted_as_accepted_and_all_of_them_come_into_the_tables(tmp_path: Path):
    taken = await stream_figures.accepted(tmp_path / "accepted", seconds=0.05)
    assert taken.value > 0 and taken.beside["raw nats-py"] > 0
    copied, memory = await stream_figures.sustained(tmp_path / "sustained", seconds=0.05)
    assert copied.value > 0 and copied.beside["lost"] == 0 and copied.beside["raw chDB inserts"] > 0
    assert memory.beside["last quarter MB"] > 100, "the log's owner is one of the processes"


async def test_all_events_that_were_appended_are_found_again_without_a_difference(tmp_path: Path):
    figure = await store_figures.reconciled(tmp_path, events=300)
    assert (figure.value, figure.reached, figure.beside["differences"]) == (300, True, 0)
    assert figure.beside["raw nats-py appends s"] > 0 and figure.beside["raw chDB reads s"] > 0


@pytest.mark.slow
async def test_services_that_were_killed_start_again_with_all_events(tmp_path: Path):
    await store_figures.reconciled(tmp_path, events=300)
    figure = await store_figures.restart(tmp_path, starts=1, names=("evaluator", "recorder"))
    assert figure.beside["raw engines"] > 0 and figure.value > 0 and figure.beside["events"] == 300 + 1 + 2, (
        "the news that opened the log, and one a start"
    )


@pytest.mark.slow
async def test_a_run_is_read_out_of_many_on_one_merged_part(tmp_path: Path):
    rows, records = await store_figures.run_by_position(tmp_path, rows=4 * store_figures.RUN)
    assert (rows.beside["rows"], rows.beside["parts"]) == (4 * store_figures.RUN, 1)
    assert rows.beside["raw chDB"] > 0 and 0 < rows.value < records.value


async def test_records_are_decided_again_and_folded():
    decided, folded = await replay_figures.replayed(records=1)
    assert decided.value > 0 and 0 < decided.beside["one core, a CPU s"] < folded.value
    assert folded.beside["ratio"] == pytest.approx(folded.value / folded.beside["eventsourcing rebuilds"])


async def test_a_branch_stores_its_own_record_and_nothing_of_its_parent(tmp_path: Path):
    *figures, ratio = await replay_figures.branched(tmp_path, depths=(2, 2_000))
    assert [figure.name for figure in figures] == ["a branch at 2", "a branch at 2000"]
    assert ratio.name == "a branch at 2000, beside one at 2" and ratio.value > 0
    for figure in figures:
        assert figure.beside["raw nats-py append"] > 0
        assert 0 < figure.beside["stored bytes"] < figure.beside["its record"] + replay_figures.HEAD
