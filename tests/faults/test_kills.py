"""Killed at any step, again and again, a run comes to the same end: nothing is lost, doubled, or paid for twice."""

import fnmatch
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import psutil
import pytest
from chains import KILLED, Chain, chain, drawn, facts
from command import calls, log, read
from points import OF_A_BRANCH, OF_A_REBUILD, OF_A_RUN, OF_AN_AUTHOR_WITH_TOOLS

from sia_events.shared.record import Record

Children = Callable[[], list[psutil.Process]]
# Of each kind of step one, in the order of a run: all are in the slow tests.
SOME = (
    "sia run before opening",
    "sia run after opening",
    "model_gateway before recording a call",
    "meta_svc before publishing on RunStarted",
    "model_gateway after recording a call",
    "target_runner after running an agent",
    "recorder before inserting from SIA",
    "recorder before acking SIA",
    "recorder before acking SIA_TRACE",
    "evaluator after publishing on ExecutionLogged",
    "feedback_svc before answering FeedbackRequested",
    "sia run before the log has everything",
    "sia run after its last word",
)
# With those at each named point once, these are the 200 kills and more that a change is seen through.
SEEDS, KILLS, APART, IN_ALL = range(8), 20, 15, 200


@pytest.fixture(scope="module")
def undisturbed(task: Path, tmp_path_factory: pytest.TempPathFactory, children: Children) -> Chain:
    """A run that nobody kills."""
    with chain(task, tmp_path_factory.mktemp("undisturbed") / "home", children) as run:
        assert run.go().returncode == 0 and run.faults() == []
    return run


def assert_whole(runs: Chain, undisturbed: Sequence[Record]) -> None:
    """The last run goes on to its end; each is as one undisturbed; the checker has nothing to say, nor has replay."""
    end = runs.go()
    assert end.returncode == 0 and "improved" in end.stdout, end.stderr
    assert runs.faults() == []
    for run in runs.runs:
        assert facts(log(runs.home, run)) == facts(undisturbed)
        assert not read(runs.home, "replay", run)["diverged"]


def test_killed_at_one_step_of_each_kind_a_run_comes_to_the_same_end(
    task: Path, tmp_path: Path, undisturbed: Chain, children: Children
):
    with chain(task, tmp_path / "home", children) as runs:
        runs.kill(SOME)
        assert_whole(runs, log(undisturbed.home))


@pytest.mark.slow
def test_killed_at_every_named_point_one_after_the_other_runs_come_to_the_same_end(
    task: Path, tmp_path: Path, undisturbed: Chain, children: Children
):
    named = list(dict.fromkeys(undisturbed.passed()))
    assert all(fnmatch.filter(named, point.replace("{}", "*")) for point in OF_A_RUN)
    assert len(named) + len(SEEDS) * KILLS >= IN_ALL
    with chain(task, tmp_path / "home", children) as runs:
        runs.kill(named)
        assert runs.killed == named
        assert_whole(runs, log(undisturbed.home))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_at_steps_drawn_from_all_that_it_takes_a_run_comes_to_the_same_end(
    seed: int, task: Path, tmp_path: Path, undisturbed: Chain, children: Children
):
    with chain(task, tmp_path / "home", children) as runs:
        runs.kill(islice(drawn(undisturbed.passed(), seed, APART), KILLS))
        assert len(runs.killed) == KILLS
        assert_whole(runs, log(undisturbed.home))


@pytest.mark.slow
def test_killed_between_the_commands_and_the_calls_of_an_author_a_run_pays_for_none_of_them_twice(
    task: Path, tmp_path: Path, children: Children
):
    before, after = "model_gateway before recording a call", "model_gateway after recording a call"
    writing = (before, after, after, *OF_AN_AUTHOR_WITH_TOOLS, before, "model_gateway before asking a model")
    verdict = ("target_runner after running an agent", "feedback_svc before publishing on FeedbackRequested")
    with chain(task, tmp_path / "home", children, backend="agentic") as runs:
        runs.kill((*writing, *verdict, *writing))
        assert runs.go().returncode == 0 and runs.faults() == []
        assert not read(runs.home, "replay", "r1")["diverged"]
        # What is paid for twice is what nobody had heard of yet.
        asked = len(runs.author.asked)
        assert asked - len(calls(runs.home)) == runs.killed.count(before)


@pytest.mark.slow
def test_killed_around_its_opening_a_branch_is_there_or_is_not_and_a_log_filled_anew_is_whole(
    task: Path, tmp_path: Path, children: Children
):
    with chain(task, tmp_path / "home", children) as runs:
        assert runs.go().returncode == 0

        def killed(point: str, *words: str) -> None:
            done = runs.sia(*words, fail_at=point)
            assert done.returncode == KILLED, done.stderr

        branch = ("branch", "r1", "--at", "0", "--run", "b1", "--set", "seed=1")
        before, after = OF_A_BRANCH
        killed(before, *branch)
        assert [row["run"] for row in read(runs.home, "runs")] == ["r1"]
        killed(after, *branch)
        killed("feedback_svc before publishing on FeedbackRequested", "run", "--resume", "b1")
        assert runs.sia("run", "--resume", "b1").returncode == 0
        assert runs.faults() == []
        for point in (*OF_A_REBUILD, "recorder before acking SIA"):
            killed(point, "rebuild")
        assert runs.sia("rebuild").returncode == 0
        assert runs.faults() == []
        assert {row["run"] for row in read(runs.home, "runs")} == {"r1", "b1"}
