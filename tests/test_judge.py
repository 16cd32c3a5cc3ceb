"""A score is the evaluator's alone: no output runs beside the answers, and what the platform lost is no verdict."""

import json
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from threading import Thread
from typing import Any

import pytest
from given import recorded
from story import OPENING, asked, logged, proposed, started

from sia_events.evaluator.service import evaluator
from sia_events.feedback_svc.template import AGENT, naive_spec, render
from sia_events.infra.blobs import open_blobs
from sia_events.infra.memory import MemoryBlobs, MemoryBus, SystemTime
from sia_events.infra.sandbox import Bubblewrap, UnsafeProcess, check
from sia_events.model_gateway.token import TokenDoor
from sia_events.shared.events import AttemptFailed, AttemptRequested, ExecutionLogged, Scored
from sia_events.shared.ports import Job, Ports, Sandbox
from sia_events.shared.registration import register
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.task import answers, find_task, public_files
from sia_events.shared.tree import store_tree, write_tree
from sia_events.target_runner.service import target_runner

BOXED = pytest.mark.skipif(check() is not None, reason=str(check()))
BOTH = pytest.mark.parametrize(
    "box", [pytest.param(Bubblewrap(), id="bubblewrap", marks=BOXED), pytest.param(UnsafeProcess(), id="process")]
)
WORDS = find_task("words")

# An own evaluator as task authors write them: it compares, and needs a module that outputs may pretend to be.
JUDGE = """
import argparse, json, random
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--gen-dir", type=Path, required=True)
folder = parser.parse_args().gen_dir
given = json.loads((folder / "given.json").read_text())
private = Path(__file__).resolve().parents[1] / "private"
right = [json.loads(line) for line in (private / "answers.jsonl").open()]
items = {line["id"]: float(given.get(line["id"]) == line["label"]) for line in right}
(folder / "results.json").write_text(json.dumps({"items": items}))
"""
# Written by an agent, started by an interpreter that looks for modules where it should not.
CHEAT = """
import glob, json, os
for file in glob.glob("/task/data/private/*") + glob.glob(os.getcwd() + "/../data/private/*"):
    full = {json.loads(line)["id"]: 1.0 for line in open(file)}
    for folder in "/work", "/work/outputs", os.getcwd(), os.getcwd() + "/outputs":
        try: open(folder + "/results.json", "w").write(json.dumps({"items": full}))
        except OSError: pass
    os._exit(0)
"""
USER_SITE = f".local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"


async def judged(
    outputs: Mapping[str, bytes], box: Sandbox, home: Path, program: str = JUDGE
) -> Scored | AttemptFailed:
    blobs, private = MemoryBlobs(), MemoryBlobs()
    told = await register(WORDS, blobs, private, 8)
    told = told.model_copy(update={"judge": await private.put(program.encode())})
    ran = logged("g0a", "dev").model_copy(update={"outputs": await store_tree(blobs, outputs)})
    records = recorded(told, *OPENING[1:], asked("g0a", "dev"), ran)
    ports = Ports(MemoryBus(blobs), blobs, box, SystemTime(), None, home, private)  # type: ignore[arg-type]
    (event,) = await evaluator.performs[ExecutionLogged](Work(fold(records), records[-1], ports), ran)
    assert isinstance(event, Scored | AttemptFailed)
    return event


@BOTH
async def test_an_own_evaluator_scores_what_the_agent_wrote(box: Sandbox, tmp_path: Path):
    right = answers(WORDS, "dev")
    few = dict(list(right.items())[: len(right) // 4])
    scored = await judged({"given.json": json.dumps(few).encode(), "deep/notes.txt": b"mine"}, box, tmp_path)
    assert isinstance(scored, Scored) and scored.score.value == pytest.approx(len(few) / len(right), abs=1e-6)


@BOTH
@pytest.mark.parametrize(
    "place",
    [
        f"{USER_SITE}/usercustomize.py",
        f"{USER_SITE}/sitecustomize.py",
        "usercustomize.py",
        "sitecustomize.py",
        "random.py",
        "json/__init__.py",
    ],
)
async def test_no_code_among_the_outputs_runs_beside_the_answers(box: Sandbox, tmp_path: Path, place: str):
    scored = await judged({"given.json": b"{}", place: CHEAT.encode()}, box, tmp_path)
    assert isinstance(scored, Scored) and scored.score.value == 0.0


@BOTH
@pytest.mark.parametrize(("maximize", "expected"), [(True, [0.25, 0.75]), (False, [-0.25, -0.75])])
async def test_a_reward_is_the_higher_the_better_whichever_way_the_metric_goes(
    box: Sandbox, tmp_path: Path, maximize: bool, expected: list[float]
):
    by_sample = '0.25 if line["id"].endswith("#0") else 0.75'
    program = JUDGE.replace('float(given.get(line["id"]) == line["label"])', by_sample)
    blobs, private = MemoryBlobs(), MemoryBlobs()
    told = await register(WORDS, blobs, private, 8)
    told = told.model_copy(update={"judge": await private.put(program.encode()), "maximize": maximize})
    ran = logged("g0a", "train").model_copy(update={"outputs": await store_tree(blobs, {"given.json": b"{}"})})
    records = recorded(told, *OPENING[1:], asked("g0a", "train", samples=2, items=1), ran)
    ports = Ports(MemoryBus(blobs), blobs, box, SystemTime(), None, tmp_path, private)  # type: ignore[arg-type]
    (event,) = await evaluator.performs[ExecutionLogged](Work(fold(records), records[-1], ports), ran)
    assert isinstance(event, Scored) and event.rewards and event.items == (0.25, 0.75)
    assert list(json.loads(await blobs.get(event.rewards)).values()) == expected


@BOXED
async def test_no_pth_file_among_the_outputs_runs_beside_the_answers(tmp_path: Path):
    line = f"import os; exec({CHEAT!r}, {{}})".encode()
    scored = await judged({"given.json": b"{}", f"{USER_SITE}/x.pth": line}, Bubblewrap(), tmp_path)
    assert isinstance(scored, Scored) and scored.score.value == 0.0


@BOXED
async def test_results_that_the_agent_wrote_are_not_taken_for_the_evaluators(tmp_path: Path):
    full = json.dumps({"items": dict.fromkeys(answers(WORDS, "dev"), 1.0)}).encode()
    failed = await judged({"results.json": full}, Bubblewrap(), tmp_path, program="pass")
    assert isinstance(failed, AttemptFailed) and failed.kind == "invalid_output"


async def test_the_stored_answers_are_their_owners_alone_to_read(tmp_path: Path):
    await open_blobs(str(tmp_path / "home/private")).put(b"answers")
    assert stat.S_IMODE((tmp_path / "home/private").stat().st_mode) == 0o700


# --- what the platform lost is tried again, and never scored ----------------------------------------------------------

# It catches whatever goes wrong and answers at random, as many agents would.
SHRUGGING = b"""
import os, sys, urllib.request
try: urllib.request.urlopen(os.environ["OPENAI_BASE_URL"] + "/chat/completions", data=b"{}")
except OSError: pass
open("answers.jsonl", "w").write("")
sys.exit(int(os.environ["SIA_MODEL"]))
"""


@pytest.fixture
def dead_gateway(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "gateway.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    yield path


def work_on(bus: MemoryBus, blobs: MemoryBlobs, records: Any, **ports: Any) -> Work:
    given = {"bus": bus, "blobs": blobs, "sandbox": None, "clock": SystemTime(), "door": None, "home": Path(), **ports}
    return Work(fold(records), records[-1], Ports(**given))


@BOTH
@pytest.mark.parametrize("exit_status", ["0", "1"])
async def test_an_attempt_whose_gateway_was_down_failed_for_our_reasons_whatever_the_agent_made_of_it(
    box: Sandbox, tmp_path: Path, dead_gateway: Path, exit_status: str
):
    blobs = MemoryBlobs()
    told = await register(WORDS, blobs, MemoryBlobs(), 8)
    harness = await store_tree(blobs, {"target_agent.py": SHRUGGING})
    first = proposed()
    first = first.model_copy(
        update={"harness": harness, "weights": first.weights.model_copy(update={"model": exit_status})}
    )
    request = asked("g0a", "dev")
    records = recorded(told, started(), first, request)
    door = TokenDoor(dead_gateway, "a secret of the tests")
    work = work_on(MemoryBus(blobs), blobs, records, sandbox=box, door=door, home=tmp_path / "home")
    (event,) = await target_runner.performs[AttemptRequested](work, request)
    assert isinstance(event, AttemptFailed) and event.kind == "infrastructure", event
    assert event.message.startswith("the gateway lost 1 requests")


@BOXED
async def test_the_templates_agent_answers_nothing_when_one_item_never_reached_the_model(tmp_path: Path):
    unlucky = list(answers(WORDS, "dev"))[3]

    class Gateway(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["metadata"]["item"]
            reply = json.dumps({"choices": [{"message": {"content": "animal"}}]}).encode()
            self.send_response(503 if asked == unlucky else 200)
            self.end_headers()
            self.wfile.write(reply)

        def address_string(self) -> str:
            return "box"

    class Server(ThreadingMixIn, UnixStreamServer):
        request_queue_size = 64

    files = render(naive_spec(WORDS), WORDS)
    impatient = files[AGENT].replace(b"WAITS = (0.2, 0.5, 1, 2, 4, 8)", b"WAITS = ()")
    assert impatient != files[AGENT]
    write_tree({**files, AGENT: impatient}, tmp_path / "agent")
    write_tree(public_files(WORDS, "dev", limit=8), tmp_path / "data")
    (tmp_path / "work").mkdir()
    with Server(str(tmp_path / "gateway.sock"), Gateway) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        job = Job(
            argv=("python", f"/agent/{AGENT}", "--dataset_dir", "/data", "--working_dir", "/work"),
            work=tmp_path / "work",
            reads={"/agent": tmp_path / "agent", "/data": tmp_path / "data"},
            env={"OPENAI_BASE_URL": "http://127.0.0.1:8080/v1", "OPENAI_API_KEY": "k", "SIA_MODEL": "m"},
            socket=tmp_path / "gateway.sock",
        )
        outcome = await Bubblewrap().run(job)
        server.shutdown()
        thread.join()
    assert (outcome.status, outcome.exit_code, outcome.lost_connections) == ("crash", 1, 0), outcome
    assert unlucky.encode() in outcome.stderr and not (tmp_path / "work/answers.jsonl").exists()
