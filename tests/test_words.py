"""The built-in task `words`: what its data promises."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from sia_events.shared.task import answers, find_task, public_files, reference_agent, split_names

TASK = find_task("words")
WORDNET = Path("/usr/share/wordnet/data.noun")
ITEMS = [json.loads(line) for line in (TASK.path / "data/private/items.jsonl").read_text().splitlines()]


def texts(split: str) -> set[str]:
    return {json.loads(line)["text"] for line in public_files(TASK, split)["items.jsonl"].splitlines()}


def test_it_has_2800_items_the_same_number_a_label():
    assert Counter(item["label"] for item in ITEMS) == dict.fromkeys(TASK.labels, 350)


def test_the_splits_are_balanced_and_large_enough_to_be_scored_on():
    sizes = {name: Counter(answers(TASK, name).values()) for name in split_names(TASK)}
    assert {name: sum(count.values()) for name, count in sizes.items()} == {
        "train": 2016,
        "dev": 128,
        "gate": 256,
        "test": 400,
    }
    assert all(len(set(count.values())) == 1 for count in sizes.values())


def test_no_wording_stands_in_two_splits():
    def wordings(split: str) -> set[str]:
        return {" ".join(re.findall("[a-z]+", text.lower())) for text in texts(split)}

    parts = [wordings(name) for name in split_names(TASK)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(ITEMS)


def test_definitions_are_4_to_16_words_without_usage_examples():
    assert all(4 <= len(item["text"].split()) <= 16 and '"' not in item["text"] for item in ITEMS)


def test_ids_do_not_tell_the_label():
    # A hash of uniform spread: per label the mean of 350 is within 4 standard errors of the middle.
    spread = 4 * (1 / 12) ** 0.5 / 350**0.5
    for label in TASK.labels:
        places = [int(item["id"], 16) / 16**10 for item in ITEMS if item["label"] == label]
        assert abs(mean(places) - 0.5) < spread


def test_one_constant_answer_scores_the_stated_floor():
    right = answers(TASK, "test")
    assert {count / len(right) for count in Counter(right.values()).values()} == {TASK.floor}


@pytest.mark.skipif(not WORDNET.exists(), reason=f"{WORDNET} is not there: apt-get install wordnet-base")
def test_the_items_are_what_the_script_makes_of_wordnet(tmp_path: Path):
    made = tmp_path / "items.jsonl"
    subprocess.run([sys.executable, TASK.path / "make_items.py", WORDNET, made], check=True, capture_output=True)
    assert made.read_bytes() == (TASK.path / "data/private/items.jsonl").read_bytes()


def test_the_data_comes_with_its_origin_and_licence():
    notice = (TASK.path / "NOTICE").read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice and "make_items.py" in notice


def test_an_agent_is_told_of_every_file_and_every_label():
    files = public_files(TASK, "dev")
    description = files["task.md"].decode()
    assert all(f"`{name}`" in description for name in (*files, *TASK.labels) if name != "task.md")
    assert "`answers.jsonl`" in description


def test_the_reference_agent_is_there_and_compiles():
    agent = reference_agent(TASK)
    assert agent
    compile(agent.read_bytes(), str(agent), "exec")
