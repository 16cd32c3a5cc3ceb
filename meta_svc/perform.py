"""Writes the first versions: the built-in meta-agent takes the task's reference agent as it stands."""

from collections.abc import Sequence

from sia_events.shared.events import AgentProposed, Event, RunStarted, TaskRegistered, Weights
from sia_events.shared.service import Work


async def propose(work: Work, started: RunStarted) -> Sequence[Event]:
    """One first version: the agent a newcomer would write, so that every gain is counted from there."""
    task = work.run.task
    assert isinstance(task, TaskRegistered), "a run starts behind its task"
    return [
        AgentProposed(
            version="g0a",
            candidate=0,
            harness=task.reference,
            weights=Weights(model=started.settings.target_model),
            reason="the task's reference agent",
        )
    ]
