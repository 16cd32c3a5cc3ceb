"""The feedback agent: reads the log's figures, picks a lever, makes harness candidates; by rule, or as an LLM agent."""

from collections.abc import Sequence
from string import ascii_lowercase

from sia_events.agents.observe import calls_in
from sia_events.feedback_svc import proposer, template, writer
from sia_events.feedback_svc.algorithm import Signal, carry_logprobs
from sia_events.feedback_svc.gate import compare_on
from sia_events.feedback_svc.lever import choose_lever, invalid_rate, rewards_seen, worthless
from sia_events.feedback_svc.search import parents, weights_from
from sia_events.shared.events import (
    Event,
    FeedbackRequested,
    HarnessPatched,
    HarnessPatchRequested,
    ProposalFailed,
    Weights,
)
from sia_events.shared.registration import decode_task
from sia_events.shared.run import Run, Version
from sia_events.shared.service import Work
from sia_events.shared.task import Task
from sia_events.shared.tree import load_tree, store_tree


async def give_feedback(work: Work, asked: FeedbackRequested) -> Sequence[Event]:
    """Pick the lever of the next generation; the choice, its reasons and its evidence go into the record."""
    settings, signal = work.run.settings, await _signal(work)
    records = (await work.ports.bus.history(work.run.name))[: work.cause.position]
    choice = choose_lever(work.run, records, signal)
    if settings.backend != "builtin" and settings.lever == "auto":
        return [await writer.choose(work, asked, choice, signal)]
    return [writer.given(asked, choice)]


async def _signal(work: Work) -> Signal:
    """What an algorithm is picked on beside figures; looked for only where one is picked."""
    run, blobs = work.run, work.ports.blobs
    if run.settings.algorithm != "auto":
        return Signal()
    assert run.task is not None and run.incumbent is not None, "feedback is asked for behind the first verdict"
    task = decode_task(await blobs.get(run.task.spec))
    attempt = run.scored(run.incumbent, "dev")[-1].attempt
    calls = calls_in(await blobs.get(run.executions[attempt].trajectory))
    none = worthless(rewards_seen(run, run.incumbent)[1], run.task.maximize)
    return Signal(task.ranking, carry_logprobs(calls, run.task.whole), none)


async def patch(work: Work, asked: HarnessPatchRequested) -> Sequence[Event]:
    """K candidates: an LLM agent's, or typed edits of the parents' harnesses that this run has not tried."""
    run, blobs = work.run, work.ports.blobs
    if run.settings.backend != "builtin":
        return await writer.write(work, asked)
    assert run.task is not None
    task = decode_task(await blobs.get(run.task.spec))
    candidates: list[HarnessPatched] = []
    try:
        specs = {v.name: await _spec(work, v.harness, task) for v in run.versions.values()}
        # What was tried under other weights may be tried again: a harness fits the weights it was tried with.
        tried = {(template.digest(specs[v.name]), v.weights) for v in run.versions.values()}
        for parent, count in parents(run, asked):
            weights = weights_from(run, parent)
            known = {digest for digest, under in tried if under == weights}
            seed = asked.seed + asked.generation
            for proposal in proposer.propose(specs[parent.name], _evidence(run, parent), known, count, seed):
                tried.add((template.digest(proposal.spec), weights))
                harness = await store_tree(blobs, template.render(proposal.spec, task))
                candidates.append(_candidate(asked, len(candidates), parent, harness, weights, proposal))
    except template.NotATemplate as error:
        # The built-in proposer knows one kind of harness; a task of another kind is not a fault of anybody.
        return [_barren(asked, f"the built-in proposer has no template for this task: {error}")]
    names = ", ".join(parent.name for parent, _ in parents(run, asked))
    return candidates or [_barren(asked, f"every edit of {names}'s harness has been tried")]


def _candidate(
    asked: HarnessPatchRequested,
    place: int,
    parent: Version,
    harness: str,
    weights: Weights,
    proposal: proposer.Proposal,
) -> HarnessPatched:
    return HarnessPatched(
        version=f"g{asked.generation}{ascii_lowercase[place]}",
        generation=asked.generation,
        candidate=place,
        parent=parent.name,
        harness=harness,
        weights=weights,
        edits=proposal.edits,
        reason=proposal.reason,
    )


def _barren(asked: HarnessPatchRequested, reason: str) -> ProposalFailed:
    return ProposalFailed(generation=asked.generation, parent=asked.parent, lever="harness", reason=reason)


async def _spec(work: Work, harness: str, task: Task) -> template.Spec:
    """The harness as a template spec; one that is not from the template starts from the plain question."""
    tree = await load_tree(work.ports.blobs, harness)
    return template.read(tree) if template.SPEC in tree else template.naive_spec(task)


def _evidence(run: Run, parent: Version) -> proposer.Evidence:
    last = run.scored(parent.name, "dev")[-1]
    return proposer.Evidence(
        invalid=invalid_rate(last),
        skew=last.skew,
        score=last.score.value,
        n=last.score.n,
        maximize=run.task is None or run.task.maximize,
        gains=_gains_by_edit(run),
    )


def _gains_by_edit(run: Run) -> dict[str, float]:
    """What each edit last gained on dev over its version's parent, alone or in company; above zero for the better.

    Where the parent had other weights, which were refused, the gain is not the edits' alone.
    """
    gains: dict[str, float] = {}
    for version in run.versions.values():
        if version.parent is None or run.versions[version.parent].weights != version.weights:
            continue
        if against := compare_on(run, "dev", version.parent, version.name):
            gains.update(dict.fromkeys(version.edits, against.gain))
    return gains
