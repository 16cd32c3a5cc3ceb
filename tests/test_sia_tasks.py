"""Task folders of SIA's layout run unchanged: their own evaluators judge, each split by its own answers alone."""

import csv
import io
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from command import answered, sia
from given import recorded
from story import OPENING, asked, logged, proposed

from sia_events.evaluator.service import evaluator
from sia_events.infra.memory import MemoryBlobs, MemoryBus, SystemTime
from sia_events.infra.sandbox import Bubblewrap, check
from sia_events.shared.events import AttemptFailed, ExecutionLogged, Scored, Split
from sia_events.shared.items import TaskError
from sia_events.shared.packages import PackagesMissing, folder, listed
from sia_events.shared.plain import deal, find_key, keep_only
from sia_events.shared.ports import Ports
from sia_events.shared.registration import WHOLE, decode_answers, register, requirements
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.task import Task, load_task, plain_splits, private_files
from sia_events.shared.tree import load_tree, store_tree
from sia_events.starting import lay_down
from sia_events.target_runner.perform import attempt

BOXED = pytest.mark.skipif(check() is not None, reason=str(check()))
PACKAGES = b"pandas\n"
EVALUATOR = """
import argparse, json, pathlib
folder = pathlib.Path(argparse.ArgumentParser().parse_known_args()[1][1])
private = pathlib.Path(__file__).resolve().parents[1] / "private"
key = json.loads((private / "answers.json").read_text())
given = json.loads((folder / "answers.json").read_text())
right = sum(given.get(id) == answer for id, answer in key.items())
(folder / "results.json").write_text(json.dumps({RESULT}))
"""


def plain(root: Path, result: str = '{"accuracy": right / len(key)}', items: int = 40) -> Path:
    """A plain folder whose evaluator knows no items, only a figure."""
    for part in ("data/public", "data/private", "reference"):
        (root / part).mkdir(parents=True)
    (root / "data/public/task.md").write_text("# Guess\n")
    (root / "data/public/evaluate.py").write_text(EVALUATOR.replace("{RESULT}", result))
    (root / "data/private/answers.json").write_text(json.dumps({f"q{n}": n % 2 for n in range(items)}))
    (root / "reference/reference_target_agent.py").write_text("pass")
    (root / "reference/requirements.txt").write_text("# nothing\n")
    return root


async def judged(task: Task, outputs: Mapping[str, bytes], home: Path, split: Split = "dev") -> Scored | AttemptFailed:
    blobs, private = MemoryBlobs(), MemoryBlobs()
    told = await register(task, blobs, private, 8)
    ran = logged("g0a", split).model_copy(update={"outputs": await store_tree(blobs, outputs)})
    records = recorded(told, *OPENING[1:], asked("g0a", split), ran)
    ports = Ports(MemoryBus(blobs), blobs, Bubblewrap(), SystemTime(), None, home, private)  # type: ignore[arg-type]
    (event,) = await evaluator.performs[ExecutionLogged](Work(fold(records), records[-1], ports), ran)
    assert isinstance(event, Scored | AttemptFailed)
    return event


@pytest.fixture
async def home(pytestconfig: pytest.Config) -> Path:
    """A home that has pandas laid down for evaluators; kept from one session to the next."""
    assert pytestconfig.cache
    home = Path(pytestconfig.cache.mkdir("sia-packages"))
    await lay_down(home, PACKAGES)
    return home


def with_packages(package: Path, name: str, root: Path) -> Task:
    """SIA's task with a shorter requirements.txt, so that tests do not install what its evaluator never imports."""
    shutil.copytree(package / "tasks" / name, root / name, ignore=shutil.ignore_patterns("training_data"))
    (root / name / "reference/requirements.txt").write_bytes(PACKAGES if name == "lawbench" else b"")
    return load_task(root / name)


@pytest.mark.parametrize(
    ("name", "body", "ids"),
    [
        ("a.json", [{"id": n} for n in range(20)], 20),
        ("a.json", [{"question_id": f"q{n}", "id": "same"} for n in range(20)], 0),
        ("a.json", {f"q{n}": n for n in range(25)}, 25),
        ("a.json", {f"q{n}": n for n in range(19)}, 0),
        ("a.json", [1, 2, 3], 0),
        ("a.json", "{", 0),
        ("a.jsonl", "".join(json.dumps({"id": f"i{n}"}) + "\n" for n in range(20)), 20),
        ("a.csv", "id,label\n" + "".join(f"{n},x\n" for n in range(20)), 20),
        ("a.csv", "PassengerId,label\n" + "".join(f"p{n},x\n" for n in range(20)), 20),
        ("a.csv", "name,label\n" + "".join(f"p{n},x\n" for n in range(20)), 0),
        ("a.csv", "id,label\n" + "".join(f"{n % 5},x\n" for n in range(20)), 0),
        ("a.txt", "whatever", 0),
    ],
)
def test_a_key_is_a_file_with_an_answer_an_id(name: str, body: object, ids: int):
    key = find_key({name: (body if isinstance(body, str) else json.dumps(body)).encode()})
    assert (len(key.ids) if key else 0) == ids


def test_where_two_files_could_be_the_key_there_is_none():
    body = json.dumps({f"q{n}": n for n in range(20)}).encode()
    assert find_key({"a.json": body, "b.json": body}) is None


def test_ids_are_dealt_once_each_and_the_same_way_whatever_their_order():
    ids = [f"q{n}" for n in range(200)]
    splits = deal(ids)
    assert {name: len(part) for name, part in splits.items()} == {"dev": 50, "gate": 100, "test": 50}
    assert sorted(id for part in splits.values() for id in part) == sorted(ids)
    assert {name: set(part) for name, part in deal(ids[::-1]).items()} == {n: set(p) for n, p in splits.items()}


@pytest.mark.parametrize("name", ["gpqa", "lawbench", "longcot-chess"])
def test_sias_own_keys_are_found_and_cut_in_their_own_format(sia_package: Path, name: str):
    task = load_task(sia_package / "tasks" / name)
    private = private_files(task)
    key = find_key(private)
    assert key
    wanted = plain_splits(task)["dev"]
    cut = keep_only(key.file, private[key.file], wanted)
    if key.file.endswith(".csv"):
        rows = {row["id"]: row for row in csv.DictReader(io.StringIO(private[key.file].decode()))}
        assert {row["id"]: row for row in csv.DictReader(io.StringIO(cut.decode()))} == {id: rows[id] for id in wanted}
    else:
        whole, some = json.loads(private[key.file]), json.loads(cut)
        assert some == (
            {id: whole[id] for id in whole if id in wanted}
            if isinstance(whole, dict)
            else [row for row in whole if str(row["id"]) in wanted]
        )


def test_a_task_without_an_evaluator_is_refused_with_how_to_write_one(sia_package: Path):
    with pytest.raises(TaskError, match=r"spaceship-titanic: no evaluator: neither .*Write one that is started as"):
        load_task(sia_package / "tasks/spaceship-titanic")


async def test_no_answer_is_among_what_runners_and_agents_can_read(sia_package: Path):
    blobs, private = MemoryBlobs(), MemoryBlobs()
    told = await register(load_task(sia_package / "tasks/longcot-chess"), blobs, private, 8)
    assert set(told.datasets) == {"train", "dev", "gate", "test"} and len(set(told.datasets.values())) == 1
    public = await load_tree(blobs, told.datasets["dev"])
    assert set(public) == {"task.md", "chess_hard.json"}
    assert told.judge
    judge = await load_tree(private, told.judge)
    assert {"data/private/answers.json", "data/public/evaluate.py", "data/public/chess_hard.json"} <= set(judge)
    assert told.sizes == {"dev": 12, "gate": 25, "test": 13}


def letters(task: Task, ids: tuple[str, ...], letter: str | None = None) -> bytes:
    """A submission for gpqa: the right letters, or one letter throughout."""
    key = {str(row["id"]): row for row in json.loads(private_files(task)["diamond_questions.json"])}
    rows = [{"question_id": int(id), "model_answer": letter or key[id]["correct_answer_letter"]} for id in ids]
    return json.dumps({"details": rows}).encode()


@BOXED
async def test_an_answer_that_is_not_given_counts_where_sias_accuracy_leaves_it_out(sia_package: Path, tmp_path: Path):
    task = with_packages(sia_package, "gpqa", tmp_path)
    dev = plain_splits(task)["dev"]
    one = await judged(task, {"results/submission.json": letters(task, dev[:1])}, tmp_path)
    assert isinstance(one, Scored)
    assert sum(one.items) == 1 and one.score.n == 50 and one.failures == {"unanswered": 49}


@BOXED
async def test_the_items_of_another_split_neither_help_nor_harm(sia_package: Path, tmp_path: Path):
    task = with_packages(sia_package, "gpqa", tmp_path)
    splits = plain_splits(task)
    submission = {"results/submission.json": letters(task, splits["dev"])}
    scores = [await judged(task, submission, tmp_path, split) for split in ("dev", "gate")]
    assert isinstance(scores[0], Scored) and scores[0].score.value == 1.0
    assert isinstance(scores[1], Scored) and scores[1].score.value == 0.0


@BOXED
async def test_a_results_file_that_an_agent_forges_is_not_read(sia_package: Path, tmp_path: Path):
    task = with_packages(sia_package, "gpqa", tmp_path)
    forged = json.dumps({"accuracy": 0.999, "details": [{"question_id": 1, "is_correct": True}]}).encode()
    event = await judged(task, {"results.json": forged}, tmp_path)
    assert isinstance(event, AttemptFailed) and event.kind == "invalid_output"
    assert "evaluate.py ended with crash" in event.message


@BOXED
async def test_a_row_that_is_submitted_over_and_over_is_refused(sia_package: Path, tmp_path: Path):
    task = with_packages(sia_package, "longcot-chess", tmp_path)
    key = json.loads(private_files(task)["answers.json"])
    once = [{"question_id": id, "solution": key[id]} for id in plain_splits(task)["dev"]]
    good = await judged(task, {"responses.json": json.dumps(once[:6]).encode()}, tmp_path)
    assert isinstance(good, Scored) and good.score.value == 0.5 and good.failures == {"unanswered": 6}
    thrice = await judged(task, {"responses.json": json.dumps(once[:1] * 3).encode()}, tmp_path)
    assert isinstance(thrice, AttemptFailed) and "twice" in thrice.message


@BOXED
async def test_an_evaluator_of_one_figure_judges_ten_blocks(sia_package: Path, tmp_path: Path, home: Path):
    task = with_packages(sia_package, "lawbench", tmp_path)
    rows = list(csv.DictReader(io.StringIO(private_files(task)["test.csv"].decode())))
    wrong = set(plain_splits(task)["dev"][:57])
    lines = [f"{row['id']},{'nothing' if row['id'] in wrong else row['label']}" for row in rows]
    event = await judged(task, {"submission.csv": "\n".join(["id,label", *lines]).encode()}, home)
    assert isinstance(event, Scored)
    assert len(event.items) == event.score.n == 10
    assert event.score.value == pytest.approx(0.75, abs=0.01)
    assert event.score.low < 0.75 < event.score.high


@BOXED
async def test_where_items_cannot_be_told_apart_the_figure_is_one_and_says_nothing(tmp_path: Path):
    task = load_task(plain(tmp_path / "guess", items=5))
    told = await register(task, MemoryBlobs(), private := MemoryBlobs(), 8)
    assert decode_answers(await private.get(told.answers)) == {s: {WHOLE: ""} for s in ("dev", "gate", "test")}
    event = await judged(task, {"answers.json": b'{"q0": 0, "q2": 0}'}, tmp_path)
    assert isinstance(event, Scored) and event.items == (0.4,) and event.score.n == 1


@BOXED
async def test_a_task_can_say_that_its_items_belong_together(tmp_path: Path):
    root = plain(tmp_path / "guess")
    (root / "task.toml").write_text("held_out = false\n")
    event = await judged(load_task(root), {"answers.json": b'{"q0": 0}'}, tmp_path)
    assert isinstance(event, Scored) and event.items == (0.025,)


@BOXED
@pytest.mark.parametrize(
    ("result", "items"),
    [
        ('{"accuracy": 40.0}', 0.4),
        ('{"accuracy": 0.4}', 0.4),
        ('{"accuracy_percent": 40}', 0.4),
        ('{"summary": {"correct": right, "total_questions": len(key)}}', 0.4),
        ('{"f1": 0.4}', None),
        ("[1]", None),
    ],
)
async def test_a_figure_is_read_as_a_fraction(tmp_path: Path, result: str, items: float | None):
    task = load_task(plain(tmp_path / "guess", result, items=5))
    event = await judged(task, {"answers.json": b'{"q0": 0, "q2": 0}'}, tmp_path)
    if items is None:
        assert isinstance(event, AttemptFailed) and event.kind == "invalid_output"
    else:
        assert isinstance(event, Scored) and event.items == (items,)


@BOXED
async def test_a_metric_of_another_name_is_stated(tmp_path: Path):
    root = plain(tmp_path / "guess", '{"rmse": 1.5}', items=5)
    (root / "task.toml").write_text('metric = "rmse"\ndirection = "minimize"\n')
    event = await judged(load_task(root), {"answers.json": b"{}"}, tmp_path)
    assert isinstance(event, Scored) and event.items == (1.5,)


@BOXED
async def test_packages_that_nobody_laid_down_are_named_with_the_command(tmp_path: Path):
    root = plain(tmp_path / "guess")
    (root / "reference/requirements.txt").write_text("numpy\n")
    with pytest.raises(PackagesMissing, match=r"asks for numpy, .*-m pip install --target .* numpy"):
        await judged(load_task(root), {"answers.json": b"{}"}, tmp_path)


def test_a_list_of_packages_has_one_folder_however_it_is_written(tmp_path: Path):
    assert folder(tmp_path, b"b\na # why\n\n") == folder(tmp_path, b"a\r\nb")
    assert folder(tmp_path, b"a") != folder(tmp_path, b"b")


def test_a_plain_folder_without_a_list_gets_sias(sia_package: Path):
    assert {"anthropic", "openai", "pandas"} <= set(listed(requirements(load_task(sia_package / "tasks/gpqa")) or b""))


AGENT = """
import json, os, pathlib, sys, urllib.request
data, work = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[4])
body = json.dumps({"messages": [{"role": "user", "content": "A or B?"}]}).encode()
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
urllib.request.urlopen(urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers))
rows = json.loads((data / "diamond_questions.json").read_text())
(work / "results").mkdir()
details = [{"question_id": row["id"], "model_answer": "A"} for row in rows]
(work / "results/submission.json").write_text(json.dumps({"details": details}))
"""


@BOXED
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gpqa", "g0a on dev failed: crash: .*No module named 'openai'"),
        ("lawbench", "g0a on dev failed: crash: .*No module named 'openai'"),
        ("longcot-chess", "g0a on dev failed: crash: "),
        ("spaceship-titanic", "no evaluator: neither data/public/evaluate.py nor evaluate.py"),
    ],
)
def test_each_of_sias_tasks_starts_under_its_own_command_line(
    sia_package: Path, tmp_path: Path, home: Path, name: str, told: str
):
    shutil.copytree(sia_package / "tasks" / name, tmp_path / "tasks" / name)
    (tmp_path / "tasks" / name / "reference/requirements.txt").write_bytes(PACKAGES if name == "lawbench" else b"")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/environments").symlink_to(home / "environments")
    words = ("--task", name, "--max_gen", 2, "--run_id", 1, "--backend", "builtin", "--task_model", "instant/first")
    done = sia(tmp_path / "home", *words, SIA_TASKS_DIR=str(tmp_path / "tasks"))
    assert done.returncode == (2 if name == "spaceship-titanic" else 1)
    assert "Traceback" not in done.stderr
    assert re.search(told, done.stderr), done.stderr


@BOXED
def test_an_agent_of_ones_own_is_judged_by_sias_evaluator_to_the_sealed_end(sia_package: Path, tmp_path: Path):
    shutil.copytree(sia_package / "tasks/gpqa", tmp_path / "tasks/gpqa")
    (tmp_path / "tasks/gpqa/reference/requirements.txt").write_bytes(b"")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "agent.py").write_text(AGENT)
    profile = {"profile_id": "p", "name": "p", "model": "m", "provider_id": "other"}
    (tmp_path / "profiles/p.json").write_text(json.dumps({**profile, "agent_reference": {"source": "../agent.py"}}))
    (tmp_path / "providers").mkdir()
    provider = {"provider_id": "other", "name": "o", "client_kind": "openai", "api_key_env": "NONE"}
    (tmp_path / "providers/other.json").write_text(json.dumps(provider))
    more = {f"SIA_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("TASKS", "PROFILES", "PROVIDERS")}
    words = ("--task", "gpqa", "--max_gen", 2, "--run_id", 3, "--backend", "builtin", "--target-agent-profile", "p")
    done = sia(tmp_path / "home", *words, "--task_model", "instant/first", **more)
    assert done.returncode == 0, done.stderr
    assert "every attempt answers all items, of which count: dev 50, gate 99, test 49" in done.stderr
    told = answered(tmp_path / "home", "show", "run_3")
    assert told["outcome"] == "no proven gain" and told["held_out"]
    (version,) = told["generations"]
    assert {split: score["n"] for split, score in version["scores"].items()} == {"dev": 50, "gate": 99, "test": 49}
    assert told["sealed"]["gain"] == 0


@BOXED
def test_a_score_that_is_not_held_out_is_told_in_the_first_lines_and_in_what_is_shown(tmp_path: Path):
    root = plain(tmp_path / "guess", items=5)
    (root / "reference/reference_target_agent.py").write_text(
        "import sys; open(sys.argv[4] + '/answers.json', 'w').write('{}')"
    )
    done = sia(tmp_path / "home", "--task_dir", root, "--backend", "builtin", "--task_model", "instant/first")
    assert done.returncode == 0, done.stderr
    assert "SCORE IS NOT HELD OUT: no answer key with ids" in done.stderr
    assert "SCORE IS NOT HELD OUT" in sia(tmp_path / "home", "show", "run_1").stdout


def test_weights_cannot_be_learned_where_nothing_is_held_out(tmp_path: Path):
    root = plain(tmp_path / "guess", items=5)
    done = sia(tmp_path / "home", "--task_dir", root, "--focus", "weights", "--task_model", "instant/first")
    assert done.returncode == 2 and "so nothing is held out" in done.stderr
    assert not (tmp_path / "home").exists()


@BOXED
@pytest.mark.parametrize("same", [True, False])
async def test_packages_that_a_candidate_adds_are_its_crash_and_those_of_the_first_agent_this_machines_lack(
    tmp_path: Path, same: bool
):
    blobs = MemoryBlobs()
    lists = [b"numpy\n", b"numpy\n" if same else b"numpy\nscipy\n"]
    first, later = [await store_tree(blobs, {"target_agent.py": b"pass", "requirements.txt": body}) for body in lists]
    told = await register(load_task(plain(tmp_path / "guess")), blobs, MemoryBlobs(), 8)
    opening = (
        told.model_copy(update={"reference": first}),
        OPENING[1],
        proposed().model_copy(update={"harness": later}),
    )
    records = recorded(*opening, asked("g0a", "dev"))
    ports = Ports(MemoryBus(blobs), blobs, Bubblewrap(), SystemTime(), None, tmp_path)  # type: ignore[arg-type]
    work = Work(fold(records), records[-1], ports)
    if same:
        with pytest.raises(PackagesMissing, match="once: "):
            await attempt(work, asked("g0a", "dev"))
    else:
        (event,) = await attempt(work, asked("g0a", "dev"))
        assert isinstance(event, AttemptFailed) and event.kind == "crash" and "asks for numpy, scipy" in event.message
