"""The tree of runs: which branched from which, where, and with what changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from sia_events.catching_up import settled
from sia_events.reading import cut_short, every_lineage, look, nobody_runs, resolve, unreadable
from sia_events.shared.events import FeedbackGiven, HarnessPatched, RunBranched, RunSteered
from sia_events.shared.ports import Log
from sia_events.shared.record import Record, opens_with
from sia_events.shared.run import fold
from sia_events.shared.settings import Settings
from sia_events.shared.summary import row


async def tree(settings: Settings, run: str | None) -> list[dict[str, Any]]:
    """Every run that is no branch, oldest first, or the one that `run` descends from; branches are within `branches`.

    A run has what `sia runs` has of it, and {at, branched_at_generation, changed, score, branches}: its fork, None for
    a root, what was said to be different, and its final version's sealed score, or else that on the gate. A run that
    cannot be read stands as a root of its own.
    """

    async def ask(log: Log) -> list[dict[str, Any]]:
        wanted = await resolve(log, run) if run else None
        return grown(await every_lineage(log, lambda history: history), wanted)

    running = await settled(settings)
    roots = await look(settings, ask)
    return [_cut_short(root) for root in roots] if nobody_runs(settings, running) else roots


def _cut_short(node: dict[str, Any]) -> dict[str, Any]:
    return {**cut_short(node), "branches": [_cut_short(branch) for branch in node["branches"]]}


def grown(histories: Mapping[str, Sequence[Record] | str], run: str | None) -> list[dict[str, Any]]:
    """The tree of these runs, or why one cannot be read; of the root that `run` descends from, where one is named."""
    nodes = {name: _leaf(name, each) if isinstance(each, str) else _node(each) for name, each in histories.items()}
    roots: list[dict[str, Any]] = []
    for node in nodes.values():
        (nodes[node["parent"]]["branches"] if node["parent"] else roots).append(node)
    if run is None:
        return roots
    root = nodes[run]
    while root["parent"]:
        root = nodes[root["parent"]]
    return [root]


def _leaf(run: str, why: str) -> dict[str, Any]:
    unknown = {"at": None, "branched_at_generation": None, "changed": {}, "score": None, "branches": []}
    return {**unreadable(run, why), **unknown}


def _node(history: Sequence[Record]) -> dict[str, Any]:
    name, state = history[-1].run, fold(history)
    own = [record for record in history if record.run == name]
    fork = own[0].event if isinstance(own[0].event, RunBranched) else None
    sealed = state.finished.sealed.final if state.finished and state.finished.sealed else None
    gate = state.scored(state.incumbent or "", "gate")
    score = sealed or (gate[-1].score if gate else None)
    return {
        **row(history),
        "at": fork and fork.at,
        "branched_at_generation": fork and fork.generation,
        "changed": _changed(fork, own) if fork else {},
        "score": score and score.model_dump(),
        "branches": [],
    }


def _changed(fork: RunBranched, own: Sequence[Record]) -> dict[str, Any]:
    """What a branch was opened with: its settings, what began its generation, the word that was said."""
    changed: dict[str, Any] = dict(fork.overrides)
    opened = [own[0]]
    for record in own[1:]:
        if not opens_with(opened, record):
            break
        opened.append(record)
        if isinstance(record.event, HarnessPatched):
            changed["candidate"] = record.event.reason
        if isinstance(record.event, FeedbackGiven):
            changed["feedback"] = f"{record.event.lever}: {'; '.join(record.event.reasons)}"
        if isinstance(record.event, RunSteered):
            changed["steer"] = record.event.text
    return changed
