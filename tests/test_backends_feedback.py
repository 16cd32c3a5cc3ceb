"""The feedback agent as an LLM: which lever it may pick, whose word counts when it may not, and its candidates."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from story import accepted, asked, feedback_asked, logged, proposed, scored, started, trained
from writing import Answer, Scripted, gateway_that_says, registered_words, said, writing_room, wrote

from sia_events.agents.agentic import Agentic
from sia_events.agents.client import BudgetSpent
from sia_events.agents.direct import Direct
from sia_events.feedback_svc.algorithm import TRIGGERS
from sia_events.feedback_svc.service import feedback_svc
from sia_events.shared.events import (
    Event,
    FeedbackGiven,
    FeedbackRequested,
    HarnessPatched,
    HarnessPatchRequested,
    ProposalFailed,
    TaskRegistered,
    VersionRejected,
    Weights,
)
from sia_events.shared.ports import Blobs, Ports
from sia_events.shared.record import opening
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.tree import load_tree, store_tree

Words = tuple[TaskRegistered, Blobs]
BACKENDS = {"direct": Direct(), "agentic": Agentic()}
PATCH = HarnessPatchRequested(generation=1, parent="g0a", candidates=2, seed=3)


@pytest.fixture(scope="module")
def words() -> Words:
    return registered_words()


async def answered(ports: Ports, told: TaskRegistered, event: Event, *since: Event, **settings: Any) -> Sequence[Event]:
    """What the service performs on `event` behind a first version that was accepted, and what came `since`."""
    opened = {"backend": "direct", "meta_model": "scripted/writer", "target_model": "local/m", **settings}
    model = Weights(model=opened["target_model"])
    answers = b"".join(json.dumps({"id": f"i{n}", "answer": "animal"}).encode() + b"\n" for n in range(3))
    found = {
        "trajectory": await ports.blobs.put(b""),
        "outputs": await store_tree(ports.blobs, {"answers.jsonl": answers}),
    }
    past = [
        told,
        started(**opened),
        proposed().model_copy(update={"harness": told.reference, "weights": model}),
        asked("g0a", "dev"),
        logged("g0a", "dev").model_copy(update=found),
        scored("g0a", "dev", ("10" * told.sizes["dev"])[: told.sizes["dev"]]),
        accepted("g0a"),
        *since,
        event,
    ]
    records = await ports.bus.append("r1", opening("r1", past))
    work = Work(fold(records), records[-1], ports)
    return await feedback_svc.performs[type(event)](work, event)


async def feedback(
    home: Path, words: Words, script: list[Answer], **settings: Any
) -> tuple[FeedbackGiven, Scripted, Ports]:
    models = Scripted(script)
    async with writing_room(home, models, BACKENDS, blobs=words[1]) as ports:
        (given,) = await answered(ports, words[0], feedback_asked(1), **settings)
    assert isinstance(given, FeedbackGiven)
    return given, models, ports


def decision(**changes: Any) -> Answer:
    stated = {"lever": "weights", "algorithm": "reinforce", "reasons": ["half of dev is right"], "references": [6]}
    return said(json.dumps({**stated, "expected_gain": 0.1, **changes}))


async def test_the_model_picks_the_lever_and_its_reasons_are_recorded(tmp_path: Path, words: Words):
    given, models, ports = await feedback(tmp_path, words, [decision()])
    assert (given.lever, given.algorithm, given.expected_gain) == ("weights", "reinforce", 0.1)
    assert given.reasons == ("half of dev is right",) and given.evidence.dev_score == 0.5
    records = await ports.bus.history("r1")
    assert given.references == (str(records[5].id),)
    assert given.written and given.written.model == "scripted/writer"
    assert (await words[1].get(given.written.prompt)).decode() == models.asked[0].messages[1]["content"]


async def test_the_feedback_model_answers_where_one_is_named(tmp_path: Path, words: Words):
    _, models, _ = await feedback(tmp_path, words, [decision()], feedback_model="scripted/critic")
    assert models.asked[0].model == "scripted/critic"


async def test_a_choice_for_the_harness_has_no_algorithm(tmp_path: Path, words: Words):
    given, _, _ = await feedback(tmp_path, words, [decision(lever="harness")])
    assert (given.lever, given.algorithm) == ("harness", None)


@pytest.mark.parametrize(("named", "algorithm"), [("ppo", "ppo"), (None, "grpo")])
async def test_the_model_names_any_algorithm_where_none_is_set_and_the_rule_where_it_names_none(
    tmp_path: Path, words: Words, named: str | None, algorithm: str
):
    given, models, _ = await feedback(tmp_path, words, [decision(algorithm=named)], algorithm="auto")
    assert (given.lever, given.algorithm) == ("weights", algorithm)
    asked = models.asked[0].messages[1]["content"]
    assert all(f"`{name}`: {apt}" in asked for name, apt in TRIGGERS.items())


async def test_a_control_of_the_weights_has_its_algorithm_picked_by_rule(tmp_path: Path, words: Words):
    given, _, _ = await feedback(tmp_path, words, [], lever="weights", algorithm="auto")
    assert given.algorithm == "grpo" and "samples of an item are compared" in given.reasons[-1]


async def test_rewards_without_a_usual_range_are_imitated_only_where_most_are_the_least(tmp_path: Path, words: Words):
    speeds = tuple([1.0 + k / 100 for k in range(31)] + [10.0])
    drawn = scored("g0a", "train", "1" * 32).model_copy(update={"items": speeds})
    since = (asked("g0a", "train"), logged("g0a", "train"), drawn)
    async with writing_room(tmp_path, Scripted([]), BACKENDS, blobs=words[1]) as ports:
        (given,) = await answered(ports, words[0], feedback_asked(1), *since, lever="weights", algorithm="auto")
    # All but one lie in the lowest tenth of what there was; none of them is as good as none.
    assert isinstance(given, FeedbackGiven) and given.evidence.rewards[0] == 31
    assert given.algorithm == "entropic"


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (said("Let us change the weights."), "no JSON object"),
        (decision(lever="prompt"), 'lever is "harness" or "weights"'),
        (decision(algorithm="ppo"), "algorithm 'ppo' is not there; there are: reinforce"),
        (decision(reasons=[]), "length >= 1"),
        (decision(reasons=[" "]), "a reason is empty"),
        (decision(references=[99]), "records that you were not shown: 99"),
        (decision(references=["none"]), "records that you were not shown: none"),
        (decision(expected_gain=float("nan")), "expected_gain is a number"),
        (decision(expected_gain="much"), "not of the form"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_choice_that_is_not_allowed_is_mended_once_or_made_by_rule(
    tmp_path: Path, words: Words, bad: Answer, told: str
):
    given, models, _ = await feedback(tmp_path, words, [bad, decision(lever="harness")], algorithm="reinforce")
    assert told in models.asked[1].messages[-1]["content"] and given.lever == "harness"
    (tmp_path / "again").mkdir()
    given, models, _ = await feedback(tmp_path / "again", words, [bad, bad], algorithm="reinforce")
    assert given.lever == "harness" and given.written is None and len(models.asked) == 2
    assert given.reasons[0] == "no harness edit has been tried yet, and edits are cheap"
    assert given.reasons[-1].startswith("by rule, since scripted/writer made no choice that can be used")
    kept = given.reasons[-1].partition("kept as ")[2][:64]
    assert (await words[1].get(kept)).count(b"\n") == 5


@pytest.mark.parametrize("policy", ["harness", "weights", "alternate", "random"])
async def test_the_controls_ask_nobody(tmp_path: Path, words: Words, policy: str):
    given, models, _ = await feedback(tmp_path, words, [], lever=policy)
    assert given.written is None and not models.asked


async def test_weights_that_are_not_ours_to_change_are_no_choice(tmp_path: Path, words: Words):
    given, models, _ = await feedback(tmp_path, words, [], target_model="openai/gpt-9")
    assert given.lever == "harness" and not models.asked
    assert given.reasons == ("the weights of openai/gpt-9 are not ours to change, so the harness is",)


async def test_candidates_are_written_from_the_parents_files_and_have_its_weights(tmp_path: Path, words: Words):
    models = Scripted(lambda call: wrote({"extra.py": f"n = {call.seed}\n"}, f"seed {call.seed}"))
    async with writing_room(tmp_path, models, BACKENDS, blobs=words[1]) as ports:
        patched = await answered(ports, words[0], PATCH)
        parent = await load_tree(ports.blobs, words[0].reference)
        assert [event.version for event in patched if isinstance(event, HarnessPatched)] == ["g1a", "g1b"]
        for place, event in enumerate(patched):
            assert isinstance(event, HarnessPatched) and event.written
            assert (event.candidate, event.parent, event.weights.model) == (place, "g0a", "local/m")
            assert event.edits == ("extra.py",) and event.reason.startswith("seed ")
            tree = await load_tree(ports.blobs, event.harness)
            assert tree.keys() == {*parent, "extra.py"}
        prompt = models.asked[0].messages[1]["content"]
        assert parent["target_agent.py"].decode().splitlines()[0] in prompt and "g0a" in prompt


async def test_a_candidate_from_a_version_whose_adapter_was_refused_has_the_incumbents_weights(
    tmp_path: Path, words: Words
):
    models = Scripted(lambda call: wrote({"extra.py": f"n = {call.seed}\n"}))
    async with writing_room(tmp_path, models, BACKENDS, blobs=words[1]) as ports:
        found = {"trajectory": await ports.blobs.put(b""), "outputs": await store_tree(ports.blobs, {"x": b""})}
        since = (
            trained("g1a", "g0a", harness=words[0].reference),
            logged("g1a", "dev").model_copy(update=found),
            scored("g1a", "dev", "1" * words[0].sizes["dev"]),
            VersionRejected(version="g1a", over="g0a", comparison=None, reason="no gain"),
        )
        from_it = PATCH.model_copy(update={"parent": "g1a", "generation": 2})
        patched = await answered(ports, words[0], from_it, *since)
    made = [(event.parent, event.weights) for event in patched if isinstance(event, HarnessPatched)]
    assert made == [("g1a", Weights(model="local/m"))] * 2
    assert "g1a acted with were refused: what you write is tried with those of g0a" in str(models.asked[0].messages)


async def test_a_candidate_that_was_tried_under_these_weights_is_left_out(tmp_path: Path, words: Words):
    """The second candidate repeats the first; a third version would be the parent again, which changes nothing."""
    async with writing_room(tmp_path, Scripted([wrote({"a.py": ""})] * 2), BACKENDS, blobs=words[1]) as ports:
        (only,) = await answered(ports, words[0], PATCH)
    assert isinstance(only, HarnessPatched) and "g1b: the same files as g1a" in only.reason


async def test_a_generation_without_a_usable_candidate_says_what_came_instead(tmp_path: Path, words: Words):
    models = Scripted(lambda call: said("no" if "candidate 1 of 2" in call.messages[1]["content"] else ""))
    async with writing_room(tmp_path, models, BACKENDS, blobs=words[1]) as ports:
        (barren,) = await answered(ports, words[0], PATCH)
    assert isinstance(barren, ProposalFailed) and (barren.lever, barren.parent) == ("harness", "g0a")
    assert barren.reason.startswith("no candidate of direct with scripted/writer can be used: g1a: ")
    assert "no code" in barren.reason and "the reply was empty" in barren.reason


@pytest.mark.parametrize("event", [feedback_asked(1), PATCH], ids=["feedback", "patch"])
async def test_a_handler_that_runs_again_answers_the_same_and_pays_for_nothing(
    tmp_path: Path, words: Words, event: FeedbackRequested | HarnessPatchRequested
):
    models = Scripted(
        lambda call: decision() if "lever" in call.messages[0]["content"] else wrote({"a.py": f"n = {call.seed}\n"})
    )
    if isinstance(event, FeedbackRequested):
        models = Scripted([decision()])
    async with writing_room(tmp_path, models, BACKENDS, blobs=words[1]) as ports:
        before = await answered(ports, words[0], event)
    silent = Scripted([])
    async with writing_room(tmp_path, silent, BACKENDS, like=ports) as later:
        records = await later.bus.history("r1")
        work = Work(fold(records), records[-1], replace(later))
        after = await feedback_svc.performs[type(event)](work, event)
    assert list(after) == list(before) and not silent.asked


@pytest.mark.parametrize("event", [feedback_asked(1), PATCH], ids=["feedback", "patch"])
async def test_a_spent_budget_is_raised(tmp_path: Path, words: Words, event: Event):
    async with gateway_that_says(tmp_path, 402, "out of money", BACKENDS, blobs=words[1]) as ports:
        with pytest.raises(BudgetSpent, match="out of money"):
            await answered(ports, words[0], event)
