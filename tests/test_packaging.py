"""The map in pyproject.toml is the folders on disk, and the wheel holds what runs need."""

import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
APART = {"tests", "docs", "scripts", "build", "dist", "dashboard"}


def test_every_folder_with_code_is_a_package():
    on_disk = {path.parent.name for path in ROOT.glob("*/*.py")} - APART
    mapped = {Path(folder).name for name, folder in SETUP["package-dir"].items() if name != "sia_events"}
    assert on_disk == mapped
    assert set(SETUP["packages"]) == set(SETUP["package-dir"]) | inner()


def inner() -> set[str]:
    """Packages that lie inside a mapped folder, by the names they are imported under."""
    return {
        f"{name}.{path.parent.name}"
        for name, folder in SETUP["package-dir"].items()
        for path in (ROOT / folder).glob("*/__init__.py")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, since a build in the checkout would leave its own leavings there for the next one."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, folder / "source", ignore=unwanted)
    command = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder))
    subprocess.run([*command, str(folder / "source")], check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_every_module_and_data_file(wheel: zipfile.ZipFile):
    held = set(wheel.namelist())
    for name, folder in SETUP["package-dir"].items():
        for path in (ROOT / folder).glob("*.py"):
            assert f"{name.replace('.', '/')}/{path.name}" in held
    for data in (
        "event_log/schema.sql",
        "tasks/words/task.toml",
        "tasks/words/NOTICE",
        "tasks/words/data/private/items.jsonl",
        "tasks/denoise/NOTICE",
        "tasks/denoise/evaluate.py",
        "tasks/denoise/reference/requirements.txt",
        "tasks/denoise/data/public/train.csv",
        "tasks/denoise/data/private/test.csv",
        "py.typed",
    ):
        assert f"sia_events/{data}" in held
    assert not [name for name in held if name.endswith(".pth") or name.split("/")[0] in ("tests", "docs", "shared")]


def test_what_was_built_from_a_checkout_is_the_same_code(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path)
    assert wheel.filename
    places = (tmp_path / "sia_events", Path(wheel.filename).parent / "source")
    told = [runpy.run_path(str(place / "shared/code.py"))["_digest"]() for place in places]
    assert told[0] == told[1]
