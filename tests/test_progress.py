"""A run as it goes on the screen: the learner's steps as they come, on a terminal and elsewhere."""

import asyncio
import io
import re
from typing import Any, cast

import msgspec
import pytest
from given import recorded
from rich.console import Console
from story import D, proposed, registered, started, trained

from sia_events import app, following
from sia_events.infra.memory import MemoryBus
from sia_events.shared.events import RunFinished, WeightUpdateRequested
from sia_events.shared.ports import Envelope
from sia_events.shared.record import answers, opening
from sia_events.shared.run import fold
from sia_events.views import progress

REQUESTED = WeightUpdateRequested(
    generation=1, parent="g0a", algorithm="grpo", trajectory=D, rewards=D, epochs=1, seed=0
)


def line(step: int, **more: Any) -> dict[str, Any]:
    figures = {"loss": -0.0123, "reward": 0.41234, "kl": 0.0071, "entropy": 1.25, "clip_fraction": 0.031}
    return {"step": step, "steps": 9, **figures, "tokens_per_second": 1830.4, **more}


def test_a_step_is_told_in_one_line_with_what_the_learner_told() -> None:
    assert progress.step_text(line(3)) == (
        "step 3 of 9   reward 0.412   loss -0.0123   KL 0.0071   entropy 1.250   clipped 3.1%   1,830 tokens/s"
    )
    assert "held out 0.500" in progress.step_text(line(3, held_out_last=0.5))
    assert "clipped" not in progress.step_text({k: v for k, v in line(3).items() if k != "clip_fraction"})


def test_the_panel_shows_the_newest_step_until_learning_is_over() -> None:
    records = recorded(registered(), started(), proposed(), REQUESTED, trained("g1a", "g0a"))
    shown = []
    for upto in (4, 5):
        drawn = io.StringIO()
        with progress._live("r1", Console(file=drawn, force_terminal=True, width=140)) as screen:
            for record in records[:4]:
                screen.tell(record, fold(records[: record.position]))
            screen.step(line(1))
            screen.step(line(2))
            for record in records[4:upto]:
                screen.tell(record, fold(records))
        shown.append(drawn.getvalue())
    # The last of what was drawn: the panel that the end left.
    last = [text.rsplit("╭", 1)[-1] for text in shown]
    assert "learning: step 2 of 9" in last[0] and "step 1 of 9" not in last[0]
    assert "learning:" not in last[1] and "g1a" in last[1]


def test_without_a_terminal_a_step_is_told_at_most_every_so_often(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress.progress("r1", quiet=False) as screen:
        for step in range(1, 4):
            screen.step(line(step))
        monkeypatch.setattr(progress, "STEP_EVERY_S", 0.0)
        screen.step(line(4))
    told = re.findall(r"^\d\d:\d\d:\d\d  learning: step (\d) of 9", capsys.readouterr().err, re.MULTILINE)
    assert told == ["1", "4"]


def test_who_wants_no_progress_is_told_of_no_step(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress("r1", quiet=True) as screen:
        screen.step(line(1))
    assert capsys.readouterr().err == ""


async def test_who_follows_a_run_sees_the_steps_of_a_learner_anywhere_on_the_bus_as_they_come() -> None:
    bus = MemoryBus()
    (first, *_, requested) = await bus.append("r1", opening("r1", [registered(), started(), proposed(), REQUESTED]))
    nothing = cast(Any, None)
    node = app.Node(settings=nothing, bus=bus, blobs=nothing, private=nothing, streams=nothing)
    steps: asyncio.Queue[int] = asyncio.Queue()
    screen = progress.Screen(lambda record, run: None, lambda step: steps.put_nowait(step["step"]))
    follower = asyncio.create_task(following._until_over(node, "r1", screen))
    for step in (1, 2):
        await bus.trace(Envelope("r1", "training", "g1", (msgspec.json.encode(line(step)),)))
        assert await asyncio.wait_for(steps.get(), 60) == step
    await bus.trace(Envelope("r1", "training", "g1", (msgspec.json.encode(line(2, done=True)),)))
    (learned,) = await bus.append("r1", answers("r1", requested, "trainer", [trained("g1a", "g0a")]))
    over = RunFinished(outcome="improved", best="g1a", reason="over", sealed=None)
    await bus.append("r1", answers("r1", learned, "feedback_svc", [over]))
    assert await asyncio.wait_for(follower, 60) == over
    await bus.trace(Envelope("r1", "training", "g1", (msgspec.json.encode(line(3)),)))
    assert steps.empty() and first.position == 1


async def test_a_trace_that_cannot_be_read_is_said_once_and_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    bus, said = MemoryBus(), ""
    (*_, requested) = await bus.append("r1", opening("r1", [registered(), started(), proposed(), REQUESTED]))
    nothing = cast(Any, None)
    node = app.Node(settings=nothing, bus=bus, blobs=nothing, private=nothing, streams=nothing)
    screen = progress.Screen(lambda record, run: None, lambda step: None)
    follower = asyncio.create_task(following._until_over(node, "r1", screen))
    await bus.trace(Envelope("r1", "training", "g1", (b"junk",)))
    async with asyncio.timeout(60):
        while not said:
            await asyncio.sleep(0.01)
            said = capsys.readouterr().err
    await bus.trace(Envelope("r1", "training", "g1", (b"junk",)))
    (learned,) = await bus.append("r1", answers("r1", requested, "trainer", [trained("g1a", "g0a")]))
    over = RunFinished(outcome="improved", best="g1a", reason="over", sealed=None)
    await bus.append("r1", answers("r1", learned, "feedback_svc", [over]))
    assert await asyncio.wait_for(follower, 60) == over
    said += capsys.readouterr().err
    assert said.count("no more steps of g1 are shown: DecodeError") == said.count("\n") == 1
