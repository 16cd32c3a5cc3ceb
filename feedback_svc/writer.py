"""The feedback agent as an LLM: it picks the lever, and has candidates with another harness written."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sia_events.agents.candidates import why_none, write_candidates
from sia_events.agents.client import asking, spending
from sia_events.agents.evidence import Attempt
from sia_events.agents.observe import observe
from sia_events.agents.prompt import decision_prompt, feedback_prompt
from sia_events.agents.structured import structured
from sia_events.feedback_svc.algorithm import Signal, offered, pick
from sia_events.feedback_svc.decision import RULES, Decision, read_decision, trainable
from sia_events.feedback_svc.lever import LeverChoice
from sia_events.feedback_svc.search import parents, weights_from
from sia_events.shared.events import (
    Event,
    FeedbackGiven,
    FeedbackRequested,
    HarnessPatched,
    HarnessPatchRequested,
    Lever,
    ProposalFailed,
    Written,
)
from sia_events.shared.ports import Brief
from sia_events.shared.record import Record
from sia_events.shared.registration import decode_task
from sia_events.shared.run import Version
from sia_events.shared.service import Work
from sia_events.shared.summary import cost
from sia_events.shared.task import Task
from sia_events.shared.tree import load_tree

NOT_THE_INCUMBENT = """\

This run is a search: what is called the incumbent above is {parent}, an earlier version that was picked for you to go
on from. The gate compares the best candidate with {over}."""

OTHER_WEIGHTS = """\

The weights that {parent} acted with were refused: what you write is tried with those of {over}."""

ROLLOUTS_START = """\

On train, where the model learns from rollouts, a line of items.jsonl has the key `state`: a folder under the data, with
what an earlier version wrote on dev. A rollout of that item is to start from there."""

ROLLOUT_STARTS = """\

The data may have one folder under `state`, with what the best attempt before wrote, or another that was good. The
attempt is to start from there."""


async def choose(work: Work, asked: FeedbackRequested, by_rule: LeverChoice, signal: Signal) -> FeedbackGiven:
    """The lever that the model picks, with its reasons; the rule's, and why, where it says nothing that can be used."""
    settings, blobs = work.run.settings, work.ports.blobs
    if not trainable(settings):
        why = f"the weights of {settings.target_model} are not ours to change, so the harness is"
        return given(asked, LeverChoice("harness", None, (why,), by_rule.evidence))
    task, records, attempt, usd = await _known(work)
    algorithms = offered(settings, signal)
    allowed: Mapping[Lever, Mapping[str, str]] = {"harness": {}, "weights": algorithms}
    words = decision_prompt(work.run, records, task, attempt, by_rule.evidence, allowed, settings.prompt_tokens, usd)

    def read(text: str) -> Decision:
        return read_decision(text, algorithms, pick(settings, by_rule.evidence, signal).algorithm, words.references)

    brief = _brief(work, f"feedback.g{asked.generation}", words.text, settings.seed)
    try:
        async with asking(brief, work.ports) as ask:
            decision, trajectory = await structured(ask, RULES, brief.prompt, read)
    except Exception as ended:
        why = f"by rule, since {brief.model} made no choice that can be used: {await why_none(ended, brief, work)}"
        return given(asked, replace(by_rule, reasons=(*by_rule.reasons, why)))
    written = Written(
        backend=settings.backend,
        model=brief.model,
        prompt=await blobs.put(words.text.encode()),
        trajectory=await blobs.put(trajectory),
        note=await blobs.put("\n".join(decision.reasons).encode()),
        **await spending(brief, work.ports),
    )
    return FeedbackGiven(
        generation=asked.generation,
        incumbent=asked.incumbent,
        lever=decision.lever,
        algorithm=decision.algorithm,
        reasons=decision.reasons,
        evidence=by_rule.evidence,
        references=decision.references,
        expected_gain=decision.expected_gain,
        written=written,
    )


async def write(work: Work, asked: HarnessPatchRequested) -> Sequence[Event]:
    """Candidates with another harness, as many of those wanted as can be used."""
    run = work.run
    from_each = parents(run, asked)
    briefs = [(await _writing(work, asked, parent), count) for parent, count in from_each]
    # What was tried under other weights may be tried again: a harness fits the weights it was tried with.
    weights = {parent.name: weights_from(run, parent) for parent, _ in from_each}
    tried = {v.harness: v.name for v in run.versions.values() if v.weights in weights.values()}
    written = await write_candidates(briefs, asked.generation, run.settings.backend, tried, work)
    left_out = "; ".join(written.left_out)
    if not written.usable:
        why = f"no candidate of {run.settings.backend} with {briefs[0][0].model} can be used: {left_out}"
        return [ProposalFailed(generation=asked.generation, parent=asked.parent, lever="harness", reason=why)]
    by_place = [parent for parent, count in from_each for _ in range(count)]
    return [
        HarnessPatched(
            version=candidate.version,
            generation=asked.generation,
            candidate=candidate.place,
            parent=by_place[candidate.place].name,
            harness=candidate.harness,
            weights=weights[by_place[candidate.place].name],
            edits=candidate.edits,
            reason=candidate.reason + (f" (left out: {left_out})" if left_out and not place else ""),
            written=candidate.written,
        )
        for place, candidate in enumerate(written.usable)
    ]


async def _writing(work: Work, asked: HarnessPatchRequested, parent: Version) -> Brief:
    """What is told to who changes the parent's harness."""
    run, blobs = work.run, work.ports.blobs
    assert run.task is not None
    task, records, attempt, usd = await _known(work, parent.name)
    harness = await load_tree(blobs, parent.harness)
    words = feedback_prompt(run, records, task, harness, attempt, run.settings.prompt_tokens, usd)
    data = await load_tree(blobs, run.task.datasets.get("train") or next(iter(run.task.datasets.values())))
    apart = "" if parent.name == run.incumbent else NOT_THE_INCUMBENT.format(parent=parent.name, over=run.incumbent)
    if weights_from(run, parent) != parent.weights:
        apart += OTHER_WEIGHTS.format(parent=parent.name, over=run.incumbent)
    if run.settings.search == "archive" and run.settings.lever != "harness":
        apart += ROLLOUT_STARTS if run.task.whole else ROLLOUTS_START
    return _brief(work, "feedback", words.text + apart, asked.seed + asked.generation, harness, data)


async def _known(work: Work, version: str | None = None) -> tuple[Task, list[Record], Attempt, float | None]:
    """The task, the log up to the cause, what a version (else the incumbent) did on dev, and what the run has cost.

    All of it is the same whenever the handler runs again; the cost is None where nobody knows it.
    """
    assert work.run.task is not None
    task = decode_task(await work.ports.blobs.get(work.run.task.spec))
    records = list(await work.ports.bus.history(work.run.name))[: work.cause.position]
    return task, records, await observe(work.run, records, work.ports.blobs, version), cost(records)["usd"]


def _brief(
    work: Work,
    key: str,
    prompt: str,
    seed: int,
    files: Mapping[str, bytes] | None = None,
    data: Mapping[str, bytes] | None = None,
) -> Brief:
    settings = work.run.settings
    model = settings.feedback_model or settings.meta_model
    assert model is not None, "a run with an LLM backend is opened with a model for it"
    return Brief(
        run=work.run.name,
        role="feedback",
        key=key,
        model=model,
        prompt=prompt,
        files=files or {},
        data=data or {},
        turns=settings.turns,
        seed=seed,
    )


def given(asked: FeedbackRequested, choice: LeverChoice) -> FeedbackGiven:
    """A choice by rule as it is recorded."""
    return FeedbackGiven(
        generation=asked.generation,
        incumbent=asked.incumbent,
        lever=choice.lever,
        algorithm=choice.algorithm,
        reasons=choice.reasons,
        evidence=choice.evidence,
    )
