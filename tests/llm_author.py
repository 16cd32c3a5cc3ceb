"""Scripts of a model provider for whole runs: who writes agents, answers their items, and who does it badly."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from command import AGENT
from loopback import Fault, Loopback, Wire
from loopback_wires import Reply, ToolCall

from sia_events.shared.calls import ModelCall

KEY = "sk-marker-5e1f0c77-nobody-may-see-this"
ROLES = ("--target-model", "openai/answers", "--meta-model", "openai/writes")
SMALL = (*ROLES, "--generations", "1", "--candidates", "1")
# What the target model answers to an item is of use only where it is told to use one word.
HINT = "One word: "
PLAIN = "# written by a model\n" + AGENT
BETTER = AGENT.replace('item["text"]', f'"{HINT}" + item["text"]')
LOOK_AROUND = "env; cat /proc/*/environ /proc/*/cmdline | tr '\\0' '\\n'; date +%N"


@dataclass
class Author:
    """Writes a first agent that is never right, then one that is right on three of four items, and answers for both.

    `asked` are the requests in the order of their replies. Each reply tells its number in it, from 1, as its count of
    prompt tokens: a recorded reply is found again among the requests. `agents` are the first agent and the better one.
    """

    agents: tuple[str, str] = (PLAIN, BETTER)
    asked: list[Mapping[str, Any]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def __call__(self, wire: Wire, body: Mapping[str, Any]) -> Reply | Fault:
        with self.lock:
            self.asked.append(body)
            number = len(self.asked)
        text, tools = self._said(body)
        return Reply(text, tools, prompt_tokens=number, completion_tokens=1)

    def _said(self, body: Mapping[str, Any]) -> tuple[str, Sequence[ToolCall]]:
        words = prompt(body)
        if "# Write a first agent" in words:
            return written(body, self.agents[0], "asks about every item")
        if "# Change the harness" in words:
            return written(body, self.agents[1], "asks for one word")
        return ("sweet" if HINT in words else "hm"), ()


def prompt(body: Mapping[str, Any]) -> str:
    """All that a request's messages say."""
    return "\n".join(str(message.get("content")) for message in body["messages"])


def written(body: Mapping[str, Any], agent: str, note: str) -> tuple[str, Sequence[ToolCall]]:
    """An agent as one structured reply; where there are tools, step by step, with a look around the box."""
    if not body.get("tools"):
        return json.dumps({"note": note, "files": {"target_agent.py": agent}}), ()
    steps = (
        ToolCall("list_files"),
        ToolCall("write_file", {"path": "target_agent.py", "content": agent}),
        ToolCall("run", {"command": LOOK_AROUND}),
        ToolCall("finish", {"note": note}),
    )
    done = sum(message["role"] == "assistant" for message in body["messages"])
    return "", (steps[min(done, 3)],)


def reached(provider: Loopback) -> dict[str, str]:
    """The variables under which `sia` asks this provider for every model named openai/…"""
    return {"SIA_PROVIDER_OPENAI_BASE_URL": provider.openai, "OPENAI_API_KEY": KEY}


def assert_paid_once(author: Author, calls: Sequence[ModelCall]) -> None:
    """No request was made again once its reply was recorded, and no call is recorded twice."""
    latest = {json.dumps(body, sort_keys=True): number for number, body in enumerate(author.asked, start=1)}
    for call in calls:
        body = json.dumps(author.asked[call.prompt_tokens - 1], sort_keys=True)
        assert latest[body] == call.prompt_tokens, f"{call.attempt} was recorded and asked again: {body[:300]}"
    assert len({(call.attempt, call.digest, call.n) for call in calls}) == len(calls)
    assert len({call.prompt_tokens for call in calls}) == len(calls)
