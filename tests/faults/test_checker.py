"""The history checker on histories made by hand: it is silent on whole ones, and names each fault in others."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import pytest
from checker import Fault, Held, Line, Reply, Told, check

from sia_events.shared.events import Event, RunBranched, RunResumed, RunSettings, RunStarted
from sia_events.shared.record import GENESIS, opening, parse_record, place

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def written(run: str, *events: Event, before: int = 0, chain: str = GENESIS) -> list[bytes]:
    """The bytes of a run that was opened with these events, behind a position and its chain."""
    wires: list[bytes] = []
    for number, draft in enumerate(opening(run, events), before + 1):
        record = place(draft, run, number, chain, NOW)
        wires.append(record.wire)
        chain = record.chain
    return wires


def noted(wires: Sequence[bytes]) -> list[tuple[str, int, str]]:
    return [(r.run, r.position, sha256(r.wire).hexdigest()) for r in map(parse_record, wires)]


STARTED = RunStarted(settings=RunSettings(), code="test")
WIRES = written("r", STARTED, RunResumed(reason="a"), RunResumed(reason="b"), RunResumed(reason="c"))
OTHERS = written("r", STARTED, RunResumed(reason="a"), RunResumed(reason="another"), RunResumed(reason="c"))
LINES = [Line("r", "log", "k", digest) for digest in "abc"]
FIRST, SECOND = Reply(("r", "g0a", "x", 0), 1), Reply(("r", "g0a", "y", 0), 2)
TOLD = Told(noted(WIRES), LINES, [FIRST, SECOND], sent=LINES)
HELD = Held({"r": WIRES}, {"r": WIRES}, LINES, LINES, [FIRST, SECOND], ["x", "y"])


def swapped(values: Sequence[Any]) -> list[Any]:
    return [values[1], values[0], *values[2:]]


def test_a_whole_history_has_no_fault():
    assert check(TOLD, HELD) == []


def test_what_nobody_was_told_of_may_be_there_too():
    assert check(Told(noted(WIRES[:2]), LINES[:1], [FIRST], sent=LINES), HELD) == []


def test_a_line_that_was_sent_again_because_nobody_knew_of_it_may_be_there_once_or_twice():
    for lines in (LINES, [*LINES, LINES[2]]):
        again = replace(TOLD, sent=[*LINES, LINES[2]])
        assert check(again, replace(HELD, lines=lines, tabled_lines=lines)) == []


def test_a_request_that_was_paid_for_before_its_reply_was_recorded_may_be_paid_for_again():
    late = replace(SECOND, payment=3)
    assert check(replace(TOLD, replies=[FIRST, late]), replace(HELD, journal=[FIRST, late], paid=["x", "y", "y"])) == []


def branched(run: str, parent: str, behind: bytes) -> list[bytes]:
    fork = parse_record(behind)
    opened = RunBranched(
        parent=parent, at=fork.position, generation=0, overrides={}, settings=RunSettings(), code="test"
    )
    return written(run, opened, before=fork.position, chain=fork.chain)


def test_a_branch_goes_on_behind_its_parent_or_behind_a_parent_of_that():
    runs = {"r": WIRES, "b": branched("b", "r", WIRES[1]), "c": branched("c", "b", WIRES[0])}
    assert check(TOLD, replace(HELD, stream=runs, tables=runs)) == []
    runs["c"] = branched("c", "b", OTHERS[2])
    assert check(TOLD, replace(HELD, stream=runs, tables=runs)) == [
        Fault("chain broken", "stream", "record 4 of run c")
    ]


FAULTY: dict[str, tuple[Held, Fault | tuple[Fault, ...]]] = {
    "the last record is lost": (
        replace(HELD, stream={"r": WIRES[:3]}, tables={"r": WIRES[:3]}),
        Fault("lost", "stream", "record 4 of run r, whose append was acknowledged"),
    ),
    "a record between others is lost": (
        replace(HELD, stream={"r": [WIRES[0], *WIRES[2:]]}, tables={"r": [WIRES[0], *WIRES[2:]]}),
        (
            Fault("lost", "stream", "records 2 to 2 of run r"),
            Fault("lost", "stream", "record 2 of run r, whose append was acknowledged"),
        ),
    ),
    "a record is there twice": (
        replace(HELD, stream={"r": [*WIRES, WIRES[3]]}, tables={"r": WIRES}),
        (
            Fault("doubled", "stream", f"record {parse_record(WIRES[3]).id} of run r"),
            Fault("reordered", "stream", "record 4 of run r, behind 4"),
            Fault("lost", "tables", "record 4 of run r"),
        ),
    ),
    "records are in another order": (
        replace(HELD, stream={"r": [*WIRES[:2], WIRES[3], WIRES[2]]}, tables={"r": [*WIRES[:2], WIRES[3], WIRES[2]]}),
        (
            Fault("lost", "stream", "records 3 to 3 of run r"),
            Fault("reordered", "stream", "record 3 of run r, behind 4"),
        ),
    ),
    "another record stands in its place": (
        replace(HELD, stream={"r": OTHERS[:3] + WIRES[3:]}, tables={"r": OTHERS[:3] + WIRES[3:]}),
        (
            Fault("chain broken", "stream", "record 4 of run r"),
            Fault("altered", "stream", "record 3 of run r, whose append was acknowledged"),
        ),
    ),
    "the tables lack a record": (
        replace(HELD, tables={"r": WIRES[:3]}),
        Fault("lost", "tables", "record 4 of run r"),
    ),
    "the tables have a record twice": (
        replace(HELD, tables={"r": [*WIRES, WIRES[3]]}),
        Fault("doubled", "tables", "record 4 of run r"),
    ),
    "the tables have another record": (
        replace(HELD, tables={"r": [*WIRES[:3], OTHERS[3]]}),
        (Fault("lost", "tables", "record 4 of run r"), Fault("altered", "tables", "record 4 of run r")),
    ),
    "the tables have them in another order": (
        replace(HELD, tables={"r": swapped(WIRES)}),
        Fault("reordered", "tables", "run r"),
    ),
    "the tables have a run that the stream lacks": (
        replace(HELD, tables={"r": WIRES, "s": written("s", STARTED)}),
        Fault("lost", "stream", "run s, which the tables have"),
    ),
    "a line is lost": (
        replace(HELD, lines=LINES[:2], tabled_lines=LINES[:2]),
        Fault("lost", "stream", "a line of log k of run r, acknowledged"),
    ),
    "a line stands on the stream more often than it was sent": (
        replace(HELD, lines=[*LINES, LINES[0]], tabled_lines=[*LINES, LINES[0]]),
        Fault("doubled", "stream", "a line of log k of run r"),
    ),
    "the tables lack a line": (
        replace(HELD, tabled_lines=LINES[:2]),
        Fault("lost", "tables", "a line of log k of run r"),
    ),
    "the tables have a line twice": (
        replace(HELD, tabled_lines=[*LINES, LINES[0]]),
        Fault("doubled", "tables", "a line of log k of run r"),
    ),
    "the tables have lines in another order": (
        replace(HELD, tabled_lines=swapped(LINES)),
        Fault("reordered", "tables", "r log k"),
    ),
    "a reply that was given is not in the journal": (
        replace(HELD, journal=[FIRST]),
        Fault("lost", "journal", "call 0 y of g0a of run r, whose reply was given"),
    ),
    "another reply than the one that was given is in the journal, and was paid for": (
        replace(HELD, journal=[FIRST, replace(SECOND, payment=3)], paid=["x", "y", "y"]),
        (
            Fault("altered", "journal", "call 0 y of g0a of run r, whose reply was given"),
            Fault("paid again", "provider", "call 0 y of g0a of run r"),
        ),
    ),
    "a call is recorded twice": (
        replace(HELD, journal=[FIRST, SECOND, SECOND]),
        Fault("doubled", "journal", "call 0 y of g0a of run r"),
    ),
    "a recorded call is paid for again": (
        replace(HELD, paid=["x", "y", "x"]),
        Fault("paid again", "provider", "call 0 x of g0a of run r"),
    ),
}


@pytest.mark.parametrize("case", FAULTY)
def test_each_fault_is_named_and_no_other(case: str):
    held, faults = FAULTY[case]
    assert check(TOLD, held) == [*(faults if isinstance(faults, tuple) else (faults,))]
