"""What several test files start from."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import psutil
import pytest
from command import adopting, small_task
from filelock import FileLock
from hypothesis import settings

from sia_events.local_model.weights import prepare

# Before anything imports torch or numpy, whose threads spin while they wait for each other: the tests run side by side,
# on as many cores as there are of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every session, however long they take; `--hypothesis-profile=default` looks for others.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="of tests/faults/test_simulation.py: this one schedule, and no other")


@pytest.fixture(scope="module")
def children() -> Iterator[Callable[[], list[psutil.Process]]]:
    """Lists the processes that this module's tests have left running, orphans too."""
    with adopting() as children:
        yield children


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small task; nobody changes it."""
    return small_task(tmp_path_factory.mktemp("tasks") / "taste")


@pytest.fixture(scope="session")
def models(pytestconfig: pytest.Config) -> Path:
    """The embedded model where it is installed, for those who only need it to be there.

    Laying it down takes half a minute, so it is kept from one session to the next.
    """
    assert pytestconfig.cache
    home = Path(pytestconfig.cache.mkdir("model-home"))
    if find_spec("torch"):
        prepare(home)
    return home / "models"


@pytest.fixture
def bell(tmp_path: Path) -> Iterator[socket.socket]:
    """A listening unix socket: a job that connects has started; the connection ends when the job's last holder does."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "bell.sock"))
        listener.listen()
        listener.settimeout(20)
        yield listener


SIA_WHEEL = "sia-agent==0.6.0"


@pytest.fixture(scope="session")
def sia_package(pytestconfig: pytest.Config) -> Path:
    """SIA's own package, unpacked and not installed: its tasks, profiles and reader of run folders.

    The wheel is fetched once and kept from one session to the next.
    """
    assert pytestconfig.cache
    folder = Path(pytestconfig.cache.mkdir("sia-wheel"))
    with FileLock(folder / "lock"):
        if not (folder / "unpacked/sia").is_dir():
            options = ("--no-deps", "--only-binary", ":all:", "--dest", str(folder))
            fetch = [sys.executable, "-m", "pip", "download", "--quiet", *options, SIA_WHEEL]
            done = subprocess.run(fetch, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{SIA_WHEEL} cannot be fetched: {done.stderr.strip()[-300:]}")
            (wheel,) = folder.glob("sia_agent-*.whl")
            with ZipFile(wheel) as archive:
                archive.extractall(folder / "unpacked")
    return folder / "unpacked/sia"
