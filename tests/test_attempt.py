"""One attempt: what its token is good for, what is made of one that ran out early, and which calls are its."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from doors import ToldDoor
from given import NOON, recorded
from story import OPENING, asked, proposed, started

from sia_events.infra.memory import MemoryBlobs, MemoryBus
from sia_events.model_gateway.token import TokenDoor, TokenRefused, read_token
from sia_events.shared.calls import ModelCall, encode_call, journal_key
from sia_events.shared.events import AttemptFailed, AttemptRequested, Event, ExecutionLogged
from sia_events.shared.ports import BusFull, Envelope, GatewayAway, Job, Outcome, Ports
from sia_events.shared.registration import decode_task, register
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.task import find_task
from sia_events.shared.tree import store_tree
from sia_events.target_runner.logged import KEPT, LogLine
from sia_events.target_runner.perform import HELD_UP_S, TOKEN_MARGIN_S, recorded_calls
from sia_events.target_runner.service import target_runner

SECRET = "a secret of the tests"
WELL = Outcome("ok", 0, b"", b"", False, 1.0)


class Box:
    """The `Sandbox` port and the `Clock`: a job that ends as it is told to, and takes as long."""

    def __init__(self, takes: float = 0.0, outcome: Outcome = WELL, answers: bool = True) -> None:
        self.takes, self.outcome, self.answers, self.time = takes, outcome, answers, NOON
        self.jobs: list[Job] = []

    def now(self) -> datetime:
        return self.time

    async def run(self, job: Job) -> Outcome:
        self.jobs.append(job)
        self.time += timedelta(seconds=self.takes)
        if self.answers:
            (job.work / "answers.jsonl").write_text("")
        return self.outcome


async def attempted(
    box: Box,
    home: Path,
    request: AttemptRequested,
    calls: Sequence[bytes] = (),
    bus: MemoryBus | None = None,
    held: float | Exception = 0.0,
) -> tuple[Sequence[Event], float]:
    """What the attempt came to, and its wall limit in seconds."""
    blobs = MemoryBlobs()
    told = await register(find_task("words"), blobs, MemoryBlobs(), 8)
    first = proposed().model_copy(update={"harness": await store_tree(blobs, {"target_agent.py": b""})})
    records = recorded(told, started(), first, request)
    door = ToldDoor(home / "gateway.sock", SECRET, held)
    bus = bus or MemoryBus(blobs)
    await bus.trace(Envelope("r1", "model_call", journal_key(request.attempt), tuple(calls)))
    ports = Ports(bus, blobs, box, box, door, home)
    events = await target_runner.performs[AttemptRequested](Work(fold(records), records[-1], ports), request)
    return events, decode_task(await blobs.get(told.spec)).limits.wall_s


@pytest.mark.parametrize(
    ("request_", "sample"), [(asked("g0a", "dev"), False), (asked("g0a", "train", samples=4, items=2), True)]
)
async def test_the_token_says_for_whom_and_ends_a_minute_behind_the_attempts_wall_limit(
    tmp_path: Path, request_: AttemptRequested, sample: bool
):
    box = Box()
    (event,), wall_s = await attempted(box, tmp_path, request_)
    assert isinstance(event, ExecutionLogged)
    token = box.jobs[0].env["OPENAI_API_KEY"]
    claims = read_token(token, SECRET, NOON + timedelta(seconds=wall_s + 59))
    assert (claims.run, claims.attempt, claims.version, claims.model) == ("r1", request_.attempt, "g0a", "local/m")
    assert (claims.adapter, claims.sample, claims.seed) == (None, sample, request_.seed)
    with pytest.raises(TokenRefused, match=f"the time of attempt {request_.attempt} is up"):
        read_token(token, SECRET, NOON + timedelta(seconds=wall_s + 60))


async def test_every_start_of_an_attempt_has_a_token_of_its_own(tmp_path: Path):
    box = Box()
    for _ in range(2):
        await attempted(box, tmp_path, asked("g0a", "dev"))
    first, second = (read_token(job.env["OPENAI_API_KEY"], SECRET, NOON) for job in box.jobs)
    assert first.start != second.start


async def test_an_agent_whose_token_ran_out_while_the_machine_slept_is_not_blamed(tmp_path: Path):
    _, wall_s = await attempted(Box(), tmp_path, asked("g0a", "dev"))
    (event,), _ = await attempted(Box(takes=wall_s + TOKEN_MARGIN_S), tmp_path, asked("g0a", "dev"))
    assert isinstance(event, AttemptFailed) and event.kind == "infrastructure" and "the machine slept" in event.message


@pytest.mark.parametrize("status", ["ok", "crash", "timeout"])
async def test_an_agent_whose_replies_waited_for_our_disk_is_not_blamed_whatever_it_made_of_the_wait(
    tmp_path: Path, status: Literal["ok", "crash", "timeout"]
):
    box = Box(outcome=replace(WELL, status=status))
    (blamed,), _ = await attempted(box, tmp_path, asked("g0a", "dev"), held=HELD_UP_S)
    assert (blamed.kind if isinstance(blamed, AttemptFailed) else "ok") == status
    (event,), _ = await attempted(box, tmp_path, asked("g0a", "dev"), held=40.0)
    assert isinstance(event, AttemptFailed) and event.kind == "infrastructure"
    assert "waited 40 s to be put on record" in event.message


async def test_nothing_is_made_of_an_attempt_while_not_all_of_its_calls_are_on_record(tmp_path: Path):
    box = Box(outcome=replace(WELL, status="timeout", exit_code=None))
    with pytest.raises(GatewayAway):
        await attempted(box, tmp_path, asked("g0a", "dev"), held=GatewayAway("no room"))


async def test_an_agent_that_takes_all_of_its_time_is_within_its_tokens(tmp_path: Path):
    _, wall_s = await attempted(Box(), tmp_path, asked("g0a", "dev"))
    (event,), _ = await attempted(Box(takes=wall_s), tmp_path, asked("g0a", "dev"))
    assert isinstance(event, ExecutionLogged)


@pytest.mark.parametrize(
    ("kind", "box"),
    [
        ("crash", Box(outcome=replace(WELL, status="crash", exit_code=1))),
        ("timeout", Box(outcome=replace(WELL, status="timeout", exit_code=None))),
        ("infrastructure", Box(outcome=replace(WELL, lost_connections=1))),
        ("empty_reply", Box(answers=False)),
    ],
)
async def test_an_attempt_that_failed_says_what_it_and_its_earlier_tries_have_cost(tmp_path: Path, kind: str, box: Box):
    paid = {"reply": {}, "prompt_tokens": 7, "completion_tokens": 2}
    calls = [call("a", **paid), call("b", attempt="g0a.dev~1", **paid), call("b", attempt="g0a.dev~1", **paid)]
    (event,), _ = await attempted(box, tmp_path, asked("g0a", "dev", tries=1), calls)
    assert isinstance(event, AttemptFailed) and event.kind == kind
    assert (event.calls, event.prompt_tokens, event.completion_tokens) == (2, 14, 4)


async def test_a_reply_that_broke_off_is_paid_for_also_where_the_next_one_came_whole(tmp_path: Path):
    tokens = {"prompt_tokens": 100, "completion_tokens": 50}
    broken, whole = call("a", error="broke off", fault="garbage", usd=0.5, **tokens), {"reply": {}, "usd": 0.6}
    (event,), _ = await attempted(Box(), tmp_path, asked("g0a", "dev"), [broken, call("a", **whole, **tokens)])
    assert isinstance(event, ExecutionLogged)
    assert (event.calls, event.prompt_tokens, event.completion_tokens, event.usd) == (2, 200, 100, 1.1)


def call(digest: str, **more: Any) -> bytes:
    fixed = {"call": "c", "version": "g0a", "kind": "chat", "model": "m", "n": 0, "seed": 1, "request": {}}
    return encode_call(ModelCall(**{"attempt": "g0a.dev", "digest": digest, **fixed, **more}))


async def test_a_call_that_was_recorded_twice_is_one_call_with_its_reply():
    blobs = MemoryBlobs()
    bus = MemoryBus(blobs)
    lines = [call("a", reply={"k": 1}), call("a", error="down", attempt="g0a.dev~1"), call("b", error="down")]
    again = [call("b", error="still down", attempt="g0a.dev~1"), call("a", reply={"k": 2}), call("a", n=1, error="x")]
    for part in (lines, again):
        await bus.trace(Envelope("r1", "model_call", "g0a.dev", tuple(part)))
    records = recorded(*OPENING, asked("g0a", "dev"))
    ports = Ports(bus, blobs, Box(), Box(), TokenDoor(Path(), SECRET), Path())
    found = await recorded_calls(Work(fold(records), records[-1], ports), "g0a.dev~1")
    assert [(c.digest, c.n, c.reply, c.error) for c in found] == [
        ("a", 0, {"k": 2}, None),
        ("a", 1, None, "x"),
        ("b", 0, None, "still down"),
    ]


async def test_what_a_program_said_is_on_the_trace_once_however_often_its_attempt_is_handled(tmp_path: Path):
    bus, said = MemoryBus(), Outcome("crash", 3, b"one\ntwo\n", b"boom \xff", False, 1.0)
    for _ in range(2):
        ((failed,), _) = await attempted(Box(outcome=said), tmp_path, asked("g0a", "dev"), bus=bus)
        assert isinstance(failed, AttemptFailed) and failed.kind == "crash"
    (envelope,) = await bus.traces("r1", "log", failed.attempt)
    assert [*map(line_of, envelope.lines)] == [("stdout", "one"), ("stdout", "two"), ("stderr", "boom \ufffd")]


async def test_of_a_flood_the_end_is_kept_and_the_rest_counted(tmp_path: Path):
    bus, flood = MemoryBus(), b"".join(b"line %05d\n" % number for number in range(10_000))
    await attempted(Box(outcome=replace(WELL, stdout=flood, truncated=True)), tmp_path, asked("g0a", "dev"), bus=bus)
    (envelope,) = await bus.traces("r1", "log", None)
    first, *rest = [msgspec.json.decode(line, type=LogLine) for line in envelope.lines]
    assert first.more and rest[-1].text == "line 09999"
    assert first.omitted_lines + 1 + len(rest) == 10_000 and first.omitted_characters == len(flood) - KEPT
    assert sum(map(len, envelope.lines)) < 10 * KEPT


async def test_a_token_that_a_program_prints_is_not_written_down(tmp_path: Path):
    class Telling(Box):
        async def run(self, job: Job) -> Outcome:
            return replace(await super().run(job), stderr=f"my key is {job.env['OPENAI_API_KEY']}".encode())

    bus = MemoryBus()
    await attempted(Telling(), tmp_path, asked("g0a", "dev"), bus=bus)
    (envelope,) = await bus.traces("r1", "log", None)
    assert [*map(line_of, envelope.lines)] == [("stderr", "my key is [token]")]


async def test_an_attempt_counts_though_the_trace_has_no_room_for_what_its_program_said(tmp_path: Path):
    class Full(MemoryBus):
        async def trace(self, envelope: Envelope) -> None:
            if envelope.kind == "log":
                raise BusFull("stream SIA_TRACE takes no more")
            await super().trace(envelope)

    box = Box(outcome=replace(WELL, stdout=b"well"))
    ((logged,), _) = await attempted(box, tmp_path, asked("g0a", "dev"), bus=Full())
    assert isinstance(logged, ExecutionLogged)


async def test_of_a_program_that_says_nothing_nothing_is_written(tmp_path: Path):
    bus = MemoryBus()
    await attempted(Box(), tmp_path, asked("g0a", "dev"), bus=bus)
    assert await bus.traces("r1", "log", None) == []


def line_of(body: bytes) -> tuple[str, str]:
    line = msgspec.json.decode(body, type=LogLine)
    return line.stream, line.text
