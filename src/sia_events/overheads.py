"""What the platform itself costs, the model and the agent taken away: a generation, and a record's way into the log."""

import asyncio
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from sia_events import app
from sia_events.event_log.recorder import lag
from sia_events.feedback_svc.service import feedback_svc
from sia_events.figures import INSTANT, Figure
from sia_events.home import hold
from sia_events.infra.sandbox import Bubblewrap
from sia_events.log_here import open_log
from sia_events.shared.events import (
    AttemptRequested,
    Event,
    FeedbackRequested,
    HarnessPatched,
    HarnessPatchRequested,
    RunFinished,
    RunSettings,
    RunStarted,
    RunSteered,
    ServiceFailed,
)
from sia_events.shared.ports import Job, Log
from sia_events.shared.record import Record, answers, opening
from sia_events.shared.registration import register
from sia_events.shared.service import Service, Work, serve
from sia_events.shared.settings import Settings
from sia_events.shared.task import Task, load_task

# The first generations have the machine to share with processes that are just starting: they are not counted.
WARM, GENERATIONS = 2, 12
PROBES = 15
RUNS, BATCH, APPENDS_A_SECOND = 5, 10, 10  # times each other: events a second
SECONDS = 20.0
LOOK_S = 0.02

# One model call an item, all on their way at once, over bare sockets: what is left is the platform.
AGENT = """\
import json, os, socket, sys

HEAD = "POST /v1/chat/completions HTTP/1.0\\r\\nAuthorization: Bearer {}\\r\\nContent-Length: {}\\r\\n\\r\\n"

def ask(item):
    asked = {"messages": [{"role": "user", "content": item["text"]}], "metadata": {"item": item["id"]}}
    body = json.dumps(asked).encode()
    connection = socket.create_connection(("127.0.0.1", 8080))
    connection.sendall(HEAD.format(os.environ["OPENAI_API_KEY"], len(body)).encode() + body)
    return connection

def said(connection):
    with connection.makefile("rb") as reply:
        return json.loads(reply.read().partition(b"\\r\\n\\r\\n")[2])["choices"][0]["message"]["content"]

_, _, data, _, work = sys.argv
with open(data + "/items.jsonl") as lines:
    items = [json.loads(line) for line in lines]
replies = [said(connection) for connection in [ask(item) for item in items]]
with open(work + "/answers.jsonl", "w") as answers:
    for item, reply in zip(items, replies):
        print(json.dumps({"id": item["id"], "answer": reply}), file=answers)
"""
TOML = """\
evaluator = "labels"
labels = ["ok", "not ok"]
question = "Is it?"
splits = {seed = 1, dev = 8, gate = 8, test = 8}
"""


def trivial_task(folder: Path) -> Task:
    """A task of 32 items, 8 a split, whose first agent is AGENT."""
    files = {
        "data/public/task.md": "# Say ok\n",
        "data/private/items.jsonl": "".join(
            f'{{"id": "i{n}", "text": "item {n}", "label": "ok"}}\n' for n in range(32)
        ),
        "reference/reference_target_agent.py": AGENT,
        "task.toml": TOML,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return load_task(folder)


async def _same_again(work: Work, asked: HarnessPatchRequested) -> Sequence[Event]:
    """Candidates that are the incumbent once more, in place of the proposer's."""
    parent = work.run.versions[asked.parent]
    return [
        HarnessPatched(
            version=f"g{asked.generation}{'abcdefgh'[i]}",
            generation=asked.generation,
            candidate=i,
            parent=parent.name,
            harness=parent.harness,
            weights=parent.weights,
            edits=(),
            reason="the same again",
        )
        for i in range(asked.candidates)
    ]


TRIVIAL = Service(
    feedback_svc.name, feedback_svc.decides, {**feedback_svc.performs, HarnessPatchRequested: _same_again}
)


async def generation(home: Path, candidates: int, generations: int = GENERATIONS) -> Figure:
    """Seconds a generation with the instant model and AGENT: boxes, model calls, scores, verdict, all of it on disk."""
    history = await trivial_run(home, candidates, WARM + generations)
    return await a_generation(home, history, f"a generation of {candidates}, instant model", 0.4)


async def a_generation(home: Path, history: Sequence[Record], name: str, goal: float) -> Figure:
    """The median time of a run's generations but the first, beside what their boxes and writes cost on their own."""
    begun = [record for record in history if isinstance(record.event, FeedbackRequested)][WARM:]
    took = [(later.time - sooner.time).total_seconds() for sooner, later in pairwise(begun)]
    one = [record for record in history if begun[0].position < record.position <= begun[1].position]
    boxes = sum(isinstance(record.event, AttemptRequested) for record in one)
    appends = len(Counter((record.cause, record.producer) for record in one))
    box_s, fsync_s = await _box_seconds(home), fsync_seconds(home)
    value = statistics.median(took)
    beside = {
        "generations": len(took),
        "boxes": boxes,
        "bare box": box_s,
        "appends": appends,
        "bare fsync": fsync_s,
        "bare sum": boxes * box_s + appends * fsync_s,
        "slowest": max(took),
    }
    return Figure(name, value, "s", f"<= {goal}", value <= goal, beside)


async def trivial_run(home: Path, candidates: int, generations: int) -> Sequence[Record]:
    """A whole run on the trivial task whose candidates are the incumbent once more; returns its records."""
    wanted = RunSettings(generations=generations, candidates=candidates, lever="harness", target_model=INSTANT)
    return await driven(Settings(home=home), f"trivial{candidates}", wanted, TRIVIAL)


async def driven(settings: Settings, run: str, wanted: RunSettings, feedback: Service) -> Sequence[Record]:
    """A whole run on the trivial task under this feedback agent, every service in this process; returns its records.

    It begins when the log has been started too, and has recorded some news.
    """
    async with hold(settings, "bench"), app.stores(settings) as bare:
        others = [name for name in (*app.SERVICES, *app.LOOPS) if name != feedback.name]
        node = app.as_asked(app.with_services(bare, others), "bubblewrap", local_model=False)
        registered = await register(trivial_task(settings.home / "task"), node.blobs, node.private, 8)
        await node.bus.append(news := f"{run}-news", opening(news, [registered]))
        async with node.answering(run):
            ports = app.ports_of(feedback.name, node)
            node.tasks.append(asyncio.create_task(serve(feedback, node.bus, ports, run)))
            await node.guard(recorded(node))
            await node.bus.append(run, opening(run, [registered, RunStarted(settings=wanted, code="bench")]))
            await node.guard(_finished(node, run))
        return await node.bus.history(run)


async def _finished(node: app.Node, run: str) -> None:
    async for record in app.follow(node.bus, run):
        if isinstance(record.event, RunFinished):
            return
        if isinstance(record.event, ServiceFailed):
            raise RuntimeError(f"no figure: {record.event.service} gave up: {record.event.error}")


async def publish_to_queryable(home: Path, seconds: float = SECONDS) -> Figure:
    """From handing events to the bus, in batches of several runs, until a query of the log returns them."""
    settings = Settings(home=home)
    async with hold(settings, "bench"), app.stores(settings) as bare:
        node = app.with_services(bare, ["recorder"])
        published: dict[str, list[tuple[int, float]]] = {f"publish{n}": [] for n in range(RUNS)}
        async with node.answering(None):
            await asyncio.gather(*(node.bus.append(run, opening(run, [_news()])) for run in published))
            await node.guard(recorded(node))
            async with open_log(settings) as log:
                latencies, rate = await node.guard(_flow(node, log, published, seconds))
                raw = await _raw_inserts(log, (await node.bus.history("publish0"))[: RUNS * BATCH])
    ordered = sorted(latencies)
    p99 = ordered[int(0.99 * len(ordered))]
    beside = {"p50": statistics.median(ordered), "events/s": rate, "raw insert p50": raw[0], "raw insert max": raw[1]}
    return Figure("publish to queryable, p99", p99, "s", "<= 1.5", p99 <= 1.5, beside)


async def recorded(node: app.Node) -> None:
    """Wait until the recorder has opened the log and caught up: before that, the store would be ours or half made."""
    while True:
        if not await lag(node.bus):
            return
        await asyncio.sleep(LOOK_S)


async def _flow(
    node: app.Node, log: Log, published: dict[str, list[tuple[int, float]]], seconds: float
) -> tuple[list[float], float]:
    """Publish and look at once; returns every event's latency, and the events a second that were handed over."""
    latencies: list[float] = []
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        group.create_task(_see(log, published, latencies, round(seconds * APPENDS_A_SECOND)))
        for run, mine in published.items():
            group.create_task(_publish(node, run, mine, seconds))
    last = max(handed for mine in published.values() for _, handed in mine)
    return latencies, len(latencies) / (last - began + 1 / APPENDS_A_SECOND)


async def _publish(node: app.Node, run: str, published: list[tuple[int, float]], seconds: float) -> None:
    """Answer the run's last record with a batch, again and again at an even pace, whatever the one before took."""
    last = (await node.bus.history(run))[-1]
    start = time.monotonic()
    for number in range(round(seconds * APPENDS_A_SECOND)):
        await asyncio.sleep(start + number / APPENDS_A_SECOND - time.monotonic())
        handed = time.monotonic()
        drafts = answers(run, last, "bench", [_news()] * BATCH)
        last = (await node.bus.append(run, drafts))[-1]
        published.append((last.position, handed))


async def _see(log: Log, published: dict[str, list[tuple[int, float]]], latencies: list[float], batches: int) -> None:
    """Look for every batch in the log, over and over, until all have been seen."""
    sql = "SELECT run, max(position) AS position FROM events GROUP BY run"
    done = dict.fromkeys(published, 0)
    while min(done.values()) < batches:
        rows = {row["run"]: row["position"] for row in await log.query(sql)}
        now = time.monotonic()
        for run, mine in published.items():
            while done[run] < len(mine) and mine[done[run]][0] <= rows.get(run, 0):
                latencies += [now - mine[done[run]][1]] * BATCH
                done[run] += 1
        await asyncio.sleep(LOOK_S)


async def _raw_inserts(log: Log, records: Sequence[Record]) -> tuple[float, float]:
    """Seconds (median, longest) to insert so many records straight into the log."""
    took: list[float] = []
    for number in range(PROBES):
        began = time.perf_counter()
        await log.append(records, f"bench {number}")
        took.append(time.perf_counter() - began)
    return statistics.median(took), max(took)


async def _box_seconds(home: Path) -> float:
    """Median seconds to start and end a box with an idle interpreter in it."""
    took: list[float] = []
    for _ in range(PROBES):
        with tempfile.TemporaryDirectory(dir=home) as work:
            began = time.perf_counter()
            await Bubblewrap(hidden=(home,)).run(Job(argv=("python", "-c", ""), work=Path(work)))
            took.append(time.perf_counter() - began)
    return statistics.median(took)


def fsync_seconds(home: Path) -> float:
    """Median seconds to make one small write last."""
    took: list[float] = []
    with tempfile.TemporaryFile(dir=home) as file:
        for _ in range(PROBES):
            began = time.perf_counter()
            file.write(b"x" * 512)
            file.flush()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - began)
    return statistics.median(took)


def _news() -> RunSteered:
    return RunSteered(text="a line of about the size that events have on average; " * 8)
