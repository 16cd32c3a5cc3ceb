"""Writes the first versions: an LLM agent's, or the task's reference agent as it stands."""

from collections.abc import Sequence

from sia_events.agents.candidates import Candidates, write_candidates
from sia_events.agents.prompt import meta_prompt
from sia_events.agents.public_data import summarise
from sia_events.shared.events import AgentProposed, Event, RunStarted, TaskRegistered, Weights
from sia_events.shared.ports import Brief
from sia_events.shared.registration import decode_task
from sia_events.shared.service import Work
from sia_events.shared.task import find_task, known_tasks
from sia_events.shared.tree import load_tree


async def propose(work: Work, started: RunStarted) -> Sequence[Event]:
    """The first versions of an agent.

    The built-in meta-agent proposes the agent a newcomer would write, so that every gain is counted from there. An
    LLM agent writes several from it; where none of them can be used the reference agent goes in their place.
    """
    task = work.run.task
    assert isinstance(task, TaskRegistered), "a run starts behind its task"
    settings = started.settings
    weights = Weights(model=settings.target_model)
    if settings.backend == "builtin":
        return [_reference(task, weights, "the task's reference agent")]
    written = await _write(work, task, started)
    if not written.usable:
        why = f"no LLM version could be used: {'; '.join(written.left_out)}; the reference agent goes in its place"
        return [_reference(task, weights, why)]
    left_out = f" (left out: {'; '.join(written.left_out)})" if written.left_out else ""
    return [
        AgentProposed(
            version=candidate.version,
            candidate=candidate.place,
            harness=candidate.harness,
            weights=weights,
            reason=candidate.reason + (left_out if candidate is written.usable[0] else ""),
            written=candidate.written,
        )
        for candidate in written.usable
    ]


def _reference(task: TaskRegistered, weights: Weights, reason: str) -> AgentProposed:
    return AgentProposed(version="g0a", candidate=0, harness=task.reference, weights=weights, reason=reason)


async def _write(work: Work, told: TaskRegistered, started: RunStarted) -> Candidates:
    """First versions by the run's backend, each from a scratch copy of the reference agent."""
    settings, blobs = started.settings, work.ports.blobs
    assert settings.meta_model is not None, "a run with an LLM backend is opened with a model for it"
    task = decode_task(await blobs.get(told.spec))
    reference = await load_tree(blobs, told.reference)
    data = await load_tree(blobs, told.datasets.get("train") or next(iter(told.datasets.values())))
    others = [find_task(name).description for name in known_tasks() if name != told.task]
    words = meta_prompt(task, settings.target_model, summarise(data), reference, others, settings.prompt_tokens)
    brief = Brief(
        run=work.run.name,
        role="meta",
        key="meta",
        model=settings.meta_model,
        prompt=words.text,
        files=reference,
        data=data,
        turns=settings.turns,
        seed=settings.seed,
    )
    known = {told.reference: "the reference agent"}
    return await write_candidates([(brief, settings.candidates)], 0, settings.backend, known, work)
