"""Recorded runs, decided again with today's code on every change.

`sia log RUN --json > tests/runs/NAME.jsonl` adds one.
"""

from pathlib import Path

import pytest
from given import altered

from sia_events.app import SERVICES
from sia_events.shared.events import RunFinished, VersionAccepted, WeightsUpdated
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
