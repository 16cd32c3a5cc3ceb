"""`sia run` stopped while a model writes its reply: the reply is waited for and recorded, and not paid for again."""

import json
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import pytest
from command import answered, assert_none_left, calls, read, sia, start, until
from llm_author import SMALL, Author, assert_paid_once, reached
from loopback import Fault, Loopback, Wire
from loopback_wires import Reply

pytestmark = pytest.mark.usefixtures("children")
RUN = ("--run", "r1", *SMALL)
# The first agent is written in one call; each of its attempts then makes a call an item.
WRITING, ATTEMPTING = 1, 4


class Slow(Author):
    """An author who takes its time over one of its replies: until it is let go on."""

    def __init__(self, held: int) -> None:
        super().__init__()
        self.held = held
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, wire: Wire, body: Mapping[str, Any]) -> Reply | Fault:
        reply = super().__call__(wire, body)
        if len(self.asked) == self.held:
            self.reached.set()
            self.go.wait(60)
        return reply


def talk(process: Popen[str], words: str) -> str:
    """What the command says on stderr up to the line with these words in it."""
    assert process.stderr
    said = ""
    for line in process.stderr:
        said += line
        if words in line:
            return said
    raise AssertionError(f"{words!r} was not said: {said}")


def assert_goes_on(home: Path, author: Slow, **variables: str) -> None:
    """The run goes on to its end, and every reply that the provider gave is on record, once."""
    resumed = sia(home, "run", "--resume", "r1", "--json", **variables)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["outcome"] == "improved"
    made = calls(home)
    assert_paid_once(author, made)
    assert len(author.asked) == len(made) and all(call.reply for call in made)
    assert not read(home, "replay", "r1")["diverged"]


@pytest.mark.parametrize(
    ("number", "held"),
    [
        (signal.SIGINT, ATTEMPTING),
        pytest.param(signal.SIGINT, WRITING, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, ATTEMPTING, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_waits_for_the_reply_under_way(
    number: int, held: int, tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    author = Slow(held)
    with Loopback(author) as provider:
        process = start(tmp_path, "run", task, *RUN, **reached(provider))
        assert author.reached.wait(60)
        process.send_signal(number)
        talk(process, "waiting for replies under way")
        author.go.set()
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130 and "sia run --resume r1" in said
        assert_none_left(children)
        recorded = calls(tmp_path)
        assert len(recorded) == len(author.asked) == held and all(call.reply for call in recorded)
        assert_goes_on(tmp_path, author, **reached(provider))
    assert_none_left(children)


def test_a_paused_run_waits_for_the_reply_under_way(
    tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    author = Slow(ATTEMPTING)
    with Loopback(author) as provider:
        process = start(tmp_path, "run", task, *RUN, **reached(provider))
        assert author.reached.wait(60)
        assert answered(tmp_path, "pause", "r1", "--reason", "look")["status"] == "paused"
        talk(process, "waiting for replies under way")
        author.go.set()
        _, said = process.communicate(timeout=60)
        assert process.returncode == 3 and "paused: look" in said
        assert len(calls(tmp_path)) == len(author.asked) == ATTEMPTING
        answered(tmp_path, "resume", "r1")
        assert_goes_on(tmp_path, author, **reached(provider))
    assert_none_left(children)


def test_interrupted_twice_a_run_ends_at_once_and_asks_again_for_what_it_did_not_wait_for(
    tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    author = Slow(ATTEMPTING)
    with Loopback(author) as provider:
        process = start(tmp_path, "run", task, *RUN, **reached(provider))
        assert author.reached.wait(60)
        process.send_signal(signal.SIGINT)
        talk(process, "waiting for replies under way")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=15)
        assert process.returncode == 130 and "Traceback" not in said, said
        author.go.set()
        assert_none_left(children)
        resumed = sia(tmp_path, "run", "--resume", "r1", **reached(provider))
    assert resumed.returncode == 0, resumed.stderr
    made = calls(tmp_path)
    assert_paid_once(author, made)
    assert len(author.asked) == len(made) + 1


@pytest.mark.slow
def test_services_that_are_stopped_wait_for_the_reply_under_way(
    tmp_path: Path, task: Path, children: Callable[[], list[psutil.Process]]
):
    author = Slow(ATTEMPTING)
    with Loopback(author) as provider:
        serving = start(tmp_path, "serve", "--json", **reached(provider))
        assert serving.stdout and json.loads(serving.stdout.readline())["pid"]
        run = start(tmp_path, "run", task, *RUN, **reached(provider))
        assert author.reached.wait(60)
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)
        serving.send_signal(signal.SIGTERM)
        talk(serving, "waiting for replies under way")
        author.go.set()
        _, said = serving.communicate(timeout=60)
        assert serving.returncode == 0, said
        assert len(until(lambda: calls(tmp_path))) == len(author.asked) == ATTEMPTING
        assert_goes_on(tmp_path, author, **reached(provider))
    assert_none_left(children)
