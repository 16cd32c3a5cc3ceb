import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from sia_events.shared.items import Item, split
from sia_events.shared.task import (
    TaskError,
    answers,
    digest,
    evaluator_file,
    find_task,
    load_task,
    public_files,
    reference_agent,
    split_names,
)

LABELS = ("hot", "cold")
TOML = """\
evaluator = "labels"
labels = ["hot", "cold"]
question = "Hot or cold?"
[splits]
seed = 1
dev = 4
gate = 6
test = 8
"""


def item(number: int) -> Item:
    return Item(id=f"i{number:03}", text=f"place {number}", label=LABELS[number % 2])


def write_items(folder: Path, items: list[Item]) -> None:
    lines = [json.dumps({"id": each.id, "text": each.text, "label": each.label}) for each in items]
    (folder / "data/private/items.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A labelled task of 40 items."""
    (tmp_path / "data/public").mkdir(parents=True)
    (tmp_path / "data/private").mkdir()
    (tmp_path / "data/public/task.md").write_text("# Hot or cold\n\nSay which.\n")
    (tmp_path / "task.toml").write_text(TOML)
    write_items(tmp_path, [item(number) for number in range(40)])
    return tmp_path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder of SIA's layout: no task.toml."""
    for name, text in {
        "data/public/task.md": "# Guess\n",
        "data/public/questions/a.csv": "a\n",
        "data/public/evaluate.py": "print('scored')\n",
        "data/private/answers.json": "[]",
        "reference/reference_target_agent.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def ids(files: dict[str, bytes], name: str) -> list[str]:
    return [json.loads(line)["id"] for line in files[name].splitlines()]


def test_splits_are_disjoint_complete_and_have_the_stated_sizes(folder: Path):
    task = load_task(folder)
    parts = {name: set(answers(task, name)) for name in split_names(task)}
    assert {name: len(part) for name, part in parts.items()} == {"train": 22, "dev": 4, "gate": 6, "test": 8}
    assert len(set().union(*parts.values())) == 40


def test_every_split_is_balanced_over_the_labels(folder: Path):
    task = load_task(folder)
    for name in split_names(task):
        assert len(set(Counter(answers(task, name).values()).values())) == 1, name


def test_splits_of_unequal_labels_keep_their_proportions():
    items = [Item(id=f"{number}", text="", label="rare" if number % 4 == 0 else "common") for number in range(400)]
    for part in split(items, 3, {"test": 80, "gate": 40}).values():
        assert sum(each.label == "rare" for each in part) == pytest.approx(len(part) / 4, abs=1)


def test_a_split_does_not_depend_on_the_order_of_items_but_on_the_seed():
    items = [item(number) for number in range(40)]
    assert split(items, 1, {"test": 8}) == split(items[::-1], 1, {"test": 8})
    assert split(items, 1, {"test": 8}) != split(items, 2, {"test": 8})


def test_the_order_within_a_split_tells_nothing_about_labels():
    items = [item(number) for number in range(4000)]
    labels = [each.label for each in split(items, 1, {"test": 2000})["test"]]
    changes = sum(before != after for before, after in pairwise(labels))
    assert changes / len(labels) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", ["train", "dev", "gate", "test"])
@pytest.mark.parametrize("limit", [None, 3])
def test_an_attempt_never_gets_the_label_of_an_item_it_is_asked(folder: Path, name: str, limit: int | None):
    files = public_files(load_task(folder), name, limit=limit)
    assert set(ids(files, "items.jsonl")).isdisjoint(ids(files, "train.jsonl"))
    assert all(set(json.loads(line)) == {"id", "text"} for line in files["items.jsonl"].splitlines())
    assert "evaluate.py" not in files and not any("private" in file for file in files)


def test_the_head_of_the_examples_is_the_same_on_every_split(folder: Path):
    task = load_task(folder)
    heads = {tuple(ids(public_files(task, name, limit=3), "train.jsonl")[:10]) for name in split_names(task)}
    assert len(heads) == 1


def test_repeated_samples_are_ids_of_their_own_with_the_same_text_and_answer(folder: Path):
    task = load_task(folder)
    files = public_files(task, "train", samples=3, limit=2)
    asked = [json.loads(line) for line in files["items.jsonl"].splitlines()]
    assert [line["id"].partition("#")[2] for line in asked] == ["0", "1", "2"] * 2
    assert len({line["text"] for line in asked}) == 2
    assert list(answers(task, "train", samples=3, limit=2)) == [line["id"] for line in asked]


def test_a_plain_sia_folder_is_one_split_that_gets_all_public_data_but_the_evaluator(plain: Path):
    task = load_task(plain)
    assert split_names(task) == ("whole",)
    assert set(public_files(task, "whole")) == {"task.md", "questions/a.csv"}
    assert task.title == "Guess"
    assert evaluator_file(task) == plain / "data/public/evaluate.py"
    assert reference_agent(task) == plain / "reference/reference_target_agent.py"


def test_an_evaluator_at_the_root_serves_where_public_data_has_none(plain: Path):
    (plain / "data/public/evaluate.py").rename(plain / "evaluate.py")
    assert evaluator_file(load_task(plain)) == plain / "evaluate.py"


def test_items_of_a_plain_folder_cannot_be_asked_for(plain: Path):
    with pytest.raises(TaskError, match="whole"):
        public_files(load_task(plain), "train")
    with pytest.raises(TaskError, match="Its splits: whole"):
        answers(load_task(plain), "whole")


def test_a_public_link_out_of_public_data_is_refused(plain: Path):
    os.symlink("../private/answers.json", plain / "data/public/notes.json")
    with pytest.raises(TaskError, match=r"notes\.json: a link to outside"):
        public_files(load_task(plain), "whole")


def test_the_digest_changes_with_the_data_and_not_with_the_place(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
):
    before = digest(load_task(folder))
    moved = tmp_path_factory.mktemp("elsewhere") / "task"
    folder.rename(moved)
    assert digest(load_task(moved)) == before
    write_items(moved, [item(number) for number in range(39)])
    assert digest(load_task(moved)) != before


def test_an_unknown_task_is_answered_with_the_known_ones_and_the_nearest():
    with pytest.raises(TaskError, match=r"no task 'wrods'.*Did you mean words\?.*Built in: .*words"):
        find_task("wrods")


def test_a_task_is_found_by_its_path(folder: Path):
    assert find_task(str(folder)).path == folder


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("data/public/task.md", None, r"task\.md: missing"),
        ("data/private/items.jsonl", None, r"private: no private data"),
        ("task.toml", "evaluator = !", r"task\.toml: not valid TOML: .*line 1"),
        ("task.toml", TOML.replace("question", "qestion"), r"unknown key 'qestion'\. Did you mean question\?"),
        ("task.toml", TOML + "[limits]\nwal_s = 3\n", r"unknown key 'limits\.wal_s'\. Did you mean wall_s\?"),
        ("task.toml", "name = 'x'\n" + TOML, r"unknown key 'name'"),
        ("task.toml", TOML.replace("dev = 4", "dev = 'four'"), r"splits\.dev: .*valid integer.*'four'"),
        ("task.toml", TOML.replace("dev = 4", "dev = 0"), r"splits\.dev: .*greater than 0"),
        ("task.toml", TOML.replace("test = 8", "test = 30"), r"takes 40 of 40 items and leaves none to train on"),
        ("task.toml", TOML.replace('question = "Hot or cold?"', ""), r'evaluator = "labels" needs labels, question'),
        ("task.toml", 'direction = "minimize"\n' + TOML, r"counts right answers: leave direction out"),
        ("task.toml", TOML + "[words]\nmild = 'lukewarm'\n", r"\[words\] names 'mild', which is not one of the labels"),
        ("task.toml", 'evaluator = "evaluate.py"', r"no evaluator"),
        ("data/private/items.jsonl", '{"id": "a", "text": "b"}\n', r"items\.jsonl:1: no item .*: Field required"),
        (
            "data/private/items.jsonl",
            '{"id": "a", "text": "b", "label": "mild"}',
            r":1: label 'mild' is not one of hot, cold",
        ),
        ("data/private/items.jsonl", '{"id": "a#1", "text": "b", "label": "hot"}', r":1: id 'a#1' has a '#'"),
    ],
)
def test_a_faulty_folder_is_refused_with_the_place_and_the_fault(
    folder: Path, file: str, content: str | None, message: str
):
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(TaskError, match=message):
        load_task(folder)


@pytest.mark.parametrize(
    ("twin", "kind"), [(Item("i000", "another place", "hot"), "id"), (Item("i999", "place 0", "cold"), "text")]
)
def test_an_id_or_a_text_that_stands_there_twice_is_refused(folder: Path, twin: Item, kind: str):
    write_items(folder, [*(item(number) for number in range(40)), twin])
    with pytest.raises(TaskError, match=rf"items\.jsonl:41: the same {kind} as line 1"):
        load_task(folder)


def test_an_evaluator_that_does_not_compile_is_refused(plain: Path):
    (plain / "data/public/evaluate.py").write_text("def evaluate(:\n")
    with pytest.raises(TaskError, match=r"evaluate\.py: does not compile"):
        load_task(plain)
