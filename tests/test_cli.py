"""The command line as people and scripts use it: each verb as a real process at least once, with the instant model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import (
    SMALL,
    SPLITS,
    anew,
    answered,
    assert_none_left,
    environment,
    log,
    read,
    sia,
    small_task,
    start,
    tree,
    until,
)

from sia_events.home import socket_place
from sia_events.shared.record import broken_link, parse_record, to_wire
from sia_events.shared.settings import Settings

SERVICES = (
    "meta_svc",
    "target_runner",
    "evaluator",
    "kernel_bench",
    "feedback_svc",
    "trainer",
    "model_gateway",
    "recorder",
)
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
pytestmark = pytest.mark.usefixtures("children")


@pytest.fixture(scope="module")
def ran(task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    home = tmp_path_factory.mktemp("home")
    return home, anew(home, "run", task, *SMALL, "--set", "rollout_items=4")


@pytest.fixture
def home(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """A home with the finished run r1, for verbs that only read."""
    return ran[0]


def copied(home: Path, copy: Path) -> Path:
    return Path(shutil.copytree(home, copy, symlinks=True, ignore=shutil.ignore_patterns("*.lock")))


def is_score(value: Any) -> bool:
    return value.keys() == {"value", "low", "high", "n"} and 0 <= value["low"] <= value["value"] <= value["high"] <= 1


def test_a_run_tells_each_change_on_stderr_and_how_it_ended_on_stdout(
    ran: tuple[Path, subprocess.CompletedProcess[str]],
):
    home, done = ran
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\d\d:\d\d:\d\d  g1a accepted: better by 0\.750 on the same 12 items, p = ", done.stderr, re.M)
    for said in ("run r1: improved", "sealed test, 12 items, scored once", "p = 0.0039", f"kept in {home}"):
        assert said in done.stdout
    assert "harness  1 of 1 versions accepted, +0.750 on the gate" in done.stdout
    assert len(re.findall(r"^  sia \w+ r1", done.stdout, re.M)) == 4
    assert "\x1b" not in done.stdout + done.stderr


def test_a_run_that_ended_leaves_no_folder_for_sockets(home: Path):
    assert not socket_place(Settings(home=home)).exists()


def test_runs_is_an_array_with_a_row_a_run(home: Path):
    (row,) = read(home, "runs")
    assert {"run": "r1", "task": "taste", "status": "finished", "generations": 1, "best": "g1a"}.items() <= row.items()
    assert "r1" in sia(home, "runs").stdout


def test_show_has_every_version_its_scores_the_sealed_test_and_the_cost(home: Path):
    shown = read(home, "show", "r1")
    wanted = {"run": "r1", "task": "taste", "status": "finished", "best": "g1a", "records": 28}
    assert wanted.items() <= shown.items()
    first, second = shown["generations"]
    fields = {"generation", "version", "parent", "lever", "accepted", "scores"}
    assert fields <= first.keys() and fields <= second.keys()
    assert (first["generation"], first["parent"], first["lever"], first["accepted"]) == (0, None, None, True)
    assert (second["generation"], second["parent"], second["lever"], second["accepted"]) == (1, "g0a", "harness", True)
    for version in (first, second):
        assert version["scores"].keys() == {"dev", "gate", "test"} and all(map(is_score, version["scores"].values()))
        assert {split: score["n"] for split, score in version["scores"].items()} == SPLITS
    sealed = shown["sealed"]
    assert {"first", "final", "p_value"} <= sealed.keys() and is_score(sealed["first"]) and is_score(sealed["final"])
    assert sealed["p_value"] == pytest.approx(2 * 0.5**9, rel=1e-4)
    cost = shown["cost"]
    assert {"model_calls", "tokens", "usd", "seconds"} <= cost.keys()
    assert cost["model_calls"] == 2 * sum(SPLITS.values()) + 3 * 8 and cost["tokens"] == 2 * cost["model_calls"]
    assert "g1a" in sia(home, "show", "r1").stdout


def test_log_prints_the_chained_records_as_cloud_events_one_a_line(home: Path):
    done = sia(home, "log", "r1", "--json")
    lines = done.stdout.splitlines()
    records = [parse_record(line.encode()) for line in lines]
    assert [to_wire(record).decode() for record in records] == lines and broken_link(records) is None
    assert [record.position for record in records] == list(range(1, 29))
    assert [record.type for record in records][:3] == ["TaskRegistered", "RunStarted", "AgentProposed"]
    assert records[-1].type == "RunFinished"
    for line in lines:
        assert json.loads(line)["specversion"] == "1.0" and re.fullmatch(UUID, json.loads(line)["id"])
    assert len(sia(home, "log", "r1").stdout.splitlines()) == 28
    followed = sia(home, "log", "r1", "--follow", "--json")
    assert followed.stdout == done.stdout, "following a finished run ends at its end"


def test_a_reader_that_goes_away_is_no_failure(home: Path):
    words = f"{sys.executable} -m sia_events log r1 --json | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], env=environment(home), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 1


def test_diff_shows_what_the_harness_became(home: Path):
    changes = read(home, "diff", "r1", "g0a", "g1a")
    assert "target_agent.py" in changes["files"] and "+" in changes["files"]["target_agent.py"]
    assert changes["scores"].keys() == {"g0a", "g1a"} and changes["adapters"] == [None, None]
    assert "--- g0a/target_agent.py" in sia(home, "diff", "r1", "g0a", "g1a").stdout
    assert read(home, "diff", "r1", "g1a", "g1a")["files"] == {}


def test_replay_agrees_and_writes_nothing_to_streams_or_blobs(home: Path):
    before = {part: tree(home / part) for part in ("nats", "blobs", "private")}
    found = read(home, "replay", "r1")
    expected = {"records": 28, "decisions": 10, "performed": 15, "diverged": False, "first_divergence": None}
    assert expected.items() <= found.items()
    assert {part: tree(home / part) for part in before} == before
    assert "28 records, 10 decisions agree" in sia(home, "replay", "r1").stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="taking the network away takes root")
def test_replay_works_with_no_network_and_no_server(home: Path, children: Callable[[], list[psutil.Process]]):
    assert not children()
    alone = (shutil.which("unshare") or "unshare", "--net")
    done = anew(home, "replay", "r1", "--json", before=alone, SIA_NATS_SERVER="/nowhere", PATH="/nowhere")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads(done.stdout)["diverged"] is False


def test_replay_of_a_log_that_was_tampered_with_fails_and_names_the_record(home: Path, tmp_path: Path):
    script = """
import sys
from sia_events.infra.clickhouse import connect
log = connect(f"chdb://{sys.argv[1]}/log")
log._writer.command("SET mutations_sync = 2")
spoilt = "replaceOne(record, 'improved', 'no proven gain')"
log._writer.command(f"ALTER TABLE events UPDATE record = {spoilt} WHERE 1")
"""
    copied(home, tmp_path / "copy")
    mended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "copy")], capture_output=True, text=True)
    if mended.returncode:
        pytest.skip(f"the store cannot be altered from here: {mended.stderr.splitlines()[-1]}")
    done = sia(tmp_path / "copy", "replay", "r1", "--json")
    assert done.returncode == 1
    first = json.loads(done.stdout)["first_divergence"]
    assert first["position"] == 28 and "chain" in first["reason"]


def test_the_beginning_of_a_runs_name_is_enough(home: Path):
    assert read(home, "show", "r")["run"] == "r1"


def test_a_branch_goes_on_under_another_choice_and_compare_shows_both(
    ran: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
):
    home = copied(ran[0], tmp_path / "home")
    opened = sia(home, "branch", "r1", "--at", "0", "--set", "candidates=2", "--run", "b1", "--no-go", "--json")
    assert opened.returncode == 0, opened.stderr
    told = json.loads(opened.stdout)
    assert told["run"] == "b1" and told["parent"] == "r1"
    resumed = sia(home, "run", "--resume", "b1", "--json")
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads(resumed.stdout)
    assert summary["run"] == "b1" and summary["parent"] == "r1"
    assert [v["version"] for v in summary["generations"]] == ["g0a", "g1a", "g1b"]
    went = sia(home, "branch", "r1", "--at", "1", "--set", "generations=2", "--json")
    assert went.returncode == 0 and json.loads(went.stdout)["run"] == "r2", went.stderr
    assert {row["run"] for row in read(home, "runs")} == {"r1", "b1", "r2"}
    compared = read(home, "compare", "r1", "b1")
    assert [one["run"] for one in compared["runs"]] == ["r1", "b1"]
    assert compared["shared_records"] == told["at"] == compared["fork"]["position"]
    assert "records are shared" in sia(home, "compare", "r1", "b1").stdout
    for run in ("b1", "r2"):
        assert not read(home, "replay", run)["diverged"]
    own = log(home, "b1")
    assert {r.run for r in own[: told["at"]]} == {"r1"} and {r.run for r in own[told["at"] :]} == {"b1"}
    assert [r.position for r in own] == list(range(1, len(own) + 1)) and broken_link(own) is None


def held_up(process: subprocess.Popen[str]) -> psutil.Process:
    """A box of the run, stopped: the run waits for it until it is told to go on."""

    def stopped() -> psutil.Process | None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if child.name() == "bwrap":
                    child.suspend()
                    return child
            except psutil.NoSuchProcess:
                continue
        return None

    return until(stopped)


def test_a_second_terminal_gets_its_answers_during_a_run(task: Path, tmp_path: Path):
    process = start(tmp_path, "run", task, *SMALL)
    assert process.stderr
    while "g0a on dev" not in process.stderr.readline():
        assert process.poll() is None
    box = held_up(process)
    try:
        (row,) = until(lambda: read(tmp_path, "runs"))
        assert (row["run"], row["status"], row["best"]) == ("r1", "running", None)
        (first,) = until(lambda: read(tmp_path, "show", "r1")["generations"])
        assert (first["version"], first["accepted"]) == ("g0a", None)
        assert "g0a" in sia(tmp_path, "log", "r1").stdout
        replayed = read(tmp_path, "replay", "r1")
        assert not replayed["diverged"]
        refused = sia(tmp_path, "run", task, *SMALL)
        assert refused.returncode == 2 and str(process.pid) in refused.stderr and "sia up" in refused.stderr
        assert sia(tmp_path, "down").returncode == 2
        following = start(tmp_path, "log", "r1", "--follow", "--json")
    finally:
        box.resume()
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 0, talk
    lines, told = following.communicate(timeout=60)
    assert following.returncode == 0, told
    assert [json.loads(line)["position"] for line in lines.splitlines()] == list(range(1, 29))


def test_a_run_is_verified_while_it_goes_on_for_the_prefix_that_is_there(task: Path, tmp_path: Path):
    process = start(tmp_path, "run", task, *SMALL)
    assert process.stderr
    while "g0a on dev" not in process.stderr.readline():
        assert process.poll() is None
    box = held_up(process)
    try:
        until(lambda: read(tmp_path, "runs"))
        looked = [read(tmp_path, "verify", "r1")]
    finally:
        box.resume()
    while process.poll() is None:  # and the log grows while it is read
        looked.append(read(tmp_path, "verify", "--all"))  # which may come to its end, and take what was asked with it
    talk = process.communicate(timeout=120)[1]
    assert process.returncode == 0, talk
    looked.append(read(tmp_path, "verify", "--all"))
    assert [found["findings"] for found in looked] == [[]] * len(looked)
    seen = [found["records"] for found in looked]
    assert len(seen) > 2 and seen == sorted(seen) and 3 < seen[0] < seen[-1] == 28


def test_a_run_that_cannot_show_a_gain_says_so_and_ends_well(tmp_path: Path):
    task = small_task(tmp_path / "bland")
    agent = task / "reference/reference_target_agent.py"
    agent.write_text(agent.read_text().replace('"answer": said', '"answer": "sweet"'))
    done = sia(tmp_path / "home", "run", task, *SMALL)
    assert done.returncode == 0 and "run r1: no proven gain" in done.stdout and "No gain could be shown" in done.stdout


def test_a_run_whose_first_agent_does_not_work_fails_with_the_reason(tmp_path: Path):
    task = small_task(tmp_path / "broken")
    (task / "reference/reference_target_agent.py").write_text("raise SystemExit('no idea')\n")
    done = sia(tmp_path / "home", "run", task, *SMALL)
    assert done.returncode == 1 and "no idea" in done.stdout


def test_a_task_with_an_evaluator_of_its_own_is_judged_by_it(tmp_path: Path):
    task = small_task(tmp_path / "own")
    text = (task / "task.toml").read_text()
    (task / "task.toml").write_text(text.replace('evaluator = "labels"', 'evaluator = "evaluate.py"'))
    (task / "data/public/evaluate.py").write_text(
        "import json, sys\n"
        "right = [json.loads(line) for line in open('/task/data/private/answers.jsonl')]\n"
        "given = {a['id']: a['answer'] for a in map(json.loads, open(sys.argv[2] + '/answers.jsonl'))}\n"
        "items = {r['id']: 0.5 * (r['label'] == 'salt') for r in right}\n"
        "json.dump({'items': items}, open(sys.argv[2] + '/results.json', 'w'))\n"
    )
    done = sia(tmp_path / "home", "run", task, *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["outcome"] == "no proven gain"
    assert summary["generations"][0]["scores"]["dev"]["value"] == 0.125


def test_every_service_runs_as_a_process_of_its_own_and_a_run_is_handed_to_them(
    task: Path, tmp_path: Path, models: Path, children: Callable[[], list[psutil.Process]]
):
    (tmp_path / "models").symlink_to(models)
    served: list[subprocess.Popen[str]] = []

    def up(names: Sequence[str]) -> None:
        """Start them side by side and wait until each of them serves."""
        processes = [start(tmp_path, "serve", name, "--json") for name in names]
        served.extend(processes)
        for name, process in zip(names, processes, strict=True):
            assert process.stdout
            assert json.loads(process.stdout.readline()) == {"serving": [name], "pid": process.pid}

    up(SERVICES[:1])  # it runs the bus for the others
    up(SERVICES[1:])
    done = sia(tmp_path, "run", task, *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["outcome"], summary["records"]) == ("improved", 28)
    assert not read(tmp_path, "replay", "r1")["diverged"]
    for process in reversed(served):
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert_none_left(children)


def test_a_run_that_two_processes_serve_at_once_is_the_run_that_one_would_have_served(
    task: Path, tmp_path: Path, models: Path, children: Callable[[], list[psutil.Process]]
):
    (tmp_path / "models").symlink_to(models)
    twice = [name for name in SERVICES if name not in ("model_gateway", "recorder")]  # of these a home has one
    served = [start(tmp_path, "serve", "--json")]
    assert served[0].stdout and json.loads(served[0].stdout.readline())["serving"] == list(SERVICES)
    served.append(start(tmp_path, "serve", *twice, "--json"))
    assert served[1].stdout and json.loads(served[1].stdout.readline())["serving"] == twice
    summary = answered(tmp_path, "run", task, *SMALL)
    assert (summary["outcome"], summary["records"]) == ("improved", 28)
    assert not read(tmp_path, "replay", "r1")["diverged"]
    for process in reversed(served):
        process.send_signal(signal.SIGTERM)
        _, talk = process.communicate(timeout=60)
        assert process.returncode == 0, talk
    assert answered(tmp_path, "verify", "r1")["findings"] == []
    assert_none_left(children)


def test_up_serves_in_the_background_until_down(
    task: Path, tmp_path: Path, models: Path, children: Callable[[], list[psutil.Process]]
):
    (tmp_path / "models").symlink_to(models)
    told = answered(tmp_path, "up")
    assert psutil.pid_exists(told["pid"]) and set(told["serving"]) == set(SERVICES)
    again = sia(tmp_path, "up")
    assert again.returncode == 2 and str(told["pid"]) in again.stderr
    both = [start(tmp_path, "run", task, "--run", name, *SMALL, "--json") for name in ("one", "two")]
    for process in both:
        out, talk = process.communicate(timeout=120)
        assert process.returncode == 0, talk
        assert json.loads(out)["outcome"] == "improved"
    assert {row["run"]: row["status"] for row in read(tmp_path, "runs")} == {"one": "finished", "two": "finished"}
    assert answered(tmp_path, "down") == {"pid": told["pid"]}
    assert not children()
    assert answered(tmp_path, "down") == {"pid": None}


def test_doctor_names_each_check_with_its_state_and_its_mend_and_leaves_the_home_alone(home: Path):
    before = tree(home)
    done = sia(home, "doctor", "--json")
    checks = json.loads(done.stdout)["checks"]
    assert all(check.keys() == {"name", "status", "detail", "fix"} for check in checks)
    assert {"python", "home", "disk sync", "bus", "log", "sandbox", "services"} <= {check["name"] for check in checks}
    assert any(check["name"].startswith("limit: ") for check in checks)
    for check in checks:
        assert check["status"] in ("ok", "warn", "fail") and check["detail"]
        assert check["status"] == "ok" or check["fix"], check
    assert done.returncode == any(check["status"] == "fail" for check in checks)
    assert tree(home) == before


def test_doctor_of_a_home_that_is_not_there_does_not_make_it(tmp_path: Path):
    sia(tmp_path / "new", "doctor")
    assert not (tmp_path / "new").exists()


def test_schema_describes_the_stream(home: Path):
    document = json.loads(sia(home, "schema").stdout)
    assert document["asyncapi"] == "3.0.0" and "Scored" in document["channels"]


def test_tasks_are_listed_and_checked(home: Path, task: Path):
    assert "words" in {row["task"] for row in read(home, "tasks", "list")}
    checked = read(home, "tasks", "check", task)
    assert checked["task"] == "taste" and checked["splits"] == {**SPLITS, "train": 40 - sum(SPLITS.values())}
    assert "complete" in sia(home, "tasks", "check", task).stdout


def test_a_home_without_runs_says_how_to_start_one(tmp_path: Path):
    assert read(tmp_path, "runs") == []
    assert "sia run" in sia(tmp_path, "runs").stdout


def test_help_names_every_verb_and_loads_none_of_the_heavy_parts():
    script = """
import sys
from sia_events.cli import main
try:
    main(["--help"])
except SystemExit:
    print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    *text, modules = done.stdout.splitlines()
    verbs = ["run", "runs", "show", "log", "diff", "replay", "branch", "compare", "serve", "up", "down", "tasks"]
    verbs += ["schema", "doctor", "bench"]
    assert all(re.search(rf"^\W*{verb}\b", "\n".join(text), re.M) for verb in verbs)
    loaded = {name.partition(".")[0] for name in modules.split()}
    heavy = {"torch", "transformers", "chdb", "clickhouse_connect", "faststream", "nats", "scipy", "numpy", "pydantic"}
    assert not loaded & {*heavy, "uvicorn", "rich"}
