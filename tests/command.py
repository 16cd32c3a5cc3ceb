"""The real `sia` command, in a home of its own, on a task and a model that are small enough to be instant."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import forking
import psutil
from forking import Forked

from sia_events.cli import main
from sia_events.log_here import open_log
from sia_events.shared.calls import ModelCall, decode_call
from sia_events.shared.record import Record, parse_record
from sia_events.shared.settings import Settings

# Three of four items have the label that the instant model chooses, so that a harness which lets it choose is better.
LABELS = ("sweet", "salt")
SPLITS = {"dev": 8, "gate": 12, "test": 12}
ITEMS = 40
TOML = f"""\
evaluator = "labels"
labels = ["sweet", "salt"]
question = "Sweet or salt?"
floor = 0.75
[splits]
seed = 1
dev = {SPLITS["dev"]}
gate = {SPLITS["gate"]}
test = {SPLITS["test"]}
[limits]
wall_s = 60
cpu_s = 20
"""
AGENT = """\
import json, os, sys, urllib.request
data, work = sys.argv[2], sys.argv[4]
with open(f"{work}/answers.jsonl", "w") as answers:
    for line in open(f"{data}/items.jsonl"):
        item = json.loads(line)
        body = {"messages": [{"role": "user", "content": item["text"]}], "metadata": {"item": item["id"]}}
        headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
        url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as reply:
            said = json.load(reply)["choices"][0]["message"]["content"]
        answers.write(json.dumps({"id": item["id"], "answer": said}) + "\\n")
"""
SMALL = ("--target-model", "instant/first", "--generations", "1", "--candidates", "1", "--lever", "harness")


def small_task(folder: Path) -> Path:
    """A task of 40 items, on which the first agent is never right and one that chooses is in three of four."""
    for part in ("data/public", "data/private", "reference"):
        (folder / part).mkdir(parents=True)
    (folder / "task.toml").write_text(TOML)
    (folder / "data/public/task.md").write_text("# Sweet or salt\n\nWrite answers.jsonl.\n")
    items = [{"id": f"i{n:02}", "text": f"dish {n}", "label": LABELS[n % 4 == 0]} for n in range(ITEMS)]
    (folder / "data/private/items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "reference/reference_target_agent.py").write_text(AGENT)
    return folder


def environment(home: Path, **more: str) -> dict[str, str]:
    """Ours without any SIA_* variable of whoever runs the tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SIA_")}
    return {**clean, "SIA_HOME": str(home), "OMP_NUM_THREADS": "1", **more}


def sia(home: Path, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    with Forked([*map(str, words)], environment(home, **more)) as process:
        try:
            out, talk = process.communicate(timeout=120)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, talk)


def anew(home: Path, *words: object, before: Sequence[str] = (), **more: str) -> subprocess.CompletedProcess[str]:
    """`sia` in an interpreter of its own; `before` are words in front of it, such as a program that confines it."""
    command = [*before, sys.executable, "-m", "sia_events", *map(str, words)]
    return subprocess.run(command, env=environment(home, **more), capture_output=True, text=True, timeout=120)


def answered(home: Path, *words: object, **more: str) -> Any:
    """What the command prints with --json, when it ends well."""
    done = sia(home, *words, "--json", **more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def told(home: Path, *words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command in this process: a new one spends a second on imports."""
    out, talk, status = StringIO(), StringIO(), 0
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment(home))
    try:
        with redirect_stdout(out), redirect_stderr(talk):
            main([*map(str, words)])
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return status, out.getvalue(), talk.getvalue()


def read(home: Path, *words: object) -> Any:
    """`answered`, of a verb that only reads, in this process."""
    status, out, talk = told(home, *words, "--json")
    assert not status, talk
    return json.loads(out)


def log(home: Path, run: str = "r1") -> list[Record]:
    """The run's records as `sia log` prints them."""
    done = sia(home, "log", run, "--json")
    assert done.returncode == 0, done.stderr
    return [parse_record(line.encode()) for line in done.stdout.splitlines()]


def calls(home: Path, run: str = "r1") -> list[ModelCall]:
    """The run's model calls, all roles, as the log has them."""

    async def lines() -> list[ModelCall]:
        async with open_log(Settings(home=home)) as log:
            sql = "SELECT body FROM model_calls FINAL WHERE run = {run:String} ORDER BY sequence, line"
            return [decode_call(row["body"].encode()) for row in await log.query(sql, {"run": run})]

    return asyncio.run(lines())


def start(home: Path, *words: object, **more: str) -> subprocess.Popen[str]:
    """Start the command as the leader of a process group of its own."""
    return Forked([*map(str, words)], environment(home, **more), leads=True)


def start_anew(home: Path, *words: object, **more: str) -> subprocess.Popen[str]:
    """`start` in an interpreter of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "sia_events", *map(str, words)],
        env=environment(home, **more),
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        # Whoever started the tests in the background had SIGINT ignored, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@contextmanager
def adopting() -> Iterator[Callable[[], list[psutil.Process]]]:
    """While this lasts, whoever loses its parent becomes a child of ours; gives what lists the children since then."""
    before = set(psutil.Process().children(recursive=True))

    def children() -> list[psutil.Process]:
        alive: list[psutil.Process] = []
        for child in psutil.Process().children(recursive=True):
            try:
                if child in before or forking.is_server(child.pid):
                    continue
                if child.status() != psutil.STATUS_ZOMBIE:
                    alive.append(child)
                elif child.ppid() == os.getpid():
                    os.waitpid(child.pid, os.WNOHANG)
            except (psutil.NoSuchProcess, ChildProcessError):
                continue
        return alive

    with forking.orphans_adopted():
        yield children


def assert_none_left(children: Callable[[], list[psutil.Process]], seconds: float = 20.0) -> None:
    """No process of ours is alive a little later; what has just been killed takes its children along with it."""
    deadline = time.monotonic() + seconds
    while left := children():
        assert time.monotonic() < deadline, [(each.pid, each.status(), each.cmdline()) for each in left]
        time.sleep(0.02)


def until(happened: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Look until something is so, and give it back; fails when it is not in time."""
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, f"not so within {seconds:.0f} s"
        time.sleep(0.02)
    return found


def tree(home: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder under `home` with size and time of change; empty when there is no home."""
    return {str(p.relative_to(home)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(home.rglob("*"))}
