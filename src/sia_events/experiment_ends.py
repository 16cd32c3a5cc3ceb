"""An experiment's run that is out of budget: what it has by then meets the sealed test, on a branch without limits."""

import sys
from collections.abc import Sequence

from sia_events import reading
from sia_events.driver import open_stores
from sia_events.following import follow
from sia_events.forks import closings
from sia_events.run_settings import merged
from sia_events.shared.code import code
from sia_events.shared.events import RunBranched
from sia_events.shared.record import Record, opening
from sia_events.shared.run import Run, fold
from sia_events.shared.settings import Settings


def is_out_of_budget(run: Run) -> bool:
    """Whether nothing but more budget would let the run go on."""
    return run.exhausted is not None and run.paused is None and run.status == "paused"


def branch_to_test(history: Sequence[Record]) -> tuple[str, RunBranched] | None:
    """Name and opening of the branch on which a run is tested that is out of budget; None where there is nothing to.

    Another generation, which more budget may bring, has a branch of its own.
    """
    run = fold(history)
    opened = to_the_test(history) if is_out_of_budget(run) else None
    return (f"{run.name}-tested{opened.generation}", opened) if opened else None


def to_the_test(history: Sequence[Record]) -> RunBranched | None:
    """What opens the branch: behind the last verdict that closed a generation the sealed test is all that is left.

    None where there is no such verdict: not even the first agent was accepted.
    """
    forks = list(closings(history))
    if not forks:
        return None
    last = forks[-1]
    limits = [limit for limit, most in last.state.settings.budget.model_dump().items() if most is not None]
    overrides = {"generations": last.state.generation, **{f"budget.{limit}": None for limit in limits}}
    return RunBranched(
        parent=last.state.name,
        at=last.at,
        generation=last.state.generation,
        overrides=overrides,
        settings=merged(last.state.settings, overrides),
        code=code(),
    )


async def end(settings: Settings, run: str, as_json: bool) -> None:
    """Have what the run has tested, where it is out of budget; a test that was cut short goes on."""
    found = branch_to_test(await reading.records(settings, run))
    if found is None:
        return
    branch, opened = found
    print(f"{run} ends with its budget: what it has is tested as {branch}", file=sys.stderr, flush=True)
    async with open_stores(settings, f"experiment {run}") as node:
        if branch not in await node.bus.runs():
            await node.bus.append(branch, opening(branch, [opened]))
        await follow(node, settings, branch, as_json)
