"""The first versions: which of them an LLM agent's replies become, and what stands in their place where none can."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from given import recorded
from story import started
from writing import Answer, Scripted, gateway_that_says, registered_words, said, writing_room, wrote

from sia_events.agents.agentic import Agentic
from sia_events.agents.candidates import NoBackend
from sia_events.agents.client import BudgetSpent
from sia_events.agents.direct import Direct
from sia_events.meta_svc.service import meta_svc
from sia_events.shared.events import AgentProposed, RunStarted, TaskRegistered
from sia_events.shared.ports import Blobs, Chat, Door, Ports
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.tree import load_tree

Words = tuple[TaskRegistered, Blobs]
BACKENDS = {"direct": Direct(), "agentic": Agentic()}


def asked(**settings: Any) -> RunStarted:
    return started(**{"backend": "direct", "meta_model": "scripted/writer", "candidates": 2, "seed": 7, **settings})


@pytest.fixture(scope="module")
def words() -> tuple[TaskRegistered, Blobs]:
    return registered_words()


async def proposals(ports: Ports, told: TaskRegistered, request: RunStarted) -> Sequence[AgentProposed]:
    records = recorded(told, request)
    events = await meta_svc.performs[RunStarted](Work(fold(records), records[-1], ports), request)
    assert all(isinstance(event, AgentProposed) for event in events)
    return events  # type: ignore[return-value]


def by_candidate(*answers: Answer) -> Scripted:
    """Each candidate gets its own answer, whichever asks first; its repair gets the same once more."""

    def answer(call: Chat) -> Answer:
        words = call.messages[1]["content"]
        return answers[next((n for n in range(len(answers)) if f"candidate {n + 1} of" in words), 0)]

    return Scripted(answer)


def agent(name: str) -> Answer:
    return wrote({"target_agent.py": f"print({name!r})\n"}, f"the {name} agent")


async def test_without_an_llm_the_reference_agent_is_the_first_version(tmp_path: Path, words: Words):
    told, blobs = words
    models = Scripted([])
    async with writing_room(tmp_path, models, BACKENDS, blobs=blobs) as ports:
        (first,) = await proposals(ports, told, started())
    assert (first.version, first.harness, first.written) == ("g0a", told.reference, None)
    assert not models.asked


async def test_an_llm_writes_as_many_first_versions_as_the_run_has_candidates(tmp_path: Path, words: Words):
    told, blobs = words
    models = by_candidate(agent("quick"), agent("careful"))
    async with writing_room(tmp_path, models, BACKENDS, blobs=blobs) as ports:
        (quick, careful) = await proposals(ports, told, asked())
        assert [(e.version, e.candidate, e.reason) for e in (quick, careful)] == [
            ("g0a", 0, "the quick agent"),
            ("g0b", 1, "the careful agent"),
        ]
        tree = await load_tree(ports.blobs, careful.harness)
        assert tree["target_agent.py"] == b"print('careful')\n"
        assert careful.weights.model == "local/smollm2-135m-instruct" and careful.written
        written = careful.written
        assert (written.backend, written.model) == ("direct", "scripted/writer")
        assert await ports.blobs.get(written.note) == b"the careful agent"
        prompt = (await ports.blobs.get(written.prompt)).decode()
        assert prompt == models.asked[-1].messages[1]["content"] or prompt == models.asked[0].messages[1]["content"]
        assert "Name the kind of thing" in prompt and "candidate 2 of 2" in prompt
        assert b"careful" in await ports.blobs.get(written.trajectory)
    assert len({call.seed for call in models.asked}) == 2


async def test_what_cannot_be_used_is_left_out_and_the_reason_is_recorded(tmp_path: Path, words: Words):
    told, blobs = words
    models = by_candidate(said("no code today"), agent("careful"), wrote({"../x": ""}))
    async with writing_room(tmp_path, models, BACKENDS, blobs=blobs) as ports:
        (only,) = await proposals(ports, told, asked(candidates=3))
        assert (only.version, only.candidate) == ("g0b", 1)
        assert only.reason.startswith("the careful agent (left out: g0a: ") and "no code" in only.reason
        assert "leads out of the harness" in only.reason
        kept = only.reason.partition("kept as ")[2][:64]
        assert b"no code today" in await ports.blobs.get(kept)


async def test_two_candidates_of_the_same_files_are_one(tmp_path: Path, words: Words):
    told, blobs = words
    async with writing_room(tmp_path, by_candidate(agent("twin"), agent("twin")), BACKENDS, blobs=blobs) as ports:
        (only,) = await proposals(ports, told, asked())
    assert only.version == "g0a" and "g0b: the same files as g0a" in only.reason


async def test_where_no_version_can_be_used_the_reference_agent_goes_in_their_place(tmp_path: Path, words: Words):
    told, blobs = words
    async with writing_room(
        tmp_path, by_candidate(said(""), said(None, refusal="No.")), BACKENDS, blobs=blobs
    ) as ports:
        (only,) = await proposals(ports, told, asked())
    assert (only.version, only.harness, only.written) == ("g0a", told.reference, None)
    assert (
        only.reason.startswith("no LLM version could be used: g0a: ") and "g0b: the model refused: No." in only.reason
    )
    assert only.reason.endswith("the reference agent goes in its place")


async def test_a_step_by_step_agent_finds_the_open_examples_and_no_answer_to_what_is_asked(
    tmp_path: Path, words: Words
):
    told, blobs = words
    look = said(None, ("read_file", {"path": "/data/train.jsonl"}), ("read_file", {"path": "/data/items.jsonl"}))
    write = said(None, ("write_file", {"path": "target_agent.py", "content": "x = 1\n"}), ("finish", {"note": "n"}))
    models = Scripted([look, write])
    async with writing_room(tmp_path, models, BACKENDS, blobs=blobs) as ports:
        (only,) = await proposals(ports, told, asked(backend="agentic", candidates=1))
    examples, items = (m["content"] for m in models.asked[1].messages if m["role"] == "tool")
    assert '"label"' in examples and '"label"' not in items
    assert only.written and only.written.backend == "agentic"


async def test_a_handler_that_runs_again_proposes_the_same_and_pays_for_nothing(tmp_path: Path, words: Words):
    told, blobs = words
    async with writing_room(tmp_path, by_candidate(agent("quick"), agent("careful")), BACKENDS, blobs=blobs) as ports:
        before = await proposals(ports, told, asked())
    silent = Scripted([])
    async with writing_room(tmp_path, silent, BACKENDS, like=ports) as later:
        after = await proposals(later, told, asked())
    assert after == before and not silent.asked


async def test_a_spent_budget_is_raised_and_nothing_is_proposed(tmp_path: Path, words: Words):
    told, blobs = words
    async with gateway_that_says(
        tmp_path, 402, "the run's budget of 3 calls is used up", BACKENDS, blobs=blobs
    ) as ports:
        with pytest.raises(BudgetSpent, match="budget of 3 calls"):
            await proposals(ports, told, asked())


async def test_a_backend_that_is_not_installed_is_named_before_anything_is_asked(tmp_path: Path, words: Words):
    told, blobs = words
    models = Scripted([])
    async with writing_room(tmp_path, models, BACKENDS, blobs=blobs) as ports:
        with pytest.raises(NoBackend, match="'openhands' is not installed here; there are: agentic, direct"):
            await proposals(ports, told, asked(backend="openhands"))
    assert not models.asked


class KeepingDoor:
    """The `Door` port, which keeps the tokens that it gave out."""

    def __init__(self, door: Door) -> None:
        self.door, self.tokens = door, list[str]()

    @property
    def socket(self) -> Path:
        return self.door.socket

    def token(self, claims: Mapping[str, Any]) -> str:
        self.tokens.append(self.door.token(claims))
        return self.tokens[-1]


async def test_no_token_of_a_call_is_in_what_is_recorded(tmp_path: Path, words: Words):
    told, blobs = words
    async with writing_room(tmp_path, by_candidate(agent("quick"), agent("careful")), BACKENDS, blobs=blobs) as ports:
        door = KeepingDoor(ports.door)
        events = await proposals(replace(ports, door=door), told, asked())
        envelopes = await ports.bus.traces("r1", "model_call", None)
        kept = [
            await blobs.get(digest) for e in events if e.written for digest in (e.written.prompt, e.written.trajectory)
        ]
    lines = [line for each in envelopes for line in each.lines]
    assert len(door.tokens) == 2 and len(lines) == 2 and len(kept) == 4
    written = "".join(event.model_dump_json() for event in events).encode() + b"".join([*lines, *kept])
    assert not any(token.encode() in written for token in door.tokens)
