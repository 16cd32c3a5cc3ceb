"""A task whose answer is a program: written by a model, measured by the bench, scored by what was measured."""

import asyncio
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from given import recorded
from story import OPENING, asked, patched, registered
from writing import Answer, Scripted, writing_room, wrote

from sia_events.agents.direct import Direct
from sia_events.agents.measured import kernels
from sia_events.errors import Unusable
from sia_events.evaluator.service import evaluator
from sia_events.feedback_svc.service import feedback_svc
from sia_events.infra.memory import MemoryBlobs, MemoryBus, SystemTime
from sia_events.infra.sandbox import UnsafeProcess
from sia_events.kernel_bench import perform
from sia_events.kernel_bench.problems import PROBLEMS, TRIMUL_SMALL, Case, shipped
from sia_events.kernel_bench.service import kernel_bench
from sia_events.meta_svc.service import meta_svc
from sia_events.shared.events import (
    KernelMeasured,
    RunFinished,
    RunSettings,
    RunStarted,
    Scored,
    VersionAccepted,
)
from sia_events.shared.items import TaskError
from sia_events.shared.ports import Chat, Ports
from sia_events.shared.record import Record, opening
from sia_events.shared.registration import register
from sia_events.shared.replay import replay
from sia_events.shared.run import fold
from sia_events.shared.service import Work, serve
from sia_events.shared.task import find_task, load_task, public_files
from sia_events.starting import suited
from sia_events.target_runner.service import target_runner

SERVICES = (meta_svc, target_runner, evaluator, kernel_bench, feedback_svc)
TINY = replace(TRIMUL_SMALL, checked=(Case(16, 1, 32),), timed=(Case(24, 1, 64, masked=True),))
REFERENCE = shipped("reference")
SLOW = REFERENCE.replace("def custom_kernel(", "def once(") + (
    "\ndef custom_kernel(data):\n    for _ in range(4):\n        once(data)\n    return once(data)\n"
)
WRONG = "import torch\ndef custom_kernel(data):\n    return torch.zeros_like(data[0])\n"
AGENT = "import sys\nopen(sys.argv[sys.argv.index('--working_dir') + 1] + '/kernel.py', 'w').write({kernel!r})\n"


class Author:
    """Writes a kernel that computes everything five times, then one that is wrong and one that computes it once."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def __call__(self, call: Chat) -> Answer:
        words = "\n".join(str(message["content"]) for message in call.messages)
        self.prompts.append(words)
        if "Write a first agent" in words:
            return wrote({"target_agent.py": AGENT.format(kernel=SLOW)}, "five times")
        kernel = WRONG if "candidate 1 of 2" in words else REFERENCE
        return wrote({"target_agent.py": AGENT.format(kernel=kernel)}, "another")


async def finished(ports: Ports, private: MemoryBlobs, **settings: object) -> Sequence[Record]:
    task = await register(find_task("trimul"), ports.blobs, private, 8)
    wanted = RunSettings.model_validate({"candidates": 2, "lever": "harness", **settings})
    await ports.bus.append("r1", opening("r1", [task, RunStarted(settings=wanted, code="test")]))
    given = [(s, replace(ports, private=private if s is evaluator else None)) for s in SERVICES]
    tasks = [asyncio.create_task(serve(service, ports.bus, mine, "r1")) for service, mine in given]
    try:
        async with asyncio.timeout(250):
            while True:
                history = await ports.bus.history("r1")
                if history[-1].type in ("RunFinished", "ServiceFailed"):
                    return history
                await asyncio.sleep(0.01)
    finally:
        for task_ in tasks:
            task_.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.slow  # a whole run, its kernels timed
@pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("torch") is None, reason="kernels need Linux and torch"
)
async def test_a_faster_kernel_is_written_measured_and_accepted_and_a_wrong_one_is_worth_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(perform, "PROBLEMS", {"trimul-small": TINY})
    author = Author()
    async with writing_room(tmp_path, Scripted(author), {"direct": Direct()}, sandbox=UnsafeProcess()) as ports:
        records = await finished(
            ports, MemoryBlobs(), generations=1, backend="direct", meta_model="scripted/author", search="archive"
        )
    events = [record.event for record in records]
    assert [e.version for e in events if isinstance(e, VersionAccepted)] == ["g0a", "g1b"], records[-1]
    scores = {(e.version, e.split): e for e in events if isinstance(e, Scored)}
    measured = {e.attempt: e for e in events if isinstance(e, KernelMeasured)}
    assert len(measured) == len(scores)
    repeats = find_task("trimul").repeats
    slow, wrong, right = (scores[version, "dev"] for version in ("g0a", "g1a", "g1b"))
    assert 0 < slow.score.high < right.score.low and right.items == measured["g1b.dev"].rounds
    assert (wrong.score.value, wrong.score.high, wrong.failures) == (0, 0, {"wrong": repeats})
    assert "elements wrong" in measured["g1a.dev"].reason
    end = events[-1]
    assert isinstance(end, RunFinished) and end.outcome == "improved" and end.sealed
    assert end.sealed.final.n == repeats and end.sealed.final.low < end.sealed.final.value
    # Who goes on from a kernel is told what was measured of it.
    told = [words for words in author.prompts if "Change the harness" in words]
    assert told and all("| g0a |  | 0." in words and "Measured" not in words for words in told)
    found = replay(records, SERVICES)
    assert (found.divergence, found.pending) == (None, 0)


async def scored(tmp_path: Path, **changes: object) -> Scored:
    blobs = MemoryBlobs()
    task = await register(find_task("trimul"), blobs, MemoryBlobs(), 8)
    event = measurement(**changes)
    records = recorded(task, *OPENING[1:], asked("g0a", "gate"), event)
    ports = Ports(MemoryBus(blobs), blobs, None, SystemTime(), None, tmp_path)  # type: ignore[arg-type]
    (found,) = await evaluator.performs[KernelMeasured](Work(fold(records), records[-1], ports), event)
    assert isinstance(found, Scored)
    return found


def measurement(**changes: object) -> KernelMeasured:
    told = {
        "attempt": "g0a.gate",
        "version": "g0a",
        "problem": "trimul-small",
        "correct": True,
        "speedup": 2.0,
        "low": 1.0,
        "high": 3.0,
        "flagged": False,
        "reason": "",
        "rounds": (1.0, 2.0, 3.0),
    }
    return KernelMeasured.model_validate({**told, **changes})


async def test_the_score_is_the_mean_speed_up_with_the_interval_of_its_repeats(tmp_path: Path):
    found = await scored(tmp_path)
    # Student's t with 2 degrees of freedom: 4.3027 · 1 / √3.
    assert (found.split, found.items, found.score.value) == ("gate", (1.0, 2.0, 3.0), 2.0)
    assert (found.score.low, found.score.high) == (
        pytest.approx(2 - 2.48414, abs=1e-4),
        pytest.approx(4.48414, abs=1e-4),
    )


async def test_a_kernel_in_quarantine_is_worth_nothing(tmp_path: Path):
    found = await scored(tmp_path, flagged=True, reason="12 times as fast")
    assert (found.items, found.score.value, found.failures) == ((0.0, 0.0, 0.0), 0.0, {"quarantined": 3})


async def test_of_another_task_the_bench_measures_and_the_evaluator_scores_the_answers(tmp_path: Path):
    blobs = MemoryBlobs()
    spec = (await register(find_task("words"), blobs, MemoryBlobs(), 8)).spec
    records = recorded(registered(spec=spec), *OPENING[1:], asked("g0a", "gate"), measurement())
    ports = Ports(MemoryBus(blobs), blobs, None, SystemTime(), None, tmp_path)  # type: ignore[arg-type]
    work = Work(fold(records), records[-1], ports)
    assert not await evaluator.performs[KernelMeasured](work, measurement())


def test_rows_of_kernels_are_of_dev_alone_and_begin_with_the_one_gone_on_from():
    dev = [
        measurement(attempt="g0a.dev"),
        measurement(attempt="g1a.dev", version="g1a", correct=False, reason="ValueError:\n a | b"),
    ]
    attempts = [asked("g0a", "dev"), asked("g0a", "gate"), asked("g1a", "dev")]
    records = recorded(*OPENING, patched("g1a"), *attempts, *dev, measurement())
    rows = kernels(fold(records), records, "g1a")
    assert [part.name for part in rows] == ["g1a", "g0a"]
    assert "refused: `ValueError: a / b`" in rows[0].text and len(rows) == 2


def test_the_task_shows_its_agents_nothing_but_its_words_and_needs_no_answers():
    task = find_task("trimul")
    assert list(public_files(task, "whole")) == ["task.md"]
    settings, (told,) = suited(task, RunSettings())
    assert settings.lever == "auto" and "measured anew" in told and "8 whole attempts at a time" in told
    assert task.kernel in PROBLEMS
    assert (task.path / "reference/reference_target_agent.py").read_text().count(REFERENCE.split('"""')[2].strip()) == 1


def test_a_kernel_that_nobody_knows_is_refused_before_anything_is_written():
    with pytest.raises(Unusable, match=r"no kernel problem 'conv'; there are: trimul, trimul-small"):
        suited(replace(find_task("trimul"), kernel="conv"), RunSettings())


@pytest.mark.parametrize("more", ["", 'kernel = "trimul"\ndirection = "minimize"\n'])
def test_a_kernel_task_names_its_kernel_and_no_direction(tmp_path: Path, more: str):
    (tmp_path / "data/public").mkdir(parents=True)
    (tmp_path / "data/public/task.md").write_text("# A kernel\n")
    (tmp_path / "task.toml").write_text(f'evaluator = "kernel"\n{more}')
    with pytest.raises(TaskError, match="needs kernel, and takes neither"):
        load_task(tmp_path)
