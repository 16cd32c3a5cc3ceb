"""Builds that break a promise on purpose: the checker tells which."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from chains import chain


@pytest.mark.parametrize(
    ("build", "points", "kinds"),
    [
        # Not over the first batch: a log without a row is taken for a new one, and filled from the beginning.
        ("acks_before_the_insert", ["recorder before inserting from SIA #3"], {("lost", "tables")}),
        (
            "gives_before_it_records",
            ["model_gateway before asking a model #4"],
            {("paid again", "provider"), ("altered", "journal")},
        ),
        (
            "sends_envelopes_twice",
            ["meta_svc before publishing on RunStarted"],
            {("doubled", "stream"), ("doubled", "journal")},
        ),
    ],
)
def test_the_checker_tells_what_a_broken_build_loses_when_it_is_killed(
    build: str,
    points: list[str],
    kinds: set[tuple[str, str]],
    task: Path,
    tmp_path: Path,
    children: Callable[[], list[psutil.Process]],
):
    with chain(task, tmp_path / "home", children, broken=build) as runs:
        runs.kill(points)
        runs.broken = ""
        runs.go()
        assert {(fault.kind, fault.where) for fault in runs.faults()} == kinds
