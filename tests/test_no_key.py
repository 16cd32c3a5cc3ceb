"""A provider's key is in the process that asks the provider, and nowhere else."""

import json
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import AGENT, anew, assert_none_left, calls, log, start_anew
from llm_author import BETTER, KEY, SMALL, Author, reached
from loopback import Fault, Loopback, Wire
from loopback_wires import Reply

from sia_events.shared.record import to_wire

# An agent that asks its model about all that it can see of the place it runs in, beside the items.
SEEN = """\
import glob, json
seen = dict(os.environ)
for name in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline"):
    try:
        seen[name] = open(name, errors="replace").read()
    except OSError as error:
        seen[name] = repr(error)
"""
first, _, rest = AGENT.partition("\n")
CURIOUS = f"{first}\n{SEEN}{rest}".replace('item["text"]', 'item["text"] + json.dumps(seen)')

pytestmark = pytest.mark.usefixtures("children")


def test_the_key_is_in_no_event_blob_call_log_line_command_line_sandbox_or_file(
    tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    author = Author(agents=(CURIOUS, BETTER))
    with Loopback(author) as provider:
        process = start_anew(
            tmp_path, "run", task, "--run", "r1", *SMALL, "--backend", "agentic", "--json", **reached(provider)
        )
        command_lines, holders = watched(process)
        out, talk = process.communicate(timeout=60)
        used = [asked.headers["authorization"] for asked in provider.requests]
    assert process.returncode == 0, talk
    assert set(used) == {f"Bearer {KEY}"}
    asked = json.dumps(author.asked)
    assert asked.count("OPENAI_BASE_URL") >= 8 and "/proc/1/cmdline" in asked, "the agent has looked around its box"
    assert "PYTHONDONTWRITEBYTECODE=1" in asked, "and so has its author"
    assert not holders, "what the command starts has no key in its environment"
    assert any("nats-server" in line for line in command_lines) and any("bwrap" in line for line in command_lines)
    assert_nowhere(tmp_path, out, talk, asked, *command_lines)
    assert_none_left(children)


def test_a_provider_that_repeats_the_key_it_refuses_puts_it_in_no_message(tmp_path: Path, task: Path):
    def careless(wire: Wire, body: Mapping[str, Any]) -> Reply | Fault:
        return Fault("unauthorised")

    with Loopback(careless) as provider:
        died = anew(tmp_path, "run", task, "--run", "r1", *SMALL, **reached(provider))
    assert died.returncode == 1
    assert "openai refused the key (401); check the key in OPENAI_API_KEY" in died.stderr
    assert_nowhere(tmp_path, died.stdout, died.stderr)


def watched(process: subprocess.Popen[str]) -> tuple[set[str], set[str]]:
    """Of the process and its descendants, until its end: every command line, and who had the key in its environment."""
    seen: set[str] = set()
    holders: set[str] = set()
    family = psutil.Process(process.pid)
    family_line = family.cmdline()
    while process.poll() is None:
        try:
            everyone = [family, *family.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for each in everyone:
            try:
                seen.add(" ".join(each.cmdline()))
                # Between fork and exec a child is the process itself, its name and environment too.
                if KEY in each.environ().values() and each.cmdline() != family_line:
                    holders.add(" ".join(each.cmdline()))
            except psutil.Error:
                continue
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.005)
    return seen, holders


def assert_nowhere(home: Path, *told: str) -> None:
    """The key is in none of what was told, in no record, model call, or file of the home, as it stands there."""
    recorded = [to_wire(record).decode() for record in log(home)]
    lines = [repr(call) for call in calls(home)]
    assert recorded and lines
    assert [text[:200] for text in (*told, *recorded, *lines) if KEY in text] == []
    files = [path for path in home.rglob("*") if path.is_file()]
    assert len(files) > 20 and [path for path in files if KEY.encode() in path.read_bytes()] == []
