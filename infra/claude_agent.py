"""The backend `claude`: the Claude Agent SDK's own program, in a box with a scratch copy of the harness."""

import asyncio
import hashlib
import importlib.util
import json
import secrets
import shutil
import tempfile
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from uuid import uuid5

from sia_events.infra.claude_said import Said, read_said
from sia_events.shared.calls import AWAY, ModelCall, decode_call
from sia_events.shared.ports import (
    Brief,
    BudgetSpent,
    Job,
    Limits,
    ModelAway,
    Outcome,
    Ports,
    ProviderAway,
    Writing,
    WritingFailed,
)
from sia_events.shared.record import NAMESPACE
from sia_events.shared.tree import TreeRefused, read_tree, remove_tree, write_tree

TOOLS = "Read,Write,Edit,Glob,Grep,Bash"
# The program itself takes some 200 MB and ten threads, which count as processes; the rest is for what it runs.
LIMITS = Limits(3600.0, 1800.0, memory_mb=2048, processes=256, file_mb=256, open_files=4096, output_bytes=64_000_000)
# What a harness may have.
MAX_FILES, MAX_TREE = 200, 8_000_000
PROGRAM, PROMPT, DATA, HARNESS, HOME = "/opt/claude", "/brief/prompt", "/data", "/work/harness", "/work/home"
# One argument takes 128 KiB at most (execve(2)), so the prompt comes on the standard input.
START = 'cd "$1" && shift && exec "$@" < "$PROMPT"'
QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_AUTOUPDATER": "1",
    # Two starts of one brief have to ask alike, and not every provider takes what only Anthropic's own tries out.
    "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
    "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1",
    "CLAUDE_CODE_MAX_TOOL_USE_CONCURRENCY": "1",
    # The gateway is patient already, and a second way of asking would be another call.
    "CLAUDE_CODE_MAX_RETRIES": "2",
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
    # It is over when it has said its last word.
    "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
    # The gateway sets money aside for the longest reply there may be, and takes no request for more than 65,536.
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "32000",
    "API_TIMEOUT_MS": str(int(LIMITS.wall_s * 1000)),
}
SETTINGS = {"attribution": {"commit": "", "pr": ""}}
RULES = """\
You write the program of an agent. Its files, the harness, are in the current folder: change them there. \
`target_agent.py` is the program that is started; every .py file has to compile with Python 3.11. All that is in the \
folder when you are done is the new harness, so leave nothing else there; /tmp is for scratch. Public data is in \
$DATA, which is /data. `python` is Python 3.11 with its standard library; there is no network. Nobody answers \
questions. When the harness is done, end with a short note and no tool call: what you changed, why, and what you \
expect of it.
"""
MISSING = """\
the Claude Agent SDK is not installed here, or came without its program: `pip install 'sia-events[claude]'`. Nothing \
was asked or paid for."""


class ClaudeMissing(Exception):
    """The backend was asked for and its program is not installed."""


class ClaudeAway(Exception):
    """The program did not start."""


@dataclass(frozen=True)
class ClaudeAgent:
    """The `Backend` port. Turns are the program's own count; when they are used up the work is taken as it stands.

    `program` is what `find_program` found. A start anew makes the same requests, so that the journal answers them, as
    long as the commands' results and the day are the same: the program tells the model what day it is.
    """

    program: Path | None
    limits: Limits = LIMITS

    async def write(self, brief: Brief, ports: Ports) -> Writing:
        """As `Backend.write`; raises ClaudeMissing, ClaudeAway, ProviderAway and ModelAway besides."""
        if self.program is None:
            raise ClaudeMissing(MISSING)
        # No file and no record takes half a character, and a prompt may quote one.
        brief = replace(brief, prompt=brief.prompt.encode(errors="replace").decode())
        scratch = ports.home / "tmp"
        scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="claude-", dir=scratch))
        try:
            _lay_down(brief, folder)
            before = len(await _recorded(brief, ports))
            outcome = await ports.sandbox.run(self._job(brief, ports, self.program, folder))
            said = read_said(outcome.stdout, RULES, brief.prompt)
            if said.end is None:
                raise _fault(brief, outcome, said, (await _recorded(brief, ports))[before:])
            files = await asyncio.to_thread(_left_behind, folder / "work/harness", said)
            unfinished = f"not handed in: taken as it stood behind {brief.turns} turns"
            note = unfinished if said.end == "turns" else said.note or "no note was given"
            return Writing(files, note, said.trajectory)
        finally:
            remove_tree(folder)

    def _job(self, brief: Brief, ports: Ports, program: Path, folder: Path) -> Job:
        # The provider's own name: the program knows by it what the model can do. The gateway takes it as well.
        model = brief.model.partition("/")[2]
        claims = brief.claims(secrets.token_hex(8), ports.clock.now() + timedelta(seconds=self.limits.wall_s))
        env = {
            **QUIET,
            "ANTHROPIC_BASE_URL": "http://127.0.0.1:8080",
            "ANTHROPIC_API_KEY": ports.door.token(claims),
            # What the program would ask of a small model on the side.
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
            "HOME": HOME,
            "DATA": DATA,
            "PROMPT": PROMPT,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return Job(
            ("sh", "-c", START, "sh", HARNESS, PROGRAM, *_options(brief, model)),
            folder / "work",
            {PROGRAM: program, PROMPT: folder / "prompt", DATA: folder / "data"},
            env,
            ports.door.socket,
            self.limits,
        )


def find_program() -> Path | None:
    """The program that the installed SDK carries, None where there is none; the SDK itself is not imported."""
    found = importlib.util.find_spec("claude_agent_sdk")
    if found is None or found.origin is None:
        return None
    program = Path(found.origin).parent / "_bundled/claude"
    return program if program.is_file() else None


def _options(brief: Brief, model: str) -> tuple[str, ...]:
    """The program's options (Claude Code, "CLI reference"): no questions asked, nothing of this machine's read."""
    return (
        *("--print", "--output-format", "stream-json", "--verbose"),
        *("--model", model, "--max-turns", str(brief.turns)),
        # There is nobody to ask. To go without any rules it refuses where it runs as root, outside of a box.
        *("--tools", TOOLS, "--allowed-tools", TOOLS, "--permission-mode", "dontAsk"),
        *("--system-prompt", RULES, "--settings", json.dumps(SETTINGS), "--setting-sources", ""),
        *("--strict-mcp-config", "--disable-slash-commands", "--no-session-persistence"),
        # The model is sent it; drawn anew, it would make every request of a later start another one.
        *("--session-id", str(uuid5(NAMESPACE, f"{brief.run}/{brief.key}"))),
    )


def _lay_down(brief: Brief, folder: Path) -> None:
    for name, files in (("work/harness", brief.files), ("data", brief.data)):
        (folder / name).mkdir(parents=True)
        write_tree(files, folder / name)
    (folder / "prompt").write_text(brief.prompt)
    (folder / "work/home").mkdir()
    # Sent with every request, and drawn by chance where the program finds none.
    device = hashlib.sha256(f"{brief.run}/{brief.key}".encode()).hexdigest()
    (folder / "work/home/.claude.json").write_text(json.dumps({"userID": device}))


async def _recorded(brief: Brief, ports: Ports) -> list[ModelCall]:
    """The brief's model calls so far, in their order."""
    envelopes = await ports.bus.traces(brief.run, "model_call", brief.key)
    return [decode_call(line) for envelope in envelopes for line in envelope.lines]


def _fault(brief: Brief, outcome: Outcome, said: Said, calls: list[ModelCall]) -> Exception:
    """Whose doing it is that the program did not get to its end.

    The gateway's record and the box decide; what the program says of itself only tells more, for the agent's
    commands can write what they like on its output.
    """
    why = said.error or outcome.stderr.decode(errors="replace").strip()[-1000:] or "it died without a word"
    if outcome.status not in ("ok", "crash"):
        return WritingFailed(f"it was ended at its {outcome.status} limit", said.trajectory)
    if calls and (last := calls[-1]).error is not None:
        told = f"{brief.model} did not answer {brief.key} ({last.fault}): {last.error}"
        if last.fault in AWAY:
            return ProviderAway(told)
        return BudgetSpent(told) if last.fault == "budget" else ModelAway(told)
    if outcome.lost_connections:
        return ModelAway(f"the gateway lost {outcome.lost_connections} requests of {brief.key}: {why}")
    if not said.begun:
        return ClaudeAway(f"the program did not start for {brief.key} (exit status {outcome.exit_code}): {why}")
    return WritingFailed(f"it did not get to its end (exit status {outcome.exit_code}): {why}", said.trajectory)


def _left_behind(harness: Path, said: Said) -> dict[str, bytes]:
    for bytecode in list(harness.rglob("__pycache__")):
        shutil.rmtree(bytecode, ignore_errors=True)
    try:
        return read_tree(harness, MAX_FILES, MAX_TREE)
    except TreeRefused as refused:
        raise WritingFailed(f"what it left behind is no harness: {refused}", said.trajectory) from refused
