"""What is a harness and what is not, and which reply makes one."""

import pytest

from sia_events.agents.check import MAX_FILE, MAX_FILES, changed, problems, without_caches
from sia_events.agents.direct import Patch, patched, read_patch
from sia_events.agents.structured import Unusable

AGENT = {"target_agent.py": b"print('an agent')\n"}


def test_an_entry_point_with_modules_and_texts_is_a_harness():
    assert problems({**AGENT, "lib/ask.py": b"x = 1\n", "prompt.txt": "Wörter".encode(), "requirements.txt": b""}) == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"agent.py": b""}, "target_agent.py is missing"),
        ({**AGENT, "a.py": b"def f(:\n"}, "a.py does not compile: line 1"),
        ({**AGENT, "a.py": b"return 1\n"}, "a.py does not compile: line 1: 'return' outside function"),
        ({**AGENT, "a.py": b"x = 1\0\n"}, "a.py does not compile"),
        ({**AGENT, "a.py": b"(" * 50_000}, "a.py does not compile"),
        ({**AGENT, "../a.py": b""}, "'../a.py' leads out of the harness"),
        ({**AGENT, "/etc/passwd": b""}, "'/etc/passwd' leads out of the harness"),
        ({**AGENT, "a/../../b": b""}, "leads out of the harness"),
        ({**AGENT, "a//b": b""}, "write it as 'a/b'"),
        ({**AGENT, "": b""}, "no plain path"),
        ({**AGENT, "a\nb": b""}, "no name for a file"),
        ({**AGENT, "a\\b": b""}, "no name for a file"),
        ({**AGENT, "\ud800": b""}, "no name for a file"),
        ({**AGENT, "x" * 201: b""}, "no name for a file"),
        ({**AGENT, "a": b"", "a/b": b""}, "a is a file and a folder at once"),
        ({**AGENT, "a.bin": b"\xff\xfe"}, "a.bin is not UTF-8 text"),
        ({**AGENT, "big.txt": b"x" * (MAX_FILE + 1)}, "big.txt has 2,000,001 bytes"),
        ({**AGENT, **{f"{n}.txt": b"" for n in range(MAX_FILES)}}, "there are 201 files"),
        ({**AGENT, **{f"{n}.txt": b"x" * MAX_FILE for n in range(5)}}, "bytes together"),
    ],
)
def test_what_is_no_harness_is_told_why(files: dict[str, bytes], said: str):
    found = problems(files)
    assert any(said in problem for problem in found), found
    "\n".join(found).encode()


def test_code_is_compiled_and_never_run(tmp_path):
    target = tmp_path / "ran"
    assert problems({"target_agent.py": f"open({str(target)!r}, 'w')\n".encode()}) == []
    assert not target.exists()


def test_what_changed_are_paths_added_removed_and_rewritten():
    assert changed({"a": b"1", "b": b"1", "c": b"1"}, {"a": b"1", "b": b"2", "d": b"1"}) == ("b", "c", "d")


@pytest.mark.parametrize(
    "text",
    [
        '{"note": "n", "files": {"target_agent.py": "x = {}\\n"}}',
        'Here it is:\n```json\n{"note": "n", "files": {"target_agent.py": "x = {}\\n"}}\n```\nGood luck.',
        # A line's end within the string, unescaped, as models send it.
        '{"note": "n", "files": {"target_agent.py": "x = {}\n"}}',
        "n\n\n```python\nx = {}\n```\n",
    ],
)
def test_an_object_a_fenced_object_and_one_block_of_python_are_read_alike(text: str):
    assert read_patch(text) == Patch("n", {"target_agent.py": "x = {}\n"}, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("I would rather talk about it.", "no code"),
        ("```python\na = 1\n```\nor\n```python\na = 2\n```\n", "2 ```python blocks"),
        ('{"files": {"target_agent.py": 7}}', "Expected `str`, got `int`"),
        ('{"files": ["target_agent.py"]}', "not of the form"),
        ("[" * 100_000 + "{" * 100_000 + "}", "no code"),
        ("{'files': {}}", "no code"),
    ],
)
def test_a_reply_of_another_form_is_told_so(text: str, said: str):
    with pytest.raises(Unusable, match=said):
        read_patch(text)


def test_a_patch_keeps_what_it_does_not_name_and_deletes_what_it_says():
    before = {**AGENT, "old.txt": b"", "kept.txt": b"k"}
    after = patched(before, Patch("", {"new.txt": "ü"}, ["old.txt", "never.txt"]))
    assert after == {**AGENT, "kept.txt": b"k", "new.txt": "ü".encode()}


def test_a_patch_that_changes_nothing_or_leaves_no_harness_is_none():
    with pytest.raises(Unusable, match="changes nothing"):
        patched(AGENT, Patch("", {"target_agent.py": AGENT["target_agent.py"].decode()}))
    with pytest.raises(Unusable, match=r"target_agent\.py is missing"):
        patched(AGENT, Patch("", {}, ["target_agent.py"]))
    with pytest.raises(Unusable, match="not UTF-8"):
        patched(AGENT, Patch("", {"a.txt": "\ud800"}))


def test_what_an_interpreter_leaves_is_no_part_of_a_harness():
    left = {"__pycache__/lib.cpython-311.pyc": b"\x00\xff", "tools/__pycache__/x.pyc": b"\xff"}
    assert without_caches({"target_agent.py": b"", **left}) == {"target_agent.py": b""}
