"""The benchmark measures what it says: small versions of its parts on real processes. No figure is held to its goal."""

import json
from pathlib import Path

import pytest

from sia_events import overheads
from sia_events.benches import render
from sia_events.figures import INSTANT, Figure, disk, first_model_call, sealed, whole_run
from sia_events.shared.events import FeedbackRequested, RunFinished, Scored
from sia_events.shared.record import broken_link
from sia_events.shared.task import split_sizes


def test_the_trivial_task_has_eight_items_a_split(tmp_path: Path):
    assert split_sizes(overheads.trivial_task(tmp_path)) == {"train": 8, "dev": 8, "gate": 8, "test": 8}


async def test_a_trivial_run_turns_whole_generations_and_its_agent_asks_about_every_item(tmp_path: Path):
    history = await overheads.trivial_run(tmp_path, candidates=2, generations=2)
    assert broken_link(history) is None
    assert [r.event.generation for r in history if isinstance(r.event, FeedbackRequested)] == [1, 2]
    assert {r.event.score.value for r in history if isinstance(r.event, Scored)} == {1.0}
    assert isinstance(history[-1].event, RunFinished) and history[-1].event.outcome == "no proven gain"


async def test_everything_published_becomes_queryable(tmp_path: Path):
    figure = await overheads.publish_to_queryable(tmp_path, seconds=0.5)
    assert 0 < figure.beside["p50"] <= figure.value and figure.beside["raw insert p50"] > 0


@pytest.mark.slow  # a whole run, and the servers beside it
async def test_the_first_model_call_comes_before_its_reply(tmp_path: Path):
    figure = await first_model_call(tmp_path, INSTANT, starts=1)
    assert 0 < figure.value <= figure.beside["first reply"]


@pytest.mark.slow  # a whole run, and the servers beside it
def test_a_whole_run_tells_its_summary_its_cost_and_what_it_left_on_disk(tmp_path: Path):
    small = ("--generations", "1", "--candidates", "1", "--lever", "harness")
    summary, ran, grown = whole_run(tmp_path, "one", INSTANT, 0, *small)
    assert summary["status"] == "finished" and summary["sealed"]["first"]["n"] == 400
    assert ran.cpu_s > 0 and ran.peak_mb > 50 and grown > 0
    test, whole, memory = sealed(0, summary, ran)
    assert test.reached is False, "an instant model names no kind of thing"
    assert whole.value == ran.wall_s and memory.value == ran.peak_mb
    assert disk(INSTANT, [grown], [summary["cost"]["model_calls"]]).value == grown


def test_figures_stand_beside_their_goals_and_what_they_are_compared_with():
    found = [Figure("slow", 2.0, "s", "<= 1", False, {"bare": 0.5}), Figure("plain", 3.0, "MB")]
    text = render({"cores": 2}, found)
    assert "slow    2 s       <= 1  MISSED  bare 0.5" in text and text.endswith("cores 2")
    json.dumps([figure.beside for figure in found])
