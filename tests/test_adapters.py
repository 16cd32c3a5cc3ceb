"""The registry of adapters: what each says of itself, what a run lists, and that one that was refused serves nobody."""

import json
from pathlib import Path
from typing import Any

import pytest
from given import given, recorded
from story import (
    ACCEPTED,
    BASE,
    accepted,
    asked,
    fed_back,
    feedback_asked,
    logged,
    patched,
    proposed,
    scored,
    started,
    trained,
)
from test_loop import NoDoor

from sia_events.adapters import adapters
from sia_events.feedback_svc.search import weights_from
from sia_events.feedback_svc.service import feedback_svc
from sia_events.infra.memory import MemoryBlobs, MemoryBus, SystemTime
from sia_events.infra.sandbox import UnsafeProcess
from sia_events.shared.events import (
    AttemptRequested,
    Event,
    FeedbackRequested,
    HarnessPatched,
    HarnessPatchRequested,
    Learning,
    Probe,
    TaskRegistered,
    VersionRejected,
    Weights,
    WeightUpdateRequested,
)
from sia_events.shared.ports import Blobs, Ports
from sia_events.shared.registration import register
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.task import find_task
from sia_events.target_runner.service import target_runner
from sia_events.trainer.manifest import manifest
from sia_events.views.adapters import adapters_text

D = "a" * 64
PROBE = Probe(texts=4, tokens=9, apart=2e-5, moved=0.75)
LEARNED = trained("g1a", "g0a", probe=PROBE, manifest="c" * 64)
TRIED = (*ACCEPTED, feedback_asked(1), fed_back(1, "weights"), LEARNED, scored("g1a", "dev", "1110"))
REFUSED = VersionRejected(version="g1a", over="g0a", comparison=None, reason="no gain")


def wanted(event: Event, *past: Event) -> list[Event]:
    """What both deciding services ask for behind `past` and `event`."""
    deciding = [service for service in (feedback_svc, target_runner) if type(event) in service.decides]
    return [made for service in deciding for made in given(service, *past).when(event).decided]


def test_a_refused_adapter_is_kept_on_the_record_and_tried_by_nobody_any_more():
    past: tuple[Event, ...] = TRIED
    said: list[Event] = []
    story = (
        REFUSED,
        feedback_asked(2),
        fed_back(2, "weights"),
        asked("g0a", "train", attempt="g0a.train.g2"),
        logged("g0a", "train").model_copy(update={"attempt": "g0a.train.g2"}),
        scored("g0a", "train", "10", attempt="g0a.train.g2", rewards=D),
        fed_back(2, "harness"),
        patched("g2a"),
        scored("g2a", "dev", "0000"),
        VersionRejected(version="g2a", over="g0a", comparison=None, reason="no gain"),
    )
    for event in story:
        said += wanted(event, *past)
        past = (*past, event)
    kinds = {type(event) for event in said}
    assert {AttemptRequested, FeedbackRequested, HarnessPatchRequested, WeightUpdateRequested} <= kinds
    for event in said:
        assert "g1a" not in {getattr(event, name, None) for name in ("version", "parent", "incumbent")}, event
        assert all(source.version != "g1a" for source in getattr(event, "older", ()))
    assert fold(recorded(*past)).versions["g1a"].weights == LEARNED.weights


async def test_a_search_goes_on_from_a_version_that_was_refused_without_its_adapter(tmp_path: Path):
    told, blobs = await words()
    first = proposed().model_copy(update={"harness": told.reference})
    past: list[Event] = [told, started(search="archive", candidates=2), first, scored("g0a", "dev", "1000")]
    past += [accepted("g0a"), feedback_asked(1), fed_back(1, "weights"), asked("g0a", "train")]
    past += [trained("g1a", "g0a", harness=told.reference), scored("g1a", "dev", "1110"), REFUSED, feedback_asked(2)]
    wants = given(feedback_svc, *past).when(fed_back(2)).then_types(HarnessPatchRequested)[0]
    assert isinstance(wants, HarnessPatchRequested) and wants.parent == "g1a", "PUCT ranks it first"
    records = recorded(*past, fed_back(2), wants)
    ports = Ports(MemoryBus(blobs), blobs, UnsafeProcess(), SystemTime(), NoDoor(), tmp_path)
    patches = await feedback_svc.performs[HarnessPatchRequested](Work(fold(records), records[-1], ports), wants)
    made = [patch for patch in patches if isinstance(patch, HarnessPatched)]
    assert [(patch.parent, patch.weights) for patch in made] == [("g1a", BASE)] * 2


@pytest.mark.parametrize(("verdict", "acts_with"), [(accepted("g1a", "g0a"), LEARNED.weights), (REFUSED, BASE)])
def test_weights_that_were_let_through_once_are_their_harness_s_own_and_others_are_the_incumbents(
    verdict: Event, acts_with: Weights
):
    run = fold(recorded(*TRIED, verdict))
    assert weights_from(run, run.versions["g1a"]) == acts_with
    assert weights_from(run, run.versions["g0a"]) == BASE, "let through, the incumbent's or not"


async def words() -> tuple[TaskRegistered, Blobs]:
    blobs = MemoryBlobs()
    return await register(find_task("words"), blobs, MemoryBlobs(), 8), blobs


def test_a_run_lists_its_adapters_with_their_verdicts():
    later = trained("g2a", "g0a", algorithm="grpo", weights=Weights(model="local/m", adapter="d" * 64))
    rows = adapters(recorded(*TRIED, REFUSED, feedback_asked(2), fed_back(2, "weights"), later))
    assert [(row["version"], row["algorithm"], row["verdict"]) for row in rows] == [
        ("g1a", "reinforce", "refused"),
        ("g2a", "grpo", "waits"),
    ]
    assert rows[0]["adapter"] == "b" * 64 and rows[0]["from"] is None
    assert rows[0]["probe"] == PROBE.model_dump() and rows[1]["probe"] is None
    heads, first, second = adapters_text(rows).splitlines()
    assert heads.split()[:4] == ["version", "of", "algorithm", "gate"]
    assert first.split()[:8] == ["g1a", "g0a", "reinforce", "refused", "b" * 12, "base", "2e-05", "0.75"]
    assert "none made" in second
    assert adapters_text([]).startswith("no adapters")


def about(**changes: Any) -> bytes:
    told = {
        "weights": LEARNED.weights,
        "base": "e" * 64,
        "parent": BASE,
        "algorithm": "reinforce",
        "learning": Learning(),
        "trajectories": [D],
        "rewards": [D],
        "counts": {"learned": 8, "equal_rewards": 2},
        "metrics": {"loss": 0.5},
        "seed": 3,
        "code": "sia-events 0",
        "backend": "ours",
        "probe": PROBE,
    }
    return manifest(**{**told, **changes})


def test_a_manifest_says_where_an_adapter_comes_from_in_the_same_bytes_each_time():
    assert about() == about(counts={"equal_rewards": 2, "learned": 8})
    told = json.loads(about())
    assert told["adapter"] == LEARNED.weights.adapter and told["parent"] is None
    assert told["base"] == {"model": "local/m", "sha256": "e" * 64}
    assert told["data"] == {"trajectories": [D], "rewards": [D]}
    assert told["learning"] == Learning().model_dump(mode="json") and told["probe"]["moved"] == 0.75
    assert about(seed=4) != about()
