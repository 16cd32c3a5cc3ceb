"""The learning process itself: without memory, without room on the disk, and asked for what there is not."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lessons import CHOICES, choice_lines, spec
from small_disk import fill, small_disk
from tiny import make_model, stirred

from sia_events.local_model import adapter, network
from sia_events.trainer.batches import room_for
from sia_events.trainer.groups import read
from sia_events.trainer.opening import opened
from sia_events.trainer.spec import Spec, to_json

Done = subprocess.CompletedProcess[str]

PROGRAM = "from sia_events.trainer.learn import main; main()"
# Learns twice in one process: whatever the first took, at its most, is with `room` bytes more all that the second has.
# All threads share a heap (M_ARENA_MAX), as one more would be reserved or not, and is larger than `room`.
NARROWED = """
import ctypes, resource, sys
ctypes.CDLL(None).mallopt(-8, 1)
from sia_events.trainer.learn import main
first, second, room = sys.argv[1:]
sys.argv[1:] = [first]
main()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmPeak"))
most = int(peak.split()[1]) * 1024 + int(room)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
sys.argv[1:] = [second]
main()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def run(program: str, *arguments: str) -> Done:
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, text=True, capture_output=True, env=env, stdin=subprocess.DEVNULL, check=False)


def written(settings: Spec, place: Path) -> str:
    place.write_bytes(to_json(settings))
    return str(place)


def long_lines(count: int) -> list[dict[str, Any]]:
    """Groups of two samples whose prompts fill most of the context."""
    draw = random.Random(0)
    lines = []
    for at in range(count):
        prompt = [draw.randrange(10, 40) for _ in range(400)]
        for index in (0, 1):
            step = {"kind": "choice", "prompt_ids": prompt, "choice_ids": CHOICES, "index": index}
            step["logprobs"] = [-1.1, -1.1, -1.1]
            lines.append({"group": str(at), "item": f"{at}#{index}", "reward": float(index), "steps": [step]})
    return lines


def once(tiny: Path, folder: Path, **options: Any) -> Spec:
    """One step on one batch of 96 groups."""
    return spec(tiny, folder, long_lines(96), batch_prompts=96, epochs=1, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on memory that holds")
def test_what_does_not_fit_into_memory_is_learned_from_in_halves(tiny: Path, tmp_path: Path) -> None:
    half = written(once(tiny, tmp_path / "half", micro_prompts=48), tmp_path / "half.json")
    whole = written(once(tiny, tmp_path / "whole", micro_prompts=96), tmp_path / "whole.json")
    # Between what halves take and what the whole takes, which are 290 MB apart.
    done = run(NARROWED, half, whole, str(130 * 2**20))
    assert done.returncode == 0, done.stderr
    made = [(tmp_path / name / "adapter" / adapter.WEIGHTS).read_bytes() for name in ("half", "whole")]
    assert made[0] == made[1]


@pytest.mark.slow  # two learners; above is the one that fits
@pytest.mark.skipif(sys.platform != "linux", reason="a limit on memory that holds")
def test_what_does_not_fit_in_halves_either_fails_with_what_to_do(tiny: Path, tmp_path: Path) -> None:
    few = written(once(tiny, tmp_path / "few", micro_prompts=8), tmp_path / "few.json")
    whole = written(once(tiny, tmp_path / "whole", micro_prompts=96), tmp_path / "whole.json")
    failed = run(NARROWED, few, whole, str(24 * 2**20))
    assert failed.returncode == os.EX_OSERR, failed.stderr
    assert "Out of memory, also with 48 prompts at once, of 19392 tokens. Set learning.recompute=true" in failed.stderr
    assert (tmp_path / "few" / "adapter").exists() and not (tmp_path / "whole" / "adapter").exists()


def test_the_longer_the_prompts_the_fewer_go_through_the_model_at_once(tiny: Path, tmp_path: Path) -> None:
    counts = []
    for name, lines in (("short", choice_lines(tiny, count=4)), ("long", long_lines(4))):
        settings = spec(tiny, tmp_path / name, lines)
        groups, _ = read(Path(settings.rollouts), True)
        counts.append(room_for(opened(settings)[0], groups).scenes)
    assert counts == [24, 3]


def test_learning_under_way_since_an_earlier_release_is_taken_for_the_same(tiny: Path, tmp_path: Path) -> None:
    fitted = spec(tiny, tmp_path / "one", long_lines(4), micro_prompts=None)
    assert fitted.identity == replace(fitted, micro_prompts=8).identity != replace(fitted, seed=1).identity


@pytest.mark.slow  # four learners, one behind the other
def test_a_disk_without_room_for_a_checkpoint_or_the_adapter_is_named_and_learning_goes_on_once_there_is(
    tiny: Path, tmp_path: Path
) -> None:
    lines = choice_lines(tiny, count=12)
    whole = run(PROGRAM, written(spec(tiny, tmp_path / "whole", lines, epochs=1), tmp_path / "whole.json"))
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "small").mkdir()
    with small_disk(tmp_path / "small", megabytes=4) as disk:
        settings = spec(tiny, disk / "learning", lines, epochs=1)
        kept = replace(settings, checkpoint=str(disk / "learning" / "checkpoint"))
        filler = fill(disk)
        for given, says in (
            (
                kept,
                "The checkpoint of step 1 could not be written to .*: No space left on device; there is none before",
            ),
            (settings, "The adapter could not be written to .*No space left on device.*Make room and start learning"),
        ):
            failed = run(PROGRAM, written(given, tmp_path / "small.json"))
            assert failed.returncode == 1 and re.search(says, failed.stderr), failed.stderr
            assert not (disk / "learning" / "adapter" / adapter.CONFIG).exists()
        filler.unlink()
        done = run(PROGRAM, written(kept, tmp_path / "small.json"))
        assert done.returncode == 0, done.stderr
        made = [(place / "adapter" / adapter.WEIGHTS).read_bytes() for place in (disk / "learning", tmp_path / "whole")]
    assert made[0] == made[1]


def refused(tiny: Path, folder: Path, **options: Any) -> str:
    """What the program says that refuses to learn so, with nothing told or written."""
    settings = spec(tiny, folder / "it", choice_lines(tiny, count=4), **options)
    failed = run(PROGRAM, written(settings, folder / "spec.json"))
    assert failed.returncode == os.EX_DATAERR, failed.stderr
    assert failed.stdout == "" and not (folder / "it" / "adapter").exists()
    return failed.stderr


def test_layers_that_the_model_does_not_have_are_refused_with_those_it_has(tiny: Path, tmp_path: Path) -> None:
    said = refused(tiny, tmp_path, targets=("query",))
    assert "No layer's name ends in query; tiny has down_proj, gate_proj" in said


def test_an_adapter_for_another_base_is_refused_before_anything_is_learned(tiny: Path, tmp_path: Path) -> None:
    adapter.write(stirred(network.load(tiny), seed=1), tmp_path / "other", "another model", "c" * 64)
    assert "belongs to 'another model'" in refused(tiny, tmp_path, adapter_in=str(tmp_path / "other"))


def test_samples_without_siblings_teach_nothing_and_leave_no_adapter(tiny: Path, tmp_path: Path) -> None:
    settings = spec(tiny, tmp_path / "it", choice_lines(tiny, count=6)[::8])
    done = run(PROGRAM, written(settings, tmp_path / "spec.json"))
    (line,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, line["stopped"], line["adapter"], line["counts"]["single_sample"]) == (
        0,
        "no signal",
        None,
        6,
    )
