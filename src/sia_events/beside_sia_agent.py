"""A generation of SIA's own package, `sia-agent`, with an instant LLM: what a generation of ours is measured beside.

Its own command runs, under an interpreter that has it, and its run folder is read. Nothing of it is imported here.
"""

import json
import os
import shlex
import statistics
import subprocess
from itertools import pairwise
from pathlib import Path

from sia_events.errors import Unusable
from sia_events.figures import Figure
from sia_events.overheads import AGENT

BACKENDS = {"pydantic-ai": "openai-chat:bench", "claude": "haiku"}
"""Its backends that are measured, and the model that each asks for."""
ITEMS = 16
GIVE_UP_S = 300.0
APART = "no sandbox, no gate, nothing synced to disk, no record"
PACKAGE = "sia-agent[pydantic-ai]==0.6.0"

VERSION = """\
import importlib.metadata, pydantic_ai, sia.orchestrator
print(importlib.metadata.version("sia-agent"))
"""
EVALUATE = f"""\
import json, sys

with open(sys.argv[2] + "/answers.jsonl") as answers:
    right = sum(json.loads(line)["answer"] == "ok" for line in answers)
with open(sys.argv[2] + "/results.json", "w") as results:
    json.dump({{"accuracy": right / {ITEMS}, "total": {ITEMS}}}, results)
"""
# A run of its begins with an environment of ten packages, 900 MB. A generation has no part in that, and the agent
# wants none of them, so that what it finds under this name lays down a bare one.
UV = """\
#!/bin/sh
[ "$1" != venv ] || exec {python} -m venv --without-pip "$2"
"""


def version_of(python: Path) -> str:
    """The version of the package that this interpreter has. Raises Unusable."""
    try:
        found = subprocess.run([python, "-I", "-c", VERSION], capture_output=True, text=True)
    except OSError as error:
        raise Unusable(f"{python} is no interpreter: {error}") from error
    if found.returncode or not found.stdout:
        last = found.stderr.strip().splitlines()[-1:]
        raise Unusable(
            f"{python} cannot run sia-agent: {''.join(last)}; in an environment of its own, pip install '{PACKAGE}'"
        )
    return found.stdout.strip()


def generation(home: Path, python: Path, provider: str, backend: str, generations: int) -> Figure:
    """Seconds a generation, from one prompt of its feedback agent to the next: agent written, run, scored, summed up.

    `provider` is the URL of the one that answers at once. Raises RuntimeError for a run that did not do its work.
    """
    _lay_down(home, python, provider, backend)
    profiles = ("--meta-agent-profile", "meta.json", "--target-agent-profile", "target.json")
    # The first agent is not written by its feedback agent, and the last one is followed by none.
    asked = ("--task_dir", "task", "--max_gen", str(generations + 2), "--run_id", "1", "--no-web")
    ran = subprocess.run(
        [python, "-m", "sia", "run", *asked, *profiles],
        cwd=home,
        env=_environment(home, provider),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=GIVE_UP_S,
    )
    folders = [home / f"runs/run_1/gen_{number}" for number in range(1, generations + 3)]
    scores = [file.read_text() for folder in folders if (file := folder / "results.json").exists()]
    if ran.returncode or scores != [json.dumps({"accuracy": 1.0, "total": ITEMS})] * len(folders):
        raise RuntimeError(f"no figure: sia-agent ended with status {ran.returncode}: {ran.stdout[-2000:]}")
    begun = [(folder / "feedback_agent_prompt.txt").stat().st_mtime for folder in folders[1:]]
    took = [later - sooner for sooner, later in pairwise(begun)]
    name = f"a generation of sia-agent {version_of(python)}, backend {backend}"
    beside = {"generations": generations, "slowest": max(took), "items": ITEMS, "apart": APART}
    return Figure(name, statistics.median(took), "s", beside=beside)


def _lay_down(home: Path, python: Path, provider: str, backend: str) -> None:
    """A task like the trivial one in its layout, and profiles that lead to the instant LLM."""
    profile = {"name": "bench", "provider_id": "loopback"}
    written = {"profile_id": "meta", "agent_impl": backend, "model": BACKENDS[backend], **profile}
    named = {"provider_id": "loopback", "name": "bench", "client_kind": "anthropic", "api_key_env": "ANTHROPIC_API_KEY"}
    files = {
        "task/data/public/task.md": "# Say ok\n",
        "task/data/public/items.jsonl": "".join(f'{{"id": "i{n}", "text": "item {n}"}}\n' for n in range(ITEMS)),
        "task/data/public/evaluate.py": EVALUATE,
        "task/reference/reference_target_agent.py": AGENT,
        "task/reference/SAMPLE_TASK_DESCRIPTIONS.md": "# Say ok\n",
        "meta.json": json.dumps(written),
        "target.json": json.dumps({"profile_id": "target", "model": "bench", **profile}),
        "providers/loopback.json": json.dumps(named),
        "bin/uv": UV.format(python=shlex.quote(str(python))),
    }
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    (home / "bin/uv").chmod(0o755)


def _environment(home: Path, provider: str) -> dict[str, str]:
    """No key, no setting of the user's; the addresses of the instant LLM for both SDKs."""
    return {
        "PATH": os.pathsep.join((str(home / "bin"), os.environ["PATH"])),
        "HOME": str(home),
        "SIA_PROVIDERS_DIR": str(home / "providers"),
        "OPENAI_API_KEY": "none",
        "OPENAI_BASE_URL": f"{provider}/v1",
        "ANTHROPIC_API_KEY": "none",
        "ANTHROPIC_BASE_URL": provider,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        # Its program refuses to run for root with every tool allowed, which is how sia-agent starts it.
        "IS_SANDBOX": "1",
    }
