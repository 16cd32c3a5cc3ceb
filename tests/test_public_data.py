"""What the meta-agent is told of a task's data: of the public files alone, a few lines a file, whatever is in them."""

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sia_events.agents.public_data import summarise
from sia_events.infra.memory import MemoryBlobs
from sia_events.shared.items import TaskError
from sia_events.shared.registration import register
from sia_events.shared.task import load_task
from sia_events.shared.tree import load_tree

CANARY = "canary-4711"
KINDS = ("a.csv", "a.tsv", "a.json", "a.jsonl", "train.jsonl", "a.txt", "a")
# Two rows, thirty keys and thirty labels of sixty characters each, and the words around them.
MOST_CHARS = 6_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain task whose answers, and whose evaluator, which lies among the public files, hold a canary."""
    for part in ("data/public", "data/private", "reference"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "data/public/task.md").write_text("# Guess\n")
    (tmp_path / "data/public/train.jsonl").write_text('{"id": "t0", "label": "open"}\n')
    (tmp_path / "data/public/evaluate.py").write_text(f"right = {CANARY!r}")
    (tmp_path / "data/private/answers.json").write_text(msgspec.json.encode({"q0": CANARY}).decode())
    (tmp_path / "reference/reference_target_agent.py").write_text("pass")
    return tmp_path


async def told(folder: Path) -> str:
    """The summary that the meta-agent gets, which never sees the folder."""
    registered = await register(load_task(folder), blobs := MemoryBlobs(), MemoryBlobs(), 8)
    return summarise(await load_tree(blobs, registered.datasets["dev"]))


async def test_nothing_of_the_private_data_or_of_the_evaluator_is_told(folder: Path):
    summary = await told(folder)
    assert "labels: open 1" in summary
    assert CANARY not in summary and "evaluate.py" not in summary and "answers" not in summary


@pytest.mark.parametrize("link", ["notes.json", "deep/train.jsonl"])
@pytest.mark.parametrize("leads_to", ["data/private/answers.json", "/etc/passwd"])
async def test_a_link_is_not_followed_out_of_the_public_data(folder: Path, link: str, leads_to: str):
    place = folder / "data/public" / link
    place.parent.mkdir(exist_ok=True)
    os.symlink(folder / leads_to, place)
    with pytest.raises(TaskError, match="a link to outside data/public"):
        await told(folder)


async def test_a_folder_that_is_a_link_out_of_the_public_data_is_refused(folder: Path):
    os.symlink("../private", folder / "data/public/more")
    with pytest.raises(TaskError, match="a link to outside data/public"):
        await told(folder)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a.jsonl", b"".join(b'{"key number %d": 1}\n' % n for n in range(10_000))),
        ("a.jsonl", b'{"%s": "%s"}' % (b"k" * 100_000, b"v" * 100_000)),
        ("a.csv", ",".join(f"column {n}" for n in range(10_000)).encode() + b"\n1\n"),
        ("train.jsonl", b"".join(b'{"label": "label number %d"}\n' % n for n in range(10_000))),
        ("train.jsonl", b'{"label": "%s"}' % (b"x" * 100_000)),
        ("a.json", b'{"a": [%s]}' % b", ".join([b"1"] * 100_000)),
        ("a.json", b"[" * 10_000 + b"]" * 10_000),
        ("a.txt", b"no end " * 100_000),
    ],
    ids=["many keys", "long key", "many columns", "many labels", "long label", "long list", "deep", "long text"],
)
def test_a_file_takes_a_few_lines_however_large_it_is(name: str, body: bytes):
    assert len(summarise({name: body})) < MOST_CHARS


def test_how_many_keys_and_labels_are_left_out_is_said():
    rows = b"".join(b'{"k%d": 0, "label": "l%d"}\n' % (n, n) for n in range(50))
    summary = summarise({"train.jsonl": rows})
    assert "50 rows with k0, label, k1," in summary and " and 21 more; the first:" in summary
    assert summary.endswith("l29 1 and 20 more")


@settings(max_examples=200)
@given(name=st.sampled_from(KINDS), body=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode()))
def test_no_bytes_break_it(name: str, body: bytes):
    assert summarise({name: body}).startswith(f"- `{name}`, {len(body):,} bytes: ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200)
@given(name=st.sampled_from(("a.json", "a.jsonl", "train.jsonl")), rows=st.lists(JSON, max_size=4))
def test_no_rows_break_it(name: str, rows: list[object]):
    body = msgspec.json.encode(rows) if name == "a.json" else b"\n".join(map(msgspec.json.encode, rows))
    assert len(summarise({name: body})) < MOST_CHARS
