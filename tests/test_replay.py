"""Recorded runs, decided again with today's code on every change.

`sia log RUN --json > tests/runs/NAME.jsonl` adds one.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from given import altered

from sia_events.app import SERVICES
from sia_events.shared import run, service
from sia_events.shared.events import AgentProposed, RunFinished, RunStarted, Scored, VersionAccepted, WeightsUpdated
from sia_events.shared.record import Record, broken_link, parse_record, to_wire
from sia_events.shared.replay import replay
from sia_events.shared.run import Run, evolve, fold

HERE = Path(__file__).parent / "runs"
RUNS = sorted(HERE.glob("*.jsonl"))
WORDS, FAMILY = HERE / "words-both-levers.jsonl", HERE / "taste-branch-of-a-branch.jsonl"


def read(path: Path) -> list[Record]:
    return [parse_record(line) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_recorded_run_is_decided_the_same_today(path: Path):
    records = read(path)
    found = replay(records, tuple(SERVICES.values()))
    assert found.divergence is None and found.pending == 0
    assert found.decisions > 10 and found.performed >= 10
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


def test_approvals_kernels_and_lineages_over_releases_are_among_them():
    types = {record.type for path in RUNS for record in read(path)}
    assert {"ApprovalGiven", "KernelMeasured", "RunBranched", "RunSteered"} <= types
    family = read(FAMILY)
    assert list(dict.fromkeys(record.run for record in family)) == ["r1", "b", "c"]
    assert {record.schema for record in family if record.run == "c"} == {4} != {record.schema for record in family[:3]}


def test_a_record_left_out_is_found():
    records = read(WORDS)
    for i in range(1, len(records) - 1):
        assert replay([*records[:i], *records[i + 1 :]], tuple(SERVICES.values())).divergence is not None


def test_each_decision_that_is_another_one_now_is_told_with_the_release_that_recorded_it():
    records = read(WORDS)
    services = tuple(SERVICES.values())
    changed = tuple(replace(s, decides={**s.decides, AgentProposed: lambda run, event: []}) for s in services)
    first, every = replay(records, changed), replay(records, changed, keep_going=True)
    proposed = [record.position for record in records if isinstance(record.event, AgentProposed)]
    assert [found.cause.position for found in first.divergences] == proposed[:1]
    assert [found.cause.position for found in every.divergences] == proposed
    assert {found.reason for found in every.divergences} == {"no longer decided"}
    started = next(record.event for record in records if isinstance(record.event, RunStarted))
    assert {found.code for found in every.divergences} == {started.code}


def test_code_that_fails_on_a_record_is_a_divergence_there():
    def broken(run: Run, event: AgentProposed):
        raise KeyError(event.version)

    records = read(WORDS)
    runner = SERVICES["target_runner"]
    changed = replace(runner, decides={**runner.decides, AgentProposed: broken})
    services = tuple(changed if service is runner else service for service in SERVICES.values())
    (found,) = replay(records, services, keep_going=True).divergences
    proposed = next(record for record in records if isinstance(record.event, AgentProposed))
    assert found.cause is proposed and found.service == "target_runner" and found.recorded and not found.decided
    assert found.reason == "deciding fails now: KeyError: 'g0a'"


def test_a_difference_is_told_with_the_code_that_wrote_the_very_record():
    """A run may be gone on with by another release than the one that opened it."""
    family = read(FAMILY)
    last = next(record for record in reversed(family) if record.type == "RunFinished")
    forged = altered(last, code="sia-events 9.9.9+0123456789ab")
    services = tuple(SERVICES.values())
    silent = tuple(replace(s, decides={**s.decides, Scored: lambda run, event: []}) for s in services)
    family[last.position - 1] = forged
    told = {
        found.reason: found.code
        for found in replay(family, silent, first=last.position - 3, keep_going=True).divergences
    }
    assert told == {"hash chain broken": forged.code, "no longer decided": forged.code}
    opened = next(record.event for record in family if isinstance(record.event, RunStarted))
    first = replay(family[:10], silent).divergence
    assert first and (first.code, first.cause.code) == (opened.code, None), "up to schema 3 what opened the run"


def test_a_run_is_folded_once_and_what_a_branch_inherits_again_for_the_branch(monkeypatch: pytest.MonkeyPatch):
    folded: list[int] = []

    def counted(state: Run, record: Record) -> Run:
        folded.append(record.position)
        return evolve(state, record)

    monkeypatch.setattr(service, "evolve", counted)
    monkeypatch.setattr(run, "evolve", counted)
    for path in RUNS:
        records = read(path)
        folded.clear()
        assert replay(records, tuple(SERVICES.values())).divergence is None
        forks = [record.position for record in records if record.type == "RunBranched"]
        behind = [position for position in folded if position > max(forks, default=0)]
        assert len(set(behind)) == len(behind) > 10


def test_a_stretch_is_judged_on_the_state_that_the_whole_history_gives():
    records, services = read(WORDS), tuple(SERVICES.values())
    whole = replay(records, services)
    half = len(records) // 2
    parts = replay(records, services, last=half), replay(records, services, first=half + 1)
    for part in parts:
        assert part.divergence is None and part.pending == 0
    for count in ("records", "decisions", "performed"):
        assert sum(getattr(part, count) for part in parts) == getattr(whole, count) > 0
    stray = replace(records[-1], id=records[-1].correlation, position=len(records) + 1)
    assert replay([*records, stray], services, last=half).divergence is not None  # the chain is checked whole
