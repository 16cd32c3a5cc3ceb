"""Runs go out in SIA's layout, where SIA's own reader finds them, and come back as facts that replay."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from command import SMALL, answered, environment, sia

from sia_events.app import SERVICES
from sia_events.errors import Unusable
from sia_events.importing import facts, read_run, reported
from sia_events.infra.memory import MemoryBlobs
from sia_events.infra.sandbox import check
from sia_events.shared.events import AgentProposed, AttemptFailed, HarnessPatched, Scored
from sia_events.shared.record import GENESIS, IMPORTED, opening, place
from sia_events.shared.replay import replay
from sia_events.shared.tree import load_tree

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BOXED = pytest.mark.skipif(check() is not None, reason=str(check()))
READER = """
import json, sys
from pathlib import Path
from sia.web import runs
root = Path(sys.argv[1])
(run,) = runs.list_runs(root)
detail = runs.get_run(root, run.name)
print(json.dumps({"run": run.model_dump(), "detail": detail.model_dump()}))
"""
CONTEXT = """# Run context

**Task**: /somewhere/tasks/gpqa
**Meta Model**: haiku
**Task Model**: claude-haiku-4-5-20251001
**Agent impl**: claude

## Generation 1
**Task**: not this one
"""


def sia_run(root: Path, results: list[Any]) -> Path:
    """A run folder as SIA writes it, a generation for each results.json; None writes none."""
    folder = root / "run_4"
    for number, result in enumerate(results, 1):
        gen = folder / f"gen_{number}"
        gen.mkdir(parents=True)
        (gen / "target_agent.py").write_text(f"print({number})\n")
        (gen / "helper.py").write_text("pass\n")
        (gen / "agent_execution.json").write_text('[{"role": "user", "content": "hi"}]')
        (gen / "meta_agent_prompt.txt" if number == 1 else gen / "feedback_agent_prompt.txt").write_text("do it")
        if number > 1:
            (gen / "improvement.md").write_text(f"# Plan {number}\n\n- do better\n")
        if result is not None:
            (gen / "results.json").write_text(json.dumps(result))
    (folder / "context.md").write_text(CONTEXT)
    profile = {"model": "haiku", "agent_impl": "claude", "provider": {"provider_id": "anthropic"}}
    (folder / "profiles.json").write_text(json.dumps({"meta": profile, "target": {**profile, "model": "small"}}))
    return folder


async def imported(folder: Path, blobs: MemoryBlobs) -> list[Any]:
    return await facts(read_run(folder), blobs, MemoryBlobs())


async def test_a_run_of_sias_becomes_facts(tmp_path: Path):
    folder = sia_run(tmp_path, [{"accuracy": 0.25, "total_questions": 8}, None, {"accuracy": 75.0, "total": 8}])
    events = await imported(folder, blobs := MemoryBlobs())
    first, *later = [e for e in events if isinstance(e, AgentProposed | HarnessPatched)]
    assert [e.parent for e in later if isinstance(e, HarnessPatched)] == ["g0a", "g1a"]
    assert await load_tree(blobs, first.harness) == {"target_agent.py": b"print(1)\n", "helper.py": b"pass\n"}
    assert later[0].written and later[0].reason == "imported: Plan 2"
    assert await blobs.get(later[0].written.note) == b"# Plan 2\n\n- do better\n"
    assert (later[0].written.backend, later[0].weights.model) == ("claude", "anthropic/small")
    assert [(e.version, e.score.value, e.score.n) for e in events if isinstance(e, Scored)] == [
        ("g0a", 0.25, 8),
        ("g2a", 0.75, 8),
    ]
    (failed,) = [e for e in events if isinstance(e, AttemptFailed)]
    assert failed.version == "g1a" and failed.message == "imported without a score: no results.json"
    assert events[0].task == "gpqa" and events[0].sizes == {"dev": 8}
    assert events[-1].outcome == "no proven gain" and events[-1].best is None and "as reported" in events[-1].reason
    assert not any(type(e).__name__ in ("VersionAccepted", "VersionRejected") for e in events)


async def test_what_was_imported_replays_and_nothing_is_owed_on_it(tmp_path: Path):
    events = await imported(sia_run(tmp_path, [{"accuracy": 1}]), MemoryBlobs())
    records, chain = [], GENESIS
    for position, draft in enumerate(opening("x", events, IMPORTED), 1):
        records.append(place(draft, "x", position, chain, NOW))
        chain = records[-1].chain
    found = replay(records, tuple(SERVICES.values()))
    assert found.divergence is None and found.pending == 0 and found.records == len(events)
    # Once more with a record that no import could have written there.
    stray = place(opening("x", events, IMPORTED)[0], "x", len(records) + 1, chain, NOW)
    again = replay([*records, stray], tuple(SERVICES.values()))
    assert again.divergence and again.divergence.reason == "nothing in the log gave rise to it"


@pytest.mark.parametrize(
    ("results", "found"),
    [
        ({"accuracy": 0.5, "total_questions": 10}, (0.5, 10)),
        ({"accuracy": 50, "n_total": 10}, (0.5, 10)),
        ({"accuracy": 0.5, "accuracy_percent": 50.0}, (0.5, 1)),
        ({"summary": {"accuracy": 0.5, "correct": 1, "total_questions": 200}, "results": []}, (0.005, 200)),
        ({"summary": {"accuracy": 62.0, "correct": 31, "total_questions": 50}}, (0.62, 50)),
        ({"accuracy": 1.0, "correct": 12, "incorrect": 0, "total_questions": 198}, (1.0, 198)),
        ({"accuracy": 0, "total": 0}, (0.0, 1)),
        ({"accuracy": -3}, None),
        ({"accuracy": "high"}, None),
        ({"f1": 0.5}, None),
    ],
)
def test_a_reported_score_is_a_fraction_by_one_rule(results: dict[str, Any], found: tuple[float, int] | None):
    assert reported(results) == found


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "gen_1").rename(folder / "gen_3"), r"needs folders gen_1, gen_2 .*has gen_2, gen_3"),
        (lambda folder: (folder / "gen_2/target_agent.py").unlink(), r"gen_2/target_agent\.py: missing"),
        (lambda folder: (folder / "gen_2/results.json").write_text("{"), r"gen_2/results\.json: does not read as JSON"),
        (lambda folder: (folder / "gen_2/results.json").write_text("[]"), r"gen_2/results\.json: not a JSON object"),
        (lambda folder: (folder / "profiles.json").write_text("3"), r"profiles\.json: not a JSON object"),
        *(
            (lambda folder, told=told: (folder / "gen_2/results.json").write_text(told), why)
            for told, why in {
                '{"accuracy": 0.5, "total_questions": 1e12}': r"results\.json: total_questions is above 1,000,000",
                '{"accuracy": 0.5, "n_total": Infinity}': r"results\.json: n_total is above 1,000,000",
                f'{{"accuracy": 1{"0" * 400}}}': r"results\.json: accuracy is above 1,000,000",
                f'{{"accuracy": 1{"0" * 5000}}}': r"results\.json: does not read as JSON",
            }.items()
        ),
        (lambda folder: (folder / "gen_1/link").symlink_to("/etc/passwd"), r"gen_1: link is a link"),
    ],
)
def test_a_faulty_folder_is_refused_with_the_place(tmp_path: Path, spoil: Any, told: str):
    folder = sia_run(tmp_path, [{"accuracy": 1}, {"accuracy": 1}])
    spoil(folder)
    with pytest.raises(Unusable, match=told):
        read_run(folder)


@BOXED
def test_a_run_goes_out_to_sias_own_reader_and_comes_back(task: Path, tmp_path: Path, sia_package: Path):
    home, out = tmp_path / "home", tmp_path / "runs"
    ran = sia(home, "run", task, "--run", "r7", *SMALL)
    assert ran.returncode == 0, ran.stderr
    assert answered(home, "export", "r7", out) == {"folder": str(out / "run_7")}
    again = sia(home, "export", "r7", out)
    assert again.returncode == 2 and "run_7 is there and not empty; nothing was written" in again.stderr

    command = [sys.executable, "-c", READER, str(out)]
    told = subprocess.run(
        command, env=environment(home, PYTHONPATH=str(sia_package.parent)), capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    seen = json.loads(told.stdout)
    ours = answered(home, "show", "r7")
    best = ours["generations"][-1]
    assert seen["run"]["task"] == "taste" and seen["run"]["max_generations"] == 2
    assert [g["has_target_agent"] for g in seen["run"]["generations"]] == [True, True]
    assert seen["run"]["generations"][1]["eval"]["accuracy_percent"] == 100 * best["scores"]["dev"]["value"]
    assert seen["run"]["generations"][1]["eval"]["total"] == 8 and seen["run"]["generations"][1]["has_improvement"]

    messages = json.loads((out / "run_7/gen_1/agent_execution.json").read_text())
    assert [m["role"] for m in messages[:2]] == ["user", "assistant"]
    assert answered(home, "import", out / "run_7", "--run", "back")["versions"] == 2
    back = answered(home, "show", "back")
    assert [v["harness"] for v in back["generations"]] == [v["harness"] for v in ours["generations"]]
    assert [v["scores"]["dev"]["value"] for v in back["generations"]] == [
        v["scores"]["dev"]["value"] for v in ours["generations"]
    ]
    assert back["status"] == "finished" and back["best"] is None and not back["held_out"]
    assert sia(home, "replay", "back").returncode == 0
    twice = sia(home, "import", out / "run_7", "--run", "back")
    assert twice.returncode == 2 and "run back exists" in twice.stderr
    branched = sia(home, "branch", "back", "--at", 0)
    assert branched.returncode == 2 and "was imported" in branched.stderr
