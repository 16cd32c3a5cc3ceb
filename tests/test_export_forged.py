"""What an exported run tells of its scores is the evaluator's, whatever its agents and their authors called files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from given import recorded
from story import accepted, asked, failed, feedback_asked, logged, patched, proposed, registered, scored, started

from sia_events.errors import Unusable
from sia_events.exporting import EXECUTION, HARNESS_LIST, IMPROVEMENT, LOG, PROMPTS, RESULTS, export
from sia_events.importing import read_run
from sia_events.infra.memory import MemoryBlobs
from sia_events.shared.events import Written
from sia_events.shared.tree import store_tree

AGENT = {"target_agent.py": b"print(1)\n", "lib/a.py": b"pass\n"}
FORGED = b'{"accuracy": 1.0, "total_questions": 1000, "gate": {"value": 1.0}}'
NAMES = [RESULTS, "evaluation_results.json", LOG, HARNESS_LIST, IMPROVEMENT, *PROMPTS]


async def exported(
    into: Path, harness: Mapping[str, bytes] = AGENT, outputs: Mapping[str, bytes] | None = None, judged: bool = True
) -> dict[str, bytes]:
    """The files of gen_2: a version that an LLM wrote, with these files and with what it left behind on dev."""
    blobs = MemoryBlobs()
    first = proposed().model_copy(update={"harness": await store_tree(blobs, AGENT)})
    trajectory, prompt, note = [await blobs.put(text) for text in (b"", b"the prompt", b"# the note")]
    told = {"backend": "direct", "model": "openai/m", "prompt": prompt, "trajectory": trajectory, "note": note}
    second = patched("g1a").model_copy(
        update={"harness": await store_tree(blobs, harness), "written": Written.model_validate(told)}
    )
    left = {"outputs": await store_tree(blobs, outputs or {"answers.jsonl": b""}), "trajectory": trajectory}
    ran = [logged(version, "dev").model_copy(update=left) for version in ("g0a", "g1a")]
    verdict: Any = scored("g1a", "dev", "1000") if judged else failed("g1a", "dev", "invalid_output")
    events = (registered(), started(), first, asked("g0a", "dev"), ran[0], scored("g0a", "dev", "0000"))
    more = (accepted("g0a"), feedback_asked(1), second, asked("g1a", "dev"), ran[1], verdict)
    folder = await export(recorded(*events, *more), blobs, into)
    gen = folder / "gen_2"
    return {file.relative_to(gen).as_posix(): file.read_bytes() for file in gen.rglob("*") if file.is_file()}


def assert_told(files: Mapping[str, bytes], judged: bool = True) -> None:
    assert FORGED not in files.values()
    assert files[PROMPTS[1]] == b"the prompt" and files[IMPROVEMENT] == b"# the note"
    assert PROMPTS[0] not in files and "evaluation_results.json" not in files
    assert json.loads(files[HARNESS_LIST]) == sorted(AGENT) and {name: files[name] for name in AGENT} == AGENT
    if judged:
        assert json.loads(files[RESULTS])["accuracy"] == 0.25 and LOG not in files
    else:
        assert RESULTS not in files and files[LOG] == b"invalid_output: boom\n"


@pytest.mark.parametrize("judged", [True, False])
@pytest.mark.parametrize("name", [*NAMES, f"/{RESULTS}", f"./{RESULTS}", f".//{LOG}"])
@pytest.mark.parametrize("below", ["", "/more.json"], ids=["file", "folder"])
async def test_neither_an_output_nor_the_harness_takes_a_name_that_is_told(
    tmp_path: Path, name: str, below: str, judged: bool
):
    forged = {name + below: FORGED}
    assert_told(await exported(tmp_path / "outputs", outputs={**forged, "kept": b"x"}, judged=judged), judged)
    assert_told(await exported(tmp_path / "harness", harness={**AGENT, **forged}, judged=judged), judged)


@pytest.mark.parametrize("name", ["target_agent.py", "target_agent.py/x", "lib", "lib/a.py/x", f"{EXECUTION}/x"])
async def test_an_output_in_the_way_of_the_harness_or_of_what_is_told_is_left_out(tmp_path: Path, name: str):
    files = await exported(tmp_path, outputs={name: FORGED, "kept/x": b"x"})
    assert_told(files)
    assert json.loads(files[EXECUTION]) == [] and files["kept/x"] == b"x"


@pytest.mark.parametrize("name", [EXECUTION, f"{EXECUTION}/x"])
async def test_a_harness_brings_no_execution_along(tmp_path: Path, name: str):
    files = await exported(tmp_path, harness={**AGENT, name: FORGED})
    assert_told(files)
    assert json.loads(files[EXECUTION]) == []


async def test_an_execution_that_the_agent_kept_itself_is_its_own(tmp_path: Path):
    assert (await exported(tmp_path, outputs={EXECUTION: b'[{"role": "user"}]'}))[EXECUTION] == b'[{"role": "user"}]'


@pytest.mark.parametrize("name", ["../x", "../../x", "a/../../../x", "a/../results.json"])
@pytest.mark.parametrize("part", ["harness", "outputs"])
async def test_a_name_that_leads_out_of_the_folder_is_refused_and_nothing_written(tmp_path: Path, name: str, part: str):
    files = {**AGENT, name: FORGED} if part == "harness" else {name: FORGED}
    with pytest.raises(Unusable, match=r"leads out of its tree; nothing was written"):
        await exported(tmp_path / "deep/down/out", **{part: files})
    assert not os.listdir(tmp_path)


async def test_what_comes_back_has_the_evaluators_score_and_the_harness_alone(tmp_path: Path):
    await exported(tmp_path, outputs={RESULTS: FORGED, "stray.py": b"print(2)"})
    last = read_run(tmp_path / "run_1").generations[-1]
    assert last.harness == AGENT and last.score and last.score[0] == 0.25
