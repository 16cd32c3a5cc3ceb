"""The fail points: the registry has those of the sources and nothing else; and one kills when it is its time."""

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from points import POINTS

ROOT = Path(__file__).parent.parent.parent
APART = {"tests", "build", "dist"}
PASSING = "from sia_events.shared.failpoints import reach\nfor n in range(4): print(n, flush=True); reach('here')"


def named(argument: ast.expr) -> str:
    """A point's name, with {} for each part that is put in."""
    if isinstance(argument, ast.Constant):
        return str(argument.value)
    assert isinstance(argument, ast.JoinedStr), "a point's name stands where it is reached"
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in argument.values)


def test_every_point_that_is_reached_is_in_the_registry_and_the_other_way_round():
    files = [f for f in ROOT.rglob("*.py") if not any(p in APART or p[0] == "." for p in f.relative_to(ROOT).parts)]
    texts = [text for text in (file.read_text() for file in files) if "reach(" in text]
    calls = [node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    found = {named(c.args[0]) for c in calls if isinstance(c.func, ast.Name) and c.func.id == "reach"}
    assert found == {*POINTS}


@pytest.mark.parametrize(("fail_at", "times"), [("here", 1), ("here #3", 3), ("elsewhere", 4)])
def test_a_point_kills_the_first_time_that_it_is_reached_or_the_nth(fail_at: str, times: int):
    done = subprocess.run([sys.executable, "-c", PASSING], env={"SIA_FAIL_AT": fail_at}, capture_output=True, text=True)
    assert done.stdout.split() == [str(n) for n in range(times)]
    assert done.returncode == (0 if fail_at == "elsewhere" else -signal.SIGKILL)
