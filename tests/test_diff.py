"""What `sia diff` says of two versions, for programs and for people."""

from typing import Any

from given import recorded
from story import ACCEPTED, feedback_asked, patched, registered, scored, trained

from sia_events.reading import changes, file_diffs
from sia_events.views.comparisons import pair_lines
from sia_events.views.summaries import diff_text

PAST = (*ACCEPTED, feedback_asked(1), patched("g1a", edits=("few_shot", "vote")), scored("g1a", "dev", "1110"))


def said(*past: Any, before: str, after: str, **files: str) -> list[str]:
    return diff_text({**changes(recorded(*past), before, after), "files": files}).splitlines()


def test_a_harness_version_has_its_edits_and_what_it_gained_on_the_splits_that_both_were_scored_on():
    found = changes(recorded(*PAST), "g0a", "g1a")
    assert (found["versions"]["g1a"]["lever"], found["versions"]["g1a"]["edits"]) == ("harness", ["few_shot", "vote"])
    assert found["gains"].keys() == {"dev"} and found["adapters"] == [None, None]
    gain = found["gains"]["dev"]
    assert (gain["gain"], gain["better"], gain["worse"], gain["n"]) == (0.5, 2, 0, 4)
    lines = said(*PAST, before="g0a", after="g1a", harness="--- g0a/harness.json")
    assert lines[1:3] == ["  g0a   first agent", "  g1a   harness of g0a: few_shot + vote"]
    assert "  gain  dev +0.500 [-0.419, +1.419]" in lines and "  same adapter: none" in lines
    assert lines[-1] == "--- g0a/harness.json"


def test_a_weights_version_has_another_adapter_and_the_same_harness():
    lines = said(*ACCEPTED, feedback_asked(1), trained("g1a", "g0a"), before="g0a", after="g1a")
    assert lines[1:3] == ["  g0a   first agent", "  g1a   weights of g0a"]
    assert f"  adapter none -> {'b' * 12}" in lines and lines[-1] == "  same harness"
    assert not any(line.startswith("  gain") for line in lines)


def test_asked_the_other_way_round_the_first_named_stands_first_and_a_gain_is_a_loss():
    lines = said(*PAST, before="g1a", after="g0a")
    assert [line.split()[0] for line in lines[1:5]] == ["g1a", "g0a", "g1a", "g0a"]
    assert lines[5].startswith("  gain  dev -0.500")


def test_where_less_is_better_a_lower_score_is_a_gain():
    found = changes(recorded(registered(maximize=False), *PAST[1:]), "g1a", "g0a")
    assert found["scores"]["g0a"]["dev"]["value"] < found["scores"]["g1a"]["dev"]["value"]
    assert found["gains"]["dev"]["gain"] == 0.5


def test_files_that_differ_in_no_line_are_told_in_words():
    old = {"a.py": b"x\n", "b.py": b"", "c.py": b"same\n"}
    new = {"a.py": b"x\r\n", "__init__.py": b"", "c.py": b"same\n"}
    assert file_diffs(old, new, "g0a", "g1a") == {
        "__init__.py": "an empty file is new",
        "a.py": "the same lines, in other bytes: line ends, or what is no text",
        "b.py": "an empty file is gone",
    }
    pair = {"before": "r1", "after": "r2", "fork": None, "versions": ["g0a", "g1a"], "splits": {}}
    pair["adapters"] = [None, None]
    told = pair_lines({**pair, "files": file_diffs(old, new, "g0a", "g1a")})
    assert "__init__.py (an empty file is new)" in told[-1] and "the same lines" in told[-1]
    assert pair_lines({**pair, "files": {}})[-1] == "  harness the same"
    nothing = pair_lines({**pair, "versions": ["g0a", None], "files": {}})[-1]
    assert nothing == "  harness not compared: one of them is not there"
