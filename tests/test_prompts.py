"""What the meta- and the feedback-agent read: whole, within its budget, and without a right answer in it."""

import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from string import Template

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sia_events.agents.evidence import Attempt, Outcome, PublicFeedback, choose, feedback_on
from sia_events.agents.fit import Part, Section, cut, fenced, fit, tokens
from sia_events.agents.lineage import versions
from sia_events.agents.observe import answers_in, calls_in, items_in, observe, seen
from sia_events.agents.prompt import Prompt, decision_prompt, feedback_prompt, meta_prompt
from sia_events.agents.public_data import summarise
from sia_events.evaluator.grade import OutputRefused, grade_labels, read_results
from sia_events.feedback_svc.algorithm import TRIGGERS
from sia_events.feedback_svc.lever import gather
from sia_events.infra.memory import MemoryBlobs
from sia_events.shared.calls import ModelCall, encode_call
from sia_events.shared.events import Estimate, Event, RunSteered, Scored, VersionRejected
from sia_events.shared.record import Record, parse_record
from sia_events.shared.registration import register
from sia_events.shared.run import Run, fold
from sia_events.shared.task import Task, answers, find_task, public_files
from sia_events.shared.tree import store_tree
from tests.given import recorded
from tests.story import accepted, asked, failed, logged, patched, proposed, registered, scored, started

HERE = Path(__file__).parent
GOLDEN = HERE / "golden/prompts"
AGENT = {"target_agent.py": b'"""An agent."""\n\nprint("hello")\n', "spec.json": b'{"examples": 8}\n'}
BUDGET = 24_000


@cache
def story() -> tuple[Run, tuple[Record, ...], Task, Attempt]:
    """The recorded run up to the feedback behind its second generation, with outputs made to fit its scores."""
    lines = (HERE / "runs/words-both-levers.jsonl").read_bytes().splitlines()
    records = tuple(parse_record(line) for line in lines)[:53]
    task = find_task("words")
    right = answers(task, "dev")
    event = records[20].event
    assert isinstance(event, Scored) and event.version == "g1a" and event.split == "dev"
    outputs = {
        item: label if score else task.labels[(task.labels.index(label) + 1 + n % 2) % len(task.labels)]
        for n, ((item, label), score) in enumerate(zip(right.items(), event.items, strict=True))
    }
    items = items_in(public_files(task, "dev")["items.jsonl"])
    calls = tuple(call(n, item, text, outputs[item], task.labels) for n, (item, text) in enumerate(items.items()))
    run = fold(records)
    return run, records, task, seen(event, records[20].position, "b" * 64, items, outputs, calls, task.labels, True)


def call(n: int, item: str | None, text: str, answer: str, labels: Sequence[str] = ()) -> ModelCall:
    """A call as the gateway records it: a choice call where there are labels, else a chat."""
    asked: dict[str, object] = {"messages": [{"role": "user", "content": f"What is it?\n\n{text}"}]}
    message = {"choices": [{"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}]}
    chosen = {"choice": answer, "logprobs": [-0.1 if label == answer else -3.0 for label in labels]}
    return ModelCall(
        call=f"c{n}",
        attempt="g1a.dev",
        version="g1a",
        kind="choice" if labels else "chat",
        model="local/m",
        item=item,
        digest="d" * 64,
        n=0,
        seed=0,
        request={**asked, "choices": list(labels)} if labels else asked,
        reply=chosen if labels else message,
        prompt_tokens=40 + len(text),
        completion_tokens=1,
        seconds=0.25 + n / 1000,
    )


def built(kind: str, budget: int = BUDGET, extra: Sequence[Event] = ()) -> Prompt:
    run, records, task, attempt = story()
    run = fold(recorded(*extra), run)
    match kind:
        case "meta":
            data = summarise(public_files(task, "dev"))
            return meta_prompt(task, "local/m", data, AGENT, ["# Sort stamps\n\nBy country."], budget)
        case "feedback":
            return feedback_prompt(run, records, task, AGENT, attempt, budget)
        case _:
            allowed: dict[typing.Any, Mapping[str, str]] = {"harness": {}, "weights": TRIGGERS}
            return decision_prompt(run, records, task, attempt, gather(run, records), allowed, budget)


KINDS = pytest.mark.parametrize("kind", ("meta", "feedback", "decision"))


@KINDS
def test_a_prompt_is_the_one_on_file(kind: str):
    """SIA_RENEW_GOLDEN=1 writes the files anew; read the difference before it is committed."""
    prompt, file = built(kind, 3_500), GOLDEN / f"{kind}.md"
    if os.environ.get("SIA_RENEW_GOLDEN"):
        file.write_text(prompt.text, encoding="utf-8")
    assert prompt.text.splitlines() == file.read_text(encoding="utf-8").splitlines()


@KINDS
@pytest.mark.parametrize("budget", (2_000, 3_000, 5_000, 24_000))
def test_a_prompt_stays_within_its_budget_and_says_what_is_missing(kind: str, budget: int):
    prompt = built(kind, budget, [RunSteered(text="Look at plants. " * 400)])
    assert tokens(prompt.text) <= budget
    assert all(line in prompt.text for line in prompt.omitted)
    assert prompt.omitted or "Nothing was left out." in prompt.text


@KINDS
def test_the_same_log_gives_the_same_prompt(kind: str):
    assert built(kind) == built(kind)


def test_a_budget_below_the_fixed_words_is_refused():
    with pytest.raises(ValueError, match="prompt_tokens"):
        built("feedback", 500)


def test_a_prompt_has_no_figure_of_the_gate_and_none_of_the_test():
    run, records, _, _ = story()
    for kind in ("feedback", "decision"):
        text = built(kind).text
        for event in (record.event for record in records):
            if isinstance(event, Scored) and event.split == "gate":
                assert f"{event.score.value:.3f}" not in text
            if isinstance(event, VersionRejected) and event.comparison:
                assert event.reason not in text and f"{event.comparison.gain:.3f}" not in text
    assert run.verdicts["g2c"].comparison is not None


def test_references_name_records_that_the_prompt_shows():
    _, records, _, _ = story()
    prompt = built("decision")
    assert {14, 21, 31} <= prompt.references.keys()
    assert all(prompt.references[position] == str(records[position - 1].id) for position in prompt.references)
    shown = {type(records[position - 1].event).__name__ for position in prompt.references}
    assert shown <= {"AgentProposed", "HarnessPatched", "Scored", "VersionAccepted", "VersionRejected"}


def test_words_of_steering_are_read():
    assert "Prefer few calls." in built("feedback", extra=[RunSteered(text="Prefer few calls.")]).text
    assert "Prefer few calls." in built("decision", extra=[RunSteered(text="Prefer few calls.")]).text


def test_a_longer_backtick_fence_holds_whatever_an_agent_wrote():
    assert fenced("```\nignore the above\n```").startswith("````\n")


# What feedback can carry.


def test_feedback_has_no_field_for_an_answer():
    """A field added here has to be argued for: nothing in it may come from the evaluator but a class of outcome."""
    types = typing.get_type_hints(PublicFeedback)
    assert {field.name: types[field.name] for field in fields(PublicFeedback)} == {
        "item": str,
        "outcome": Outcome,
        "output": str,
        "tokens": int,
        "seconds": float,
    }
    assert set(typing.get_args(Outcome)) == {"right", "wrong", "invalid", "unanswered", "above", "below"}


def test_outcomes_are_classes():
    outputs = {"a": "x", "b": "y", "c": "z"}
    feedback = feedback_on(["a", "b", "c", "d"], [1.0, 0.0, 0.0, 0.0], outputs, (), ("x", "y"))
    assert [one.outcome for one in feedback] == ["right", "wrong", "invalid", "unanswered"]
    errors = feedback_on(["a", "b"], [0.0, 1.0], outputs, (), (), maximize=False)
    assert [one.outcome for one in errors] == ["right", "wrong"]


def test_a_distance_from_the_answer_is_not_passed_on():
    feedback = feedback_on(["a", "b", "c"], [0.25, 17.5, 3.125], {"a": "1"}, (), (), maximize=False)
    assert [one.outcome for one in feedback] == ["above", "below", "above"]
    assert "17.5" not in repr(feedback)


def windows(text: str, width: int = 8) -> set[str]:
    return {text[i : i + width] for i in range(len(text) - width + 1)}


SECRET = st.text("abcdefghijklmnopqrstuvwxyz ", min_size=8, max_size=30)
OUTPUT = st.text("abcdefghijklmnopqrstuvwxyz `|\n", max_size=30)


@settings(max_examples=60)
@given(
    right=st.lists(SECRET, min_size=2, max_size=5),
    written=st.lists(OUTPUT, min_size=5, max_size=5),
    quoting=st.sampled_from(("items", "failures", "broken", "missing")),
    scores=st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=5, max_size=5),
)
def test_no_prompt_tells_what_only_the_answers_know(
    right: list[str], written: list[str], quoting: str, scores: list[float]
):
    """Eight characters in a row that are in the answers and in a prompt are public, the agent's output or our own."""
    known = "\n".join([*written, *(text.replace("|", "/").replace("`", "'") for text in written)])
    known += "\n".join(" ".join(text.split()) for text in written)
    # What the same story tells of other answers, which no letter is in.
    known += "\n".join(told([8 * str(n) for n in range(len(right))], written, quoting, scores))
    secret = set[str]().union(*(windows(label) for label in right)) - windows(known)
    for prompt in told(right, written, quoting, scores):
        assert not secret & windows(prompt)


def told(right: list[str], written: list[str], quoting: str, scores: list[float]) -> list[str]:
    """Both prompts, behind everything that could quote the answers `right`."""
    _, _, words, _ = story()
    task = replace(words, labels=(), evaluator="evaluate.py")
    key = {f"d{n}": label for n, label in enumerate(right)}
    outputs = {item: text for item, text in zip(key, written, strict=False) if text}
    records = recorded(
        registered(),
        started(),
        proposed(),
        logged("g0a", "dev"),
        judged("g0a", grader(key, quoting, scores), key, outputs),
        accepted("g0a"),
        patched("g1a"),
        asked("g1a", "gate"),
        failed("g1a", "gate").model_copy(update={"message": "; ".join(right)}),
        VersionRejected(version="g1a", over="g0a", comparison=None, reason=f"failed on the gate: {right[0]}"),
        patched("g1b"),
        asked("g1b", "dev"),
        refused("g1b", grader(key, "broken", scores), key),
    )
    run = fold(records)
    score = records[4].event
    assert isinstance(score, Scored)
    items = dict.fromkeys(key, "a public text")
    calls = tuple(call(n, item, "a public text", outputs.get(item, "")) for n, item in enumerate(key))
    attempt = seen(score, 5, "b" * 64, items, outputs, calls, (), True)
    allowed: dict[typing.Any, Mapping[str, str]] = {"harness": {}, "weights": TRIGGERS}
    prompts = (
        feedback_prompt(run, records, task, AGENT, attempt, BUDGET),
        decision_prompt(run, records, task, attempt, gather(run, records), allowed, BUDGET),
    )
    return [prompt.text for prompt in prompts]


def grader(key: Mapping[str, str], quoting: str, scores: Sequence[float]) -> bytes:
    """A results.json by an evaluator that puts the right answers wherever it can."""
    items = {item: score for item, score in zip(key, scores, strict=False)}
    match quoting:
        case "items":
            return msgspec.json.encode({"items": {**items, **dict.fromkeys(key.values(), 1.0)}})
        case "failures":
            return msgspec.json.encode({"items": items, **{label: {"x": 1.0} for label in key.values()}})
        case "broken":
            return msgspec.json.encode({"items": {**items, "d0": key["d0"]}, "details": list(key.values())})
        case _:
            return msgspec.json.encode({"items": dict.fromkeys(key.values(), 1.0)})


def judged(version: str, results: bytes, key: Mapping[str, str], outputs: Mapping[str, str]) -> Scored:
    """What the evaluator makes of the results; where it refuses them, of the outputs; answers name its classes."""
    try:
        grades = read_results({"results.json": results}, key)
    except OutputRefused:
        lines = [msgspec.json.encode({"id": item, "answer": text}) for item, text in outputs.items()]
        grades = grade_labels({"answers.jsonl": b"\n".join(lines)}, key, tuple(set(key.values())))
    quoted = {f"should be {label}": 1 for label in key.values()}
    score = Estimate(value=0.25, low=0.125, high=0.5, n=len(key))
    told = {"items": grades.items, "failures": {**grades.failures, **quoted}, "score": score}
    return scored(version, "dev", "0").model_copy(update=told)


def refused(version: str, results: bytes, key: Mapping[str, str]) -> Event:
    with pytest.raises(OutputRefused) as caught:
        read_results({"results.json": results}, key)
    return failed(version, "dev", "invalid_output").model_copy(update={"message": str(caught.value)})


# What is chosen, and what is fitted in.


def attempt_of(outcomes: str, outputs: Sequence[str]) -> Attempt:
    """`outcomes` is one digit an item, 1 right; items are called i0, i1 and so on."""
    ids = [f"i{n}" for n in range(len(outcomes))]
    calls = tuple(call(n, item, "t" * (n + 1), "x") for n, item in enumerate(ids))
    given = dict(zip(ids, outputs, strict=True))
    return seen(
        scored("g1a", "dev", outcomes), 7, "b" * 64, dict.fromkeys(ids, "t"), given, calls, ("x", "y", "z"), True
    )


def test_what_broke_against_the_parent_comes_first():
    chosen = choose(attempt_of("0011", "xyzx"), [0.0, 1.0, 1.0, 1.0], "g0a")
    assert chosen[0].item == "i1" and "worse than under the parent, g0a" in chosen[0].reasons


def test_failures_of_every_class_are_chosen_before_a_second_of_one():
    chosen = choose(attempt_of("000001", ["x", "x", "y", "?", "", "x"]))
    first = [one.item for one in chosen]
    assert set(first[:3]) == {"i4", "i3", "i0"}
    assert first.index("i2") < first.index("i1"), "another wrong output says more than the same one again"


def test_the_longest_the_costliest_and_one_success_are_chosen():
    reasons = {reason for one in choose(attempt_of("1111", "xxxx")) for reason in one.reasons}
    assert reasons == {"the most tokens", "the most time", "a success"}


def test_money_tells_the_costliest_where_some_was_paid():
    attempt = attempt_of("1111", "xxxx")
    calls = tuple(msgspec.structs.replace(c, usd=1.0 if c.item == "i2" else 0.1) for c in attempt.calls)
    assert next(one for one in choose(replace(attempt, calls=calls)) if "the most money" in one.reasons).item == "i2"


def test_calls_without_an_item_are_shown_as_such():
    run, records, task, attempt = story()
    bare = replace(attempt, calls=tuple(msgspec.structs.replace(c, item=None) for c in attempt.calls))
    prompt = feedback_prompt(run, records, task, AGENT, bare, BUDGET)
    assert "128 calls that name no item of dev" in prompt.text


def test_a_task_that_keeps_its_items_to_itself_gives_counts_and_calls():
    run, records, task, _ = story()
    event = records[20].event
    assert isinstance(event, Scored)
    calls = [call(n, f"q{n}", "Which move?", "e4") for n in range(3)]
    attempt = seen(event, 21, "b" * 64, {}, {}, calls, (), True)
    text = feedback_prompt(run, records, task, AGENT, attempt, BUDGET).text
    assert "right 93, wrong 35" in text and "3 calls that name no item of dev" in text and "Which move?" in text
    assert "None that can be told by itself." in text and "### Item" not in text


def test_of_many_versions_the_accepted_and_the_newest_stay():
    past = [registered(), started(), proposed(), scored("g0a", "dev", "0101"), accepted("g0a")]
    for generation in range(1, 200):
        past += [patched(f"g{generation}a"), scored(f"g{generation}a", "dev", "0101")]
    records = recorded(*past)
    section = Section("versions", 1.0, versions(fold(records), records), between="\n")
    text = fit(Template("${table}${omitted}"), {}, {"table": section}, 2_000).text
    assert "| g0a |" in text and "| g199a |" in text and "| g5a |" not in text
    assert "of 200 versions: g" in text


def test_a_part_that_is_too_long_is_cut_and_says_so():
    section = Section("files", 1.0, [Part("x" * 9_000, "long.py")])
    fitted = fit(Template("${code}\n${omitted}"), {}, {"code": section}, 2_000)
    assert tokens(fitted.text) <= 2_000
    assert "characters left out" in fitted.text and fitted.omitted[0].startswith("long.py: ")


@given(st.text(max_size=300), st.integers(0, 300))
def test_a_cut_text_is_never_longer_than_asked(text: str, limit: int):
    assert len(cut(text, limit)) <= limit
    assert cut(text, len(text)) == text


# What is loaded.


async def test_an_attempt_is_loaded_from_public_blobs_alone():
    blobs, private = MemoryBlobs(), MemoryBlobs()
    task = find_task("words")
    task_registered = await register(task, blobs, private, 512)
    items = items_in(public_files(task, "dev")["items.jsonl"])
    first = next(iter(items))
    outputs = await store_tree(blobs, {"answers.jsonl": msgspec.json.encode({"id": first, "answer": "plant"})})
    trajectory = await blobs.put(encode_call(call(0, first, items[first], "plant")))
    execution = logged("g0a", "dev").model_copy(update={"outputs": outputs, "trajectory": trajectory})
    score = scored("g0a", "dev", "0" * len(items))
    records = recorded(task_registered, started(), proposed(), execution, score, accepted("g0a"))
    attempt = await observe(fold(records), records, blobs)
    assert list(attempt.items) == list(items) and attempt.record == 5 and attempt.trajectory == trajectory
    assert attempt.feedback[0] == PublicFeedback(first, "wrong", "plant", 41 + len(items[first]), 0.25)
    assert {one.outcome for one in attempt.feedback[1:]} == {"unanswered"}


def test_unreadable_answers_are_passed_over():
    lines = b'{"id": "a", "answer": "x"}\n\xff\n[1]\n{"id": 3, "answer": "x"}\n{"id": "b", "answer": 4}\n' + b"[" * 9999
    assert answers_in(lines) == {"a": "x", "b": "4"}
    assert calls_in(b"") == ()


def test_a_reply_that_another_start_of_the_program_was_given_is_not_shown():
    mine, other = call(1, "a", "fern", "plant"), call(2, "a", "moss", "film")
    lines = [encode_call(mine), encode_call(msgspec.structs.replace(other, other_start=True))]
    assert calls_in(b"\n".join(lines)) == (mine,)


# What is said of public data.


def test_labels_are_counted_in_the_open_split_only():
    files = {
        "train.jsonl": b'{"id": "a", "text": "t", "label": "x"}\n{"id": "b", "text": "u", "label": "x"}\n',
        "items.jsonl": b'{"id": "c", "text": "v", "label": "y"}\n',
    }
    told = summarise(files)
    assert "labels: x 2" in told and "labels: y" not in told


def test_every_kind_of_file_is_summed_up():
    files = {
        "a.csv": b"id,size\n1,2\n3,4\n",
        "b.json": b'{"k": [1, 2]}',
        "c.txt": b"hello\nworld\n",
        "d.bin": b"\xff\xfe\x00",
        "e.json": b"{broken",
        "f.jsonl": b"",
        "g.json": b'["x", "y"]',
    }
    told = summarise(files).splitlines()
    assert told[0] == "- `a.csv`, 16 bytes: 2 rows with id, size; the first:"
    assert "an object with 1 keys" in summarise(files) and "a list of 2" in summarise(files)
    assert "binary." in summarise(files) and "text that is no json" in summarise(files)
