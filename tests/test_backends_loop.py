"""A whole run whose harnesses an LLM writes, on a scripted one: its records, its costs, and its replay without any."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from test_loop import SERVICES, World
from writing import Answer, Scripted, said, writing_room, wrote

from sia_events.agents.direct import Direct
from sia_events.evaluator.service import evaluator
from sia_events.shared.calls import decode_call
from sia_events.shared.events import AgentProposed, FeedbackGiven, HarnessPatched, RunFinished, VersionAccepted
from sia_events.shared.ports import Chat, Ports
from sia_events.shared.record import Record
from sia_events.shared.replay import replay
from sia_events.shared.service import serve


def author(call: Chat) -> Answer:
    """Writes a plain first agent, picks the harness, then writes a candidate that is better and one that is broken."""
    words = "\n".join(str(message["content"]) for message in call.messages)
    if "Write a first agent" in words:
        return wrote({"harness.json": json.dumps({"answer": "choose"})}, "scores the labels")
    if "Choose the lever" in words:
        choice = {"lever": "harness", "reasons": ["half is right"], "references": [], "expected_gain": 0.2}
        return said(json.dumps(choice))
    if "candidate 1 of 2" in words:
        return wrote({"harness.json": json.dumps({"answer": "choose", "calibrate": 32})}, "removes the bias")
    return wrote({"target_agent.py": "def f(:"})


async def finished(world: World, ports: Ports, **settings: Any) -> Sequence[Record]:
    wanted = {"backend": "direct", "meta_model": "scripted/author", "lever": "auto", "generations": 1, "candidates": 2}
    await world.start("r1", **{**wanted, **settings})
    given = [(s, replace(ports, private=world.private if s is evaluator else None)) for s in SERVICES]
    tasks = [asyncio.create_task(serve(service, world.bus, mine, "r1")) for service, mine in given]
    try:
        async with asyncio.timeout(60):
            while True:
                history = await world.bus.history("r1")
                if history[-1].type in ("RunFinished", "ServiceFailed"):
                    return history
                await asyncio.sleep(0)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_run_is_written_measured_and_improved_by_an_llm_and_replays_without_it(tmp_path: Path):
    world, models = World(tmp_path), Scripted(author)
    async with writing_room(
        tmp_path, models, {"direct": Direct()}, sandbox=world.box, like=world_ports(world)
    ) as ports:
        records = await finished(world, ports)
    events = [record.event for record in records]
    first = next(e for e in events if isinstance(e, AgentProposed))
    assert first.written and "g0b: the same files as g0a" in first.reason
    (given,) = [e for e in events if isinstance(e, FeedbackGiven)]
    assert given.written and given.expected_gain == 0.2
    (patched,) = [e for e in events if isinstance(e, HarnessPatched)]
    assert patched.version == "g1a" and patched.edits == ("harness.json",) and "does not compile" in patched.reason
    assert [e.version for e in events if isinstance(e, VersionAccepted)] == ["g0a", "g1a"]
    last = events[-1]
    assert isinstance(last, RunFinished) and last.outcome == "improved" and last.best == "g1a"
    asked = len(models.asked)
    found = replay(records, SERVICES)
    assert (found.divergence, found.pending) == (None, 0) and len(models.asked) == asked
    envelopes = await world.bus.traces("r1", "model_call", None)
    calls = [decode_call(line) for each in envelopes for line in each.lines]
    assert sorted((c.role, c.version) for c in calls) == [
        ("feedback", "g1"),
        ("feedback", "g1a"),
        ("feedback", "g1b"),
        ("feedback", "g1b"),
        ("meta", "g0a"),
        ("meta", "g0b"),
    ]
    assert asked == len(calls)


def world_ports(world: World) -> Ports:
    """The stores of the world, for a room that is laid over them."""
    return world.ports(evaluator)
