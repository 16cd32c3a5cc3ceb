"""What the documents say is so: their commands run, their tables are the code's, their tree is the disk's."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from command import SMALL, answered, environment
from typer.main import get_command

from sia_events.cli import cli
from sia_events.errors import MENDABLE
from sia_events.shared.events import EVENTS, Learning, RunSettings
from sia_events.shared.ports import Limits
from sia_events.shared.settings import TABLES, Settings
from sia_events.shared.task import Task

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
FOUND = {"path", "name", "description"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Each command of the console blocks in order, and the lines of output shown under it."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks(text, "console")).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def table(text: str, head: str) -> dict[str, str]:
    """First column to second, without back-quotes, of the table whose head begins so."""
    body = text.split(f"| {head} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip().strip("`") for cell in row.split("|")[1:3]] for row in body]
    return {first: second for first, second in rows}


def run_in(folder: Path, home: Path, command: str) -> subprocess.CompletedProcess[str]:
    """A documented command in `folder`; `sia` and `python` are those of these tests."""
    words = shlex.split(command)
    replaced = {"sia": [sys.executable, "-m", "sia_events"], "python": [sys.executable]}
    argv = [*replaced.get(words[0], [words[0]]), *words[1:]]
    return subprocess.run(argv, cwd=folder, env=environment(home), capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_the_commands_of_the_readme_run(home: Path, tmp_path: Path):
    made = answered(home, "run", "words", "--run", "r1", *SMALL)
    assert made["status"] == "finished"
    told = [command for command, _ in commands(README)]
    assert told[:2] == ["make run", "make test"]
    for command in told[:2]:
        assert subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True).returncode == 0, command
    for command in told[2:]:
        # Learning takes the real model; the branch is the same verb under the other lever.
        done = run_in(tmp_path, home, command.replace("lever=weights", "lever=harness"))
        assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.mark.slow  # half a minute of commands, one behind the other
def test_the_walk_through_a_task_of_your_own_is_true(home: Path, tmp_path: Path):
    """Files are taken from the page as they stand; every line of output shown there is printed."""
    text = DOCS["walkthrough"]
    for part in re.split(r"(?=^```console$)", text, flags=re.MULTILINE):
        for command, shown in commands(part):
            done = run_in(tmp_path, home, command)
            assert done.returncode == 0, f"{command}: {done.stderr}"
            printed = done.stdout.splitlines()
            assert [line for line in shown if line not in printed] == [], f"{command} printed:\n{done.stdout}"
        for name, body in re.findall(r"^`([^`\n]+)`:\n\n```\w+\n(.*?)^```$", part, re.MULTILINE | re.DOTALL):
            (tmp_path / name).write_text(body)


def test_a_lost_log_is_filled_anew_from_the_streams(home: Path):
    whole = answered(home, "run", "words", "--run", "again", *SMALL)["records"]
    shutil.rmtree(home / "log")
    assert answered(home, "rebuild")["runs"] >= 1
    assert answered(home, "show", "again")["records"] == whole


def test_the_tree_of_the_readme_is_the_tree_on_disk():
    tree = next(block for block in blocks(README, "text") if "README.md" in block)
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    assert {name for name in listed if not (ROOT / name).exists()} == set()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    assert {*packages, "tests", "docs", "Makefile", "pyproject.toml", "README.md", "LICENSE"} <= listed


def test_links_between_the_documents_lead_somewhere():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", path.read_text()):
            led_to = path.parent / target if target else path
            assert led_to.exists(), f"{path.name} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", led_to.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{path.name} links to #{anchor}"


def test_every_verb_is_documented():
    verbs = get_command(cli).commands  # type: ignore[attr-defined]
    named = {f"sia {verb} {inner}" for verb in ("tasks", "bench", "experiment") for inner in verbs[verb].commands}
    named |= {f"sia {verb}" for verb in verbs}
    assert {name for name in named if f"`{name}" not in README} == set()


def test_the_tables_of_settings_are_the_codes():
    text = DOCS["configuration"]
    named = {name: field for name, field in Settings.model_fields.items() if name not in TABLES}
    process = {f"SIA_{name.upper()}": _shown(field.default) for name, field in named.items()}
    assert table(text, "variable | default") == process
    run = {name: _quoted(field.default) for name, field in RunSettings.model_fields.items()}
    assert table(text, "name | default") == {**run, "learning": "below"}
    learning = {f"learning.{name}": _quoted(field.default) for name, field in Learning.model_fields.items()}
    assert table(text, "field | default") == learning


def test_the_tables_of_a_task_are_the_codes():
    text = DOCS["walkthrough"]
    assert set(table(text, "key | default")) == {field.name for field in fields(Task)} - FOUND
    assert table(text, "limit | default") == {field.name: str(field.default) for field in fields(Limits)}
    told = table(text, "key | default")
    for field in fields(Task):
        if isinstance(field.default, str) and field.default:
            assert told[field.name] == _quoted(field.default)


def test_every_event_is_in_the_architecture():
    assert {name for name in EVENTS if f"`{name}`" not in DOCS["architecture"]} == set()


def test_every_mendable_error_and_every_check_of_the_doctor_has_its_mend(home: Path):
    text = DOCS["troubleshooting"]
    assert {error.__name__ for error in MENDABLE if f"`{error.__name__}`" not in text} == set()
    names = {check["name"] for check in answered(home, "doctor")["checks"]}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_the_documents_speak_of_this_project_only():
    for name, text in {"README": README, **DOCS}.items():
        assert not re.search(r"/work/|/tmp/|/root/", text), name


def _shown(default: object) -> str:
    return "unset" if default is None else str(default)


def _quoted(default: object) -> str:
    return f'"{default}"' if isinstance(default, str) else str(default)
