"""The backend `agentic`: a model in a loop of tools on a scratch copy of the harness, until it hands it in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from sia_events.agents.boxed import Steps, recorded_steps, run_command
from sia_events.agents.check import ENTRY, changed, problems
from sia_events.agents.client import Reply, asking
from sia_events.agents.structured import as_lines, refused
from sia_events.agents.tools import Finish, Run, Tool, ToolError, described, read_call, use
from sia_events.shared.ports import Brief, Ports, Writing, WritingFailed

GARBAGE = 3
CONTEXT = 400_000
NUDGE = "Nothing was done: call a tool. `finish` hands the harness in."
RULES = f"""\
You write the program of an agent. Its files, the harness, start from a copy of the ones that you are shown; work on the
copy with the tools. `{ENTRY}` is the program that is started; every .py file has to compile with Python 3.11. Hand the
harness in with `finish`. You have {{turns}} replies, and what you call in a reply is done in that order.
"""


@dataclass
class Desk:
    """The scratch copy as it stands: its files, how many commands were run on it, the note it was handed in with."""

    files: Mapping[str, bytes]
    commands: int = 0
    note: str = ""


@dataclass(frozen=True)
class Agentic:
    """The `Backend` port: it ends by `finish`, at its limit of turns, or behind GARBAGE replies that call nothing."""

    async def write(self, brief: Brief, ports: Ports) -> Writing:
        desk, garbage = Desk(brief.files), 0
        said: list[Mapping[str, Any]] = [
            {"role": "system", "content": RULES.format(turns=brief.turns)},
            {"role": "user", "content": brief.prompt},
        ]
        steps = await recorded_steps(brief, ports)
        try:
            async with asking(brief, ports) as ask:
                for turns_left in reversed(range(brief.turns)):
                    reply = await ask(_fitted(said), described())
                    if why := refused(reply):
                        raise WritingFailed(why)
                    said.append(_echo(reply))
                    asked = [_read(call) for call in reply.calls]
                    for call, tool in zip(reply.calls, asked, strict=True):
                        text = await _do(tool, desk, brief, ports, steps)
                        said.append({"role": "tool", "tool_call_id": str(call.get("id", "")), "content": text})
                        if desk.note:
                            return Writing(desk.files, desk.note, as_lines(said))
                    garbage = garbage + 1 if all(isinstance(tool, ToolError) for tool in asked) else 0
                    if garbage == GARBAGE:
                        raise WritingFailed(f"{GARBAGE} replies in a row called no tool that there is")
                    if hint := _hint(reply, turns_left):
                        said.append({"role": "user", "content": hint})
            return _at_the_limit(brief, desk.files, as_lines(said))
        except WritingFailed as failed:
            raise WritingFailed(str(failed), as_lines(said)) from failed


def _read(call: Mapping[str, Any]) -> Tool | ToolError:
    try:
        return read_call(*_named(call))
    except ToolError as error:
        return error


async def _do(tool: Tool | ToolError, desk: Desk, brief: Brief, ports: Ports, steps: Steps) -> str:
    """What a call comes to; the desk has what it changed."""
    try:
        match tool:
            case ToolError():
                return str(tool)
            case Run(command=command):
                desk.commands += 1
                desk.files, text = await run_command(brief, ports, steps, desk.commands, command, desk.files)
            case Finish(note=note):
                _require_harness(brief.files, desk.files)
                desk.note, text = note or "no note was given", "handed in"
            case _:
                desk.files, text = use(tool, desk.files, brief.data)
    except ToolError as error:
        return str(error)
    return text


def _at_the_limit(brief: Brief, files: Mapping[str, bytes], trajectory: bytes) -> Writing:
    """What stands there when the turns are used up; it was paid for, and dev and gate judge it like any other."""
    try:
        _require_harness(brief.files, files)
    except ToolError as error:
        raise WritingFailed(f"its {brief.turns} turns were used up, and {error}") from error
    return Writing(files, f"not handed in: taken as it stood behind {brief.turns} turns", trajectory)


def _require_harness(before: Mapping[str, bytes], files: Mapping[str, bytes]) -> None:
    if found := problems(files):
        raise ToolError("the harness cannot be handed in:\n" + "\n".join(f"- {problem}" for problem in found))
    if not changed(before, files):
        raise ToolError("the harness cannot be handed in: it is the one there was")


def _named(call: Mapping[str, Any]) -> tuple[str, str]:
    function = call.get("function") or {}
    return str(function.get("name", "")), str(function.get("arguments", ""))


def _echo(reply: Reply) -> Mapping[str, Any]:
    """The reply as a message that providers take back: none of them takes arguments that are no JSON object."""
    calls = []
    for call in reply.calls:
        name, arguments = _named(call)
        try:
            msgspec.json.decode(arguments, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
            arguments = "{}"
        calls.append({**call, "function": {"name": name or "unnamed", "arguments": arguments}})
    return {"role": "assistant", "content": reply.text or None, **({"tool_calls": calls} if calls else {})}


def _hint(reply: Reply, turns_left: int) -> str:
    said = [] if reply.calls else [NUDGE]
    if reply.finish == "length":
        said.append("Your reply was cut off at its limit of tokens: write long files in parts.")
    if turns_left == 1:
        said.append("This is your last reply: hand the harness in.")
    return " ".join(said)


def _fitted(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The conversation with the oldest results of tools left out, and said so, where it grows too long for a model."""
    sizes = [len(message["content"] or "") + len(str(message.get("tool_calls", ""))) for message in messages]
    over = sum(sizes) - CONTEXT
    fitted = list(messages)
    for place, message in enumerate(messages):
        if over <= 0:
            break
        if message["role"] == "tool":
            left_out = f"[{sizes[place]:,} characters of this older result are left out; call the tool again]"
            fitted[place] = {**message, "content": left_out}
            over -= sizes[place] - len(left_out)
    return fitted
