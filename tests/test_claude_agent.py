"""The backend `claude`: the Claude Agent SDK's real program in a box, a real gateway, and a scripted Anthropic."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from gateway_house import KEY, table
from loopback import Fault, Loopback, Reply, ToolCall, Wire
from writing import AGENT, SECRET, brief, serving

from sia_events.infra.claude_agent import LIMITS, ClaudeAgent, ClaudeMissing, find_program
from sia_events.infra.claude_said import read_said
from sia_events.infra.memory import MemoryBlobs, MemoryBus, SystemTime
from sia_events.infra.providers.finder import Providers
from sia_events.infra.sandbox import Bubblewrap, UnsafeProcess, check
from sia_events.model_gateway import asking
from sia_events.model_gateway.budget import OverBudget, Reservation
from sia_events.model_gateway.door import gateway
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.ledger import Ledger, Unlimited
from sia_events.model_gateway.token import TokenDoor
from sia_events.shared.calls import ModelCall, decode_call
from sia_events.shared.ports import BudgetSpent, ModelAway, Ports, ProviderAway, Sandbox, WritingFailed

CLAUDE = find_program()
MODEL = "anthropic/claude-opus-5-5"
HARNESS = "/work/harness"

boxed = pytest.mark.skipif(bool(check()), reason=check() or "")
installed = pytest.mark.skipif(CLAUDE is None, reason="the Claude Agent SDK is not installed")


def said(text: str, *calls: tuple[str, Mapping[str, Any]]) -> Reply:
    return Reply(text, [ToolCall(name, given, f"toolu_{n}") for n, (name, given) in enumerate(calls)])


def bash(command: str) -> Reply:
    return said("I run something.", ("Bash", {"command": command, "description": "a command"}))


def write(name: str, content: str) -> Reply:
    return said("I write.", ("Write", {"file_path": f"{HARNESS}/{name}", "content": content}))


DONE = Reply("a library was added")


@dataclass(frozen=True)
class Room:
    """Where harnesses are written, and the provider behind it."""

    ports: Ports
    provider: Loopback

    async def calls(self) -> list[ModelCall]:
        kept = await self.ports.bus.traces("r1", "model_call", "meta.g0a")
        return [decode_call(line) for each in kept for line in each.lines]


@asynccontextmanager
async def room(
    home: Path,
    script: Sequence[Reply | Fault],
    bus: MemoryBus | None = None,
    box: Sandbox | None = None,
    ledger: Ledger | None = None,
) -> AsyncIterator[Room]:
    """A gateway on a socket; the provider gives the replies of `script`, and its last one for ever."""
    replies = iter(script)
    blobs = MemoryBlobs()
    bus = bus or MemoryBus(blobs)

    def answer(wire: Wire, body: Mapping[str, Any]) -> Reply | Fault:
        return next(replies, script[-1])

    async with AsyncExitStack() as stack:
        provider = await stack.enter_async_context(Loopback(answer))
        providers = Providers(table(provider), {"KEY": KEY})
        stack.push_async_callback(providers.aclose)
        journal = Journal(bus)
        stack.push_async_callback(journal.close)
        door = TokenDoor(home / f"gateway-{provider.port}.sock", SECRET)
        calls = asking.Calls(journal, providers.find, SystemTime(), ledger or Unlimited(), patience=0.0)
        app = gateway(calls, SECRET, SystemTime())
        await stack.enter_async_context(serving(app, door.socket))
        yield Room(Ports(bus, blobs, box or Bubblewrap(), SystemTime(), door, home), provider)


def lines(trajectory: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in trajectory.splitlines()]


def results(trajectory: bytes) -> list[str]:
    """What the agent's tools gave back, in the order they were called: those of one reply run side by side."""
    found: list[str] = []
    asked: list[str] = []
    given: dict[str, str] = {}
    for line in lines(trajectory):
        for block in line["content"] if isinstance(line["content"], list) else ():
            if block["type"] == "tool_use":
                asked.append(block["id"])
            elif block["type"] == "tool_result":
                given[block["tool_use_id"]] = str(block["content"])
        if asked and len(given) == len(asked):
            found += [given[each] for each in asked]
            asked, given = [], {}
    return found


@installed
@boxed
async def test_it_reads_writes_edits_searches_and_runs_in_the_box(tmp_path: Path):
    script = [
        said(
            "I look around.",
            ("Glob", {"pattern": "*.txt"}),
            ("Grep", {"pattern": "agent"}),
            ("Read", {"file_path": "/data/items.jsonl"}),
            ("Read", {"file_path": f"{HARNESS}/notes.txt"}),
        ),
        write("lib.py", "WORD = 'new'\n"),
        said("", ("Edit", {"file_path": f"{HARNESS}/notes.txt", "old_string": "plain", "new_string": "fancy"})),
        bash("python -c 'import lib; print(lib.WORD)'; python -m py_compile lib.py; env; ls /root /home; cat $DATA/*"),
        DONE,
    ]
    async with room(tmp_path, script) as place:
        writing = await ClaudeAgent(CLAUDE).write(brief(model=MODEL), place.ports)
        requests, calls = place.provider.requests, await place.calls()
    assert writing.files == {"target_agent.py": AGENT, "notes.txt": b"fancy\n", "lib.py": b"WORD = 'new'\n"}
    assert writing.note == "a library was added"
    glob, grep, data, _, _, _, ran = results(writing.trajectory)
    assert "notes.txt" in glob and "target_agent.py" in grep and "a question" in data
    assert "new" in ran and "a question" in ran and "HOME=/work/home" in ran
    assert KEY not in ran and str(tmp_path) not in ran
    assert [line["role"] for line in lines(writing.trajectory)][:3] == ["system", "user", "assistant"]
    assert lines(writing.trajectory)[1]["content"] == brief().prompt
    assert {tool["name"] for tool in requests[0].body["tools"]} == {"Bash", "Edit", "Glob", "Grep", "Read", "Write"}
    assert any(KEY in value for value in requests[0].headers.values()) and len(requests) == len(calls) == 5
    assert {(call.role, call.version, call.model) for call in calls} == {("meta", "g0a", MODEL)}
    assert not list((tmp_path / "tmp").iterdir())


@installed
async def test_it_works_where_there_is_no_box(tmp_path: Path):
    script = [bash("echo 'x = 1' > lib.py && cat $DATA/items.jsonl"), DONE]
    async with room(tmp_path, script, box=UnsafeProcess()) as place:
        writing = await ClaudeAgent(CLAUDE).write(brief(model=MODEL), place.ports)
    assert writing.files == {**brief().files, "lib.py": b"x = 1\n"}
    assert "a question" in results(writing.trajectory)[0]


@installed
@boxed
async def test_a_prompt_longer_than_an_argument_may_be_arrives_whole(tmp_path: Path):
    prompt = "".join(f"line {n} of the task\n" for n in range(12_000)) + "half a character: \ud800"
    async with room(tmp_path, [write("lib.py", ""), DONE]) as place:
        await ClaudeAgent(CLAUDE).write(brief(model=MODEL, prompt=prompt), place.ports)
        sent = json.dumps(place.provider.requests[0].body["messages"])
    assert len(prompt) > 131_072 and "line 11999 of the task" in sent and "line 6000 of the task" in sent


@installed
@boxed
async def test_at_its_limit_of_turns_the_work_is_taken_as_it_stands(tmp_path: Path):
    async with room(tmp_path, [write("lib.py", "x = 1\n"), bash("ls")]) as place:
        writing = await ClaudeAgent(CLAUDE).write(brief(model=MODEL, turns=2), place.ports)
        assert place.provider.count == 2
    assert writing.files["lib.py"] == b"x = 1\n" and "behind 2 turns" in writing.note


@installed
@boxed
async def test_a_model_that_refuses_or_says_nothing_is_told_apart_from_one_that_is_away(tmp_path: Path):
    async with room(tmp_path, [Fault("refusal")]) as place:
        with pytest.raises(WritingFailed, match="safeguards"):
            await ClaudeAgent(CLAUDE).write(brief(model=MODEL), place.ports)
    async with room(tmp_path, [write("lib.py", ""), Reply("")]) as place:
        writing = await ClaudeAgent(CLAUDE).write(brief(model=MODEL, key="meta.g0b"), place.ports)
    assert writing.note == "no note was given"


@installed
@boxed
async def test_a_later_start_pays_for_no_call_again(tmp_path: Path):
    """The third call fails at first, as if everything had died there."""
    script = [write("lib.py", "x = 1\n"), bash("ls"), Fault("bad_request", message="cut short here")]
    async with room(tmp_path, script) as place:
        with pytest.raises(WritingFailed, match="cut short here"):
            await ClaudeAgent(CLAUDE).write(brief(model=MODEL), place.ports)
        bus = place.ports.bus
        assert isinstance(bus, MemoryBus)
    async with room(tmp_path, [DONE], bus=bus) as place:
        writing = await ClaudeAgent(CLAUDE).write(brief(model=MODEL), place.ports)
        assert place.provider.count == 1
        assert len([call for call in await place.calls() if call.reply]) == 3
    assert writing.files == {**brief().files, "lib.py": b"x = 1\n"} and writing.note == DONE.text


class Calls(Unlimited):
    """The `Ledger` of a gateway that lets so many calls be made."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed

    async def reserve(self, run: str, model: str, prompt_tokens: int, max_tokens: int) -> Reservation:
        if self.allowed == 0:
            raise OverBudget("calls", 1, 1)
        self.allowed -= 1
        return await super().reserve(run, model, prompt_tokens, max_tokens)


@installed
@boxed
async def test_a_spent_budget_is_an_error_of_its_own(tmp_path: Path):
    async with room(tmp_path, [write("lib.py", ""), DONE], ledger=Calls(1)) as place:
        with pytest.raises(BudgetSpent, match="budget of 1 calls"):
            await ClaudeAgent(CLAUDE).write(brief(model=MODEL), place.ports)
        assert place.provider.count == 1


@installed
@boxed
@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("overloaded", ProviderAway),
        ("unauthorised", ProviderAway),
        ("garbage", ModelAway),
        ("unknown_model", ModelAway),
    ],
)
async def test_a_provider_that_does_not_answer_is_no_fault_of_the_agents(
    tmp_path: Path, kind: Any, fault: type[Exception]
):
    async with room(tmp_path, [write("lib.py", ""), Fault(kind)]) as place:
        with pytest.raises(fault, match=f"{MODEL} did not answer meta.g0a") as caught:
            await ClaudeAgent(CLAUDE).write(brief(model=MODEL), place.ports)
    assert KEY not in str(caught.value)


@installed
@boxed
async def test_a_gateway_that_is_not_there_is_ours_to_try_again(tmp_path: Path):
    async with room(tmp_path, [DONE]) as place:
        pass
    place.ports.door.socket.touch()
    with pytest.raises(ModelAway, match="the gateway lost"):
        await ClaudeAgent(CLAUDE).write(brief(model=MODEL), place.ports)


@installed
@boxed
async def test_another_model_than_its_own_is_refused_by_the_gateway(tmp_path: Path):
    ask = (
        'curl -s $ANTHROPIC_BASE_URL/v1/messages -H "x-api-key: $ANTHROPIC_API_KEY" -d \'{"model": "dear", '
        '"max_tokens": 1, "messages": []}\'; curl -sm 3 http://1.1.1.1 || echo "no way out"; echo > lib.py'
    )
    async with room(tmp_path, [bash(ask), DONE]) as place:
        writing = await ClaudeAgent(CLAUDE).write(brief(model=MODEL), place.ports)
        assert {request.body["model"] for request in place.provider.requests} == {"claude-opus-5-5"}
    (result,) = results(writing.trajectory)
    assert "may not use the model" in result and "no way out" in result


@installed
@boxed
async def test_what_grows_beyond_a_harness_is_refused_and_the_conversation_kept(tmp_path: Path):
    async with room(tmp_path, [bash("head -c 50000000 /dev/zero > zeros; ln -s /etc/passwd link"), DONE]) as place:
        with pytest.raises(WritingFailed, match="8,000,000 bytes, at zeros") as caught:
            await ClaudeAgent(CLAUDE).write(brief(model=MODEL), place.ports)
    assert b"head -c 50000000" in caught.value.trajectory


@installed
@boxed
async def test_an_agent_without_end_is_ended_and_the_conversation_kept(tmp_path: Path):
    limits = replace(LIMITS, wall_s=4.0)
    async with room(tmp_path, [write("lib.py", ""), Fault("hang")]) as place:
        with pytest.raises(WritingFailed, match="ended at its timeout limit") as caught:
            await ClaudeAgent(CLAUDE, limits).write(brief(model=MODEL), place.ports)
    assert b"lib.py" in caught.value.trajectory


async def test_without_its_program_nothing_is_asked(tmp_path: Path):
    async with room(tmp_path, [DONE]) as place:
        with pytest.raises(ClaudeMissing, match=r"pip install 'sia-events\[claude\]'.*Nothing was asked"):
            await ClaudeAgent(None).write(brief(model=MODEL), place.ports)
        assert place.provider.count == 0


RESULT = b'{"type": "result", "subtype": "success", "is_error": false, "result": " the note\\n"}\n'
MESSAGE = b'{"type": "assistant", "message": {"role": "assistant", "content": [], "id": "m"}, "uuid": "u"}\n'


def test_lines_that_are_no_messages_are_passed_over():
    found = read_said(b'noise\n[1]\n{"type": "new"}\n' + MESSAGE + RESULT + b'{"type": "assist', "rules", "prompt")
    assert (found.begun, found.end, found.note, found.error) == (True, "done", "the note", "")
    assert lines(found.trajectory) == [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "prompt"},
        {"role": "assistant", "content": []},
    ]


@pytest.mark.parametrize(
    ("result", "end", "error"),
    [
        ({"subtype": "error_max_turns", "is_error": True}, "turns", "error_max_turns"),
        ({"subtype": "success", "is_error": True, "result": "API Error: 400"}, None, "API Error: 400"),
        ({"subtype": "error_during_execution", "errors": ["a", "b"]}, None, "a; b"),
        ({"subtype": 3, "result": 4, "is_error": False, "errors": 5}, None, "3"),
    ],
)
def test_only_a_result_without_an_error_is_the_end(result: Mapping[str, Any], end: str | None, error: str):
    found = read_said(MESSAGE + json.dumps({"type": "result", **result}).encode(), "rules", "prompt")
    assert (found.begun, found.end, found.note, found.error) == (True, end, "", error)


@pytest.mark.parametrize(("output", "begun"), [(b"", False), (b"cannot start\n", False), (MESSAGE, True)])
def test_output_without_a_result_has_no_end(output: bytes, begun: bool):
    found = read_said(output, "rules", "prompt")
    assert (found.begun, found.end, found.error) == (begun, None, "")
