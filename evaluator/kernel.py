"""Scores a kernel by what the bench measured of it: the speed-up of each repeat, or nothing at all."""

from collections.abc import Sequence

from sia_events.evaluator.estimate import by_spread
from sia_events.shared.events import Event, KernelMeasured, Scored
from sia_events.shared.registration import decode_task
from sia_events.shared.service import Work


async def score_kernel(work: Work, measured: KernelMeasured) -> Sequence[Event]:
    """The score of a task whose evaluator is the bench, an item a repeat; other tasks have an evaluator of their own.

    A kernel that is wrong, or in quarantine until a person has looked, is worth 0. Every repeat drew inputs of its own,
    so two versions' repeats may be paired in any order: in theirs the gate compares them one by one.
    """
    assert work.run.task is not None, "a kernel is measured behind its task"
    if decode_task(await work.ports.blobs.get(work.run.task.spec)).evaluator != "kernel":
        return []
    repeats = len(measured.rounds)
    fault = "wrong" if not measured.correct else "quarantined" if measured.flagged else None
    items = (0.0,) * repeats if fault else measured.rounds
    return [
        Scored(
            attempt=measured.attempt,
            version=measured.version,
            split=work.run.attempts[measured.attempt].split,
            score=by_spread(items),
            items=items,
            failures={fault: repeats} if fault else {},
            skew=0.0,
        )
    ]
