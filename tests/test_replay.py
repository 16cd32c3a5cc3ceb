"""Recorded runs, decided again with today's code on every change.

`sia log RUN --json > tests/runs/NAME.jsonl` adds one.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from given import altered

from sia_events.app import SERVICES
from sia_events.shared.events import AgentProposed, RunFinished, RunStarted, VersionAccepted, WeightsUpdated
from sia_events.shared.record import Record, broken_link, parse_record, to_wire
from sia_events.shared.replay import replay
from sia_events.shared.run import fold

RUNS = sorted((Path(__file__).parent / "runs").glob("*.jsonl"))


def read(path: Path) -> list[Record]:
    return [parse_record(line) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_recorded_run_is_decided_the_same_today(path: Path):
    records = read(path)
    found = replay(records, tuple(SERVICES.values()))
    assert found.divergence is None and found.pending == 0
    assert found.decisions > 10 and found.performed > 10
    assert isinstance(records[-1].event, RunFinished)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_recorded_run_reads_and_writes_byte_for_byte(path: Path):
    assert [to_wire(record) for record in read(path)] == path.read_bytes().splitlines()


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_record_altered_anywhere_is_found(path: Path):
    records = read(path)
    assert broken_link(records) is None
    for i, record in enumerate(records):
        forged = altered(record, producer="somebody else")
        assert broken_link([*records[:i], forged, *records[i + 1 :]]) is forged


def test_a_run_through_both_levers_is_among_them():
    runs = [fold(read(path)) for path in RUNS]
    levers = [
        {run.versions[v.version].lever for v in run.verdicts.values() if isinstance(v, VersionAccepted)} for run in runs
    ]
    assert any({"harness", "weights"} <= accepted for accepted in levers)
    assert any(isinstance(record.event, WeightsUpdated) for path in RUNS for record in read(path))


def test_a_record_left_out_is_found():
    records = read(RUNS[0])
    for i in range(1, len(records) - 1):
        assert replay([*records[:i], *records[i + 1 :]], tuple(SERVICES.values())).divergence is not None


def test_each_decision_that_is_another_one_now_is_told_with_the_release_that_recorded_it():
    records = read(RUNS[0])
    services = tuple(SERVICES.values())
    changed = tuple(replace(s, decides={**s.decides, AgentProposed: lambda run, event: []}) for s in services)
    first, every = replay(records, changed), replay(records, changed, keep_going=True)
    proposed = [record.position for record in records if isinstance(record.event, AgentProposed)]
    assert [found.cause.position for found in first.divergences] == proposed[:1]
    assert [found.cause.position for found in every.divergences] == proposed
    assert {found.reason for found in every.divergences} == {"no longer decided"}
    started = next(record.event for record in records if isinstance(record.event, RunStarted))
    assert {found.code for found in every.divergences} == {started.code}


def test_a_stretch_is_judged_on_the_state_that_the_whole_history_gives():
    records, services = read(RUNS[0]), tuple(SERVICES.values())
    whole = replay(records, services)
    half = len(records) // 2
    parts = replay(records, services, last=half), replay(records, services, first=half + 1)
    for part in parts:
        assert part.divergence is None and part.pending == 0
    for count in ("records", "decisions", "performed"):
        assert sum(getattr(part, count) for part in parts) == getattr(whole, count) > 0
    stray = replace(records[-1], id=records[-1].correlation, position=len(records) + 1)
    assert replay([*records, stray], services, last=half).divergence is not None  # the chain is checked whole
