"""The backends `direct` and `agentic`, through a real gateway: good replies, every kind of bad one, and starts anew."""

import json
from pathlib import Path
from typing import Any

import pytest
from writing import AGENT, Answer, Scripted, brief, gateway_that_says, said, writing_room, wrote

from sia_events.agents.agentic import Agentic
from sia_events.agents.client import BudgetSpent, ModelAway
from sia_events.agents.direct import Direct
from sia_events.infra.sandbox import Bubblewrap, UnsafeProcess, check
from sia_events.shared.calls import ModelCall, decode_call
from sia_events.shared.ports import Job, ModelFailed, Outcome, Ports, ProviderAway, Sandbox, Writing, WritingFailed

BETTER = "print('a better agent')\n"


async def written(
    home: Path, backend: Direct | Agentic, script: list[Answer], **changes: Any
) -> tuple[Writing, Scripted]:
    models = Scripted(script)
    async with writing_room(home, models) as ports:
        return await backend.write(brief(**changes), ports), models


async def failed(
    home: Path, backend: Direct | Agentic, script: list[Answer], **changes: Any
) -> tuple[str, bytes, Scripted]:
    """What is said of a brief from which nothing came, and what is kept of it."""
    models = Scripted(script)
    async with writing_room(home, models) as ports:
        with pytest.raises(WritingFailed) as caught:
            await backend.write(brief(**changes), ports)
    return str(caught.value), caught.value.trajectory, models


async def calls(ports: Ports, key: str = "meta.g0a") -> list[ModelCall]:
    envelopes = await ports.bus.traces("r1", "model_call", key)
    return [decode_call(line) for each in envelopes for line in each.lines]


async def test_direct_writes_what_one_reply_says(tmp_path: Path):
    writing, models = await written(tmp_path, Direct(), [wrote({"target_agent.py": BETTER}, delete=["notes.txt"])])
    assert writing.files == {"target_agent.py": BETTER.encode()} and writing.note == "a note"
    assert [m["role"] for m in models.asked[0].messages] == ["system", "user"]
    assert models.asked[0].messages[1]["content"] == brief().prompt
    assert [json.loads(line)["role"] for line in writing.trajectory.splitlines()] == ["system", "user", "assistant"]


async def test_a_call_is_recorded_under_the_brief_with_its_role(tmp_path: Path):
    async with writing_room(tmp_path, Scripted([wrote({"target_agent.py": BETTER})])) as ports:
        await Direct().write(brief(), ports)
        (call,) = await calls(ports)
    assert (call.attempt, call.version, call.role, call.model) == ("meta.g0a", "g0a", "meta", "scripted/writer")
    assert (call.prompt_tokens, call.completion_tokens) == (10, 5)


async def test_direct_shows_the_model_what_is_wrong_and_takes_the_repair(tmp_path: Path):
    script = [wrote({"target_agent.py": "def f(:"}), wrote({"target_agent.py": BETTER}, "mended")]
    writing, models = await written(tmp_path, Direct(), script)
    assert writing.files["target_agent.py"] == BETTER.encode() and writing.note == "mended"
    complaint = models.asked[1].messages[-1]["content"]
    assert "target_agent.py does not compile: line 1" in complaint
    assert "def f(:" in models.asked[1].messages[-2]["content"]


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (said("I would rather talk."), "no code"),
        (said(""), "the reply was empty"),
        (said(None), "the reply was empty"),
        (said('{"files": {"target_agent.py": "x', finish="length"), "cut off at its limit of tokens"),
        (wrote({"target_agent.py": "def f(:"}), "target_agent.py does not compile"),
        (wrote({"../../home/agent.py": BETTER}), "leads out of the harness"),
        (wrote({"/etc/cron.d/agent": BETTER}), "leads out of the harness"),
        (wrote({"big.txt": "x" * 2_500_000}), "big.txt has 2,500,000 bytes"),
        (wrote({}, delete=["target_agent.py"]), "target_agent.py is missing"),
        (wrote({"target_agent.py": AGENT.decode()}), "it changes nothing"),
        (said('{"files": 3}'), "not of the form asked for"),
    ],
    ids=str,
)
async def test_direct_gives_up_behind_one_repair_and_says_why(tmp_path: Path, reply: Answer, why: str):
    message, trajectory, models = await failed(tmp_path, Direct(), [reply, reply, reply])
    assert why in message and "its repair" in message
    assert len(models.asked) == 2
    assert len(trajectory.splitlines()) == 5


@pytest.mark.parametrize(
    "reply", [said(None, refusal="I will not."), said("", finish="content_filter")], ids=["refusal", "filter"]
)
@pytest.mark.parametrize("backend", [Direct(), Agentic()], ids=["direct", "agentic"])
async def test_a_refusal_is_not_asked_again(tmp_path: Path, backend: Direct | Agentic, reply: Answer):
    message, trajectory, models = await failed(tmp_path, backend, [reply])
    assert "refused" in message and len(models.asked) == 1 and trajectory


async def test_a_huge_reply_is_not_shown_whole_to_its_author_again(tmp_path: Path):
    _, _, models = await failed(tmp_path, Direct(), [said("x" * 500_000)] * 2)
    shown = models.asked[1].messages[-2]["content"]
    assert len(shown) < 110_000 and "400,000 more characters are left out" in shown


@pytest.mark.parametrize("backend", [Direct(), Agentic()], ids=["direct", "agentic"])
async def test_a_request_that_the_provider_refuses_is_the_end_of_the_brief(tmp_path: Path, backend: Direct | Agentic):
    message, _, models = await failed(tmp_path, backend, [ModelFailed(400, "the prompt is too long", "refused")])
    assert "the prompt is too long" in message and "400" in message and len(models.asked) == 1


@pytest.mark.parametrize(
    "fault", [ModelFailed(404, "no such model", "unknown_model"), ModelFailed(401, "no key", "no_key")]
)
async def test_a_model_that_is_not_set_up_is_no_fault_of_the_agents(tmp_path: Path, fault: ModelFailed):
    async with writing_room(tmp_path, Scripted([fault])) as ports:
        with pytest.raises((ModelAway, ProviderAway), match=r"no such model|no key"):
            await Direct().write(brief(), ports)


@pytest.mark.parametrize("box", [Bubblewrap(), UnsafeProcess()], ids=["bubblewrap", "process"])
async def test_agentic_reads_writes_edits_runs_and_hands_in(tmp_path: Path, box: Sandbox):
    if isinstance(box, Bubblewrap) and (why := check()):
        pytest.skip(why)
    script = [
        said(None, ("list_files", {}), ("read_file", {"path": "/data/items.jsonl"})),
        said("I see.", ("write_file", {"path": "lib.py", "content": "WORD = 'old'\n"})),
        said(
            None, ("edit_file", {"path": "lib.py", "old": "old", "new": "new"}), ("delete_file", {"path": "notes.txt"})
        ),
        said(None, ("run", {"command": "python -c 'import lib; print(lib.WORD)' && ls $DATA && echo x > made.txt"})),
        said(None, ("finish", {"note": "a library"})),
    ]
    models = Scripted(script)
    async with writing_room(tmp_path, models, sandbox=box) as ports:
        writing = await Agentic().write(brief(), ports)
    assert writing.files == {"target_agent.py": AGENT, "lib.py": b"WORD = 'new'\n", "made.txt": b"x\n"}
    assert writing.note == "a library"
    results = [m["content"] for m in models.asked[-1].messages if m["role"] == "tool"]
    assert "/data/items.jsonl" in results[0] and "a question" in results[1]
    assert "lib.py is written, 13 bytes" in results[2]
    assert "new\nitems.jsonl" in results[5] and "[exit status 0]" in results[5]
    assert {tool["function"]["name"] for tool in models.asked[0].tools} >= {"run", "finish"}
    last = json.loads(writing.trajectory.splitlines()[-1])
    assert last == {"role": "tool", "tool_call_id": "call_0", "content": "handed in"}
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (("read_file", {"path": "gone.py"}), "there is no file 'gone.py'"),
        (("write_file", {"path": "../up.py", "content": ""}), "leads out of the harness"),
        (("write_file", {"path": "target_agent.py", "content": "def f(:"}), "target_agent.py does not compile"),
        (("edit_file", {"path": "notes.txt", "old": "absent", "new": ""}), "stands in notes.txt 0 times"),
        (("edit_file", {"path": "notes.txt", "old": "", "new": "x"}), "stands in notes.txt 0 times"),
        (("delete_file", {"path": "gone.py"}), "there is no file"),
        (("shell", {"command": "ls"}), "there is no tool 'shell'"),
        (("run", {"cmd": "ls"}), "not of its form"),
        (("run", "{not json"), "not of its form"),
        (("run", {"command": "exit 3"}), "[exit status 3]"),
        (("run", {"command": "yes | head -c 100000"}), "16,000 bytes of a stream is left out"),
        (
            ("run", {"command": "ln -s /etc/passwd link; head -c 9000000 /dev/zero > zeros"}),
            "The files are as they were",
        ),
        (("finish", {"note": "nothing"}), "it is the one there was"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_tools_error_is_told_to_the_model_which_goes_on(tmp_path: Path, call: tuple[str, Any], result: str):
    done = said(None, ("write_file", {"path": "target_agent.py", "content": BETTER}), ("finish", {"note": "n"}))
    writing, models = await written(tmp_path, Agentic(), [said(None, call), done])
    told = models.asked[1].messages[-1]
    assert told["role"] == "tool" and result in told["content"]
    assert writing.files["target_agent.py"] == BETTER.encode() and "link" not in writing.files
    echoed = models.asked[1].messages[-2]["tool_calls"][0]["function"]["arguments"]
    assert isinstance(json.loads(echoed), dict)


async def test_what_is_no_harness_is_not_handed_in(tmp_path: Path):
    script = [
        said(None, ("delete_file", {"path": "target_agent.py"}), ("finish", {"note": "done"})),
        said(None, ("write_file", {"path": "target_agent.py", "content": BETTER}), ("finish", {"note": "now"})),
    ]
    writing, models = await written(tmp_path, Agentic(), script)
    assert writing.note == "now"
    assert "target_agent.py is missing" in models.asked[1].messages[-1]["content"]


async def test_replies_that_call_nothing_are_nudged_twice_and_then_the_end(tmp_path: Path):
    message, trajectory, models = await failed(tmp_path, Agentic(), [said("hm"), said(""), said(None, ("x", "{}"))])
    assert "3 replies in a row called no tool" in message and b"hm" in trajectory
    assert "call a tool" in models.asked[1].messages[-1]["content"]


async def test_at_its_limit_of_turns_an_agents_work_is_taken_as_it_stands_if_it_is_a_harness(tmp_path: Path):
    write = said(None, ("write_file", {"path": "target_agent.py", "content": BETTER}))
    writing, models = await written(tmp_path, Agentic(), [write] * 3, turns=3)
    assert writing.files["target_agent.py"] == BETTER.encode() and "behind 3 turns" in writing.note
    assert "last reply" in models.asked[2].messages[-1]["content"]


async def test_at_its_limit_of_turns_an_agent_without_a_harness_has_failed(tmp_path: Path):
    message, _, models = await failed(tmp_path, Agentic(), [said(None, ("list_files", {}))] * 3, turns=3)
    assert "its 3 turns were used up" in message and len(models.asked) == 3


async def test_a_file_is_read_page_by_page(tmp_path: Path):
    pages = said(None, ("read_file", {"path": "long.txt"}), ("read_file", {"path": "long.txt", "offset": 16000}))
    done = said(None, ("write_file", {"path": "target_agent.py", "content": BETTER}), ("finish", {"note": "n"}))
    files = {"target_agent.py": AGENT, "long.txt": b"a" * 16_000 + b"b" * 10}
    _, models = await written(tmp_path, Agentic(), [pages, done], files=files)
    first, second = (m["content"] for m in models.asked[1].messages if m["role"] == "tool")
    assert first.endswith("[10 more characters; go on at offset 16000]") and second == "b" * 10


async def test_a_conversation_that_grows_too_long_loses_its_oldest_results_and_says_so(tmp_path: Path):
    read = said(None, *[("read_file", {"path": "long.txt"})] * 10)
    done = said(None, ("write_file", {"path": "target_agent.py", "content": BETTER}), ("finish", {"note": "n"}))
    files = {"target_agent.py": AGENT, "long.txt": b"a" * 20_000}
    writing, models = await written(tmp_path, Agentic(), [read] * 4 + [done], files=files)
    results = [m["content"] for m in models.asked[-1].messages if m["role"] == "tool"]
    assert "are left out; call the tool again" in results[0] and results[-1].startswith("aaa")
    assert sum(map(len, results)) < 400_000 < len(writing.trajectory)


@pytest.mark.parametrize("backend", [Direct(), Agentic()], ids=["direct", "agentic"])
async def test_a_spent_budget_is_an_error_of_its_own(tmp_path: Path, backend: Direct | Agentic):
    async with gateway_that_says(tmp_path, 402, "12 of 12 calls are used") as ports:
        with pytest.raises(BudgetSpent, match="12 of 12 calls"):
            await backend.write(brief(), ports)


@pytest.mark.parametrize(
    ("status", "error"),
    [(429, ProviderAway), (500, ModelAway), (502, ModelAway), (503, ProviderAway), (504, ProviderAway)],
)
async def test_what_the_gateway_has_waited_for_is_told_from_what_is_ours_to_try_again(
    tmp_path: Path, status: int, error: type[Exception]
):
    async with gateway_that_says(tmp_path, status, "overloaded") as ports:
        with pytest.raises(error, match="overloaded"):
            await Direct().write(brief(), ports)


async def test_a_gateway_that_is_not_there_is_ours_to_try_again(tmp_path: Path):
    async with writing_room(tmp_path, Scripted([])) as ports:
        pass
    with pytest.raises(ModelAway, match="the gateway lost a call"):
        await Direct().write(brief(), ports)


class CountingBox:
    """The `Sandbox` port: every run says something new, so that only a recorded one can be told twice alike."""

    def __init__(self) -> None:
        self.runs = 0

    async def run(self, job: Job) -> Outcome:
        self.runs += 1
        assert job.socket is None and job.limits.wall_s == 60
        (job.work / "made.txt").write_text(f"run {self.runs}")
        return Outcome("ok", 0, f"run {self.runs}".encode(), b"", False, 0.1)


async def test_a_later_start_pays_for_no_call_again_and_runs_no_command_again(tmp_path: Path):
    """The third call fails at first, as if the process had died there."""
    box, turns = (
        CountingBox(),
        [
            said(None, ("run", {"command": "date"})),
            said(None, ("run", {"command": "date"}), ("write_file", {"path": "a.txt", "content": "a"})),
            said(None, ("finish", {"note": "n"})),
        ],
    )
    first = Scripted([*turns[:2], ModelFailed(400, "cut short here")])
    async with writing_room(tmp_path, first, sandbox=box) as ports:
        with pytest.raises(WritingFailed, match="cut short here"):
            await Agentic().write(brief(), ports)
    assert box.runs == 2
    second = Scripted([turns[2]])
    async with writing_room(tmp_path, second, sandbox=box, like=ports) as later:
        writing = await Agentic().write(brief(), later)
        recorded = await calls(later)
    assert (len(second.asked), box.runs) == (1, 2)
    assert writing.files == {**brief().files, "made.txt": b"run 2", "a.txt": b"a"}
    assert len([call for call in recorded if call.reply]) == 3


async def test_two_briefs_of_the_same_words_are_two_conversations(tmp_path: Path):
    models = Scripted([wrote({"target_agent.py": BETTER}), wrote({"target_agent.py": BETTER + "# other"})])
    async with writing_room(tmp_path, models) as ports:
        one = await Direct().write(brief(), ports)
        other = await Direct().write(brief(key="meta.g0b"), ports)
    assert one.files != other.files and len(models.asked) == 2
