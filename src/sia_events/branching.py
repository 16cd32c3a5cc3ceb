"""Branches: what is different from a fork on, and the runs that go on so. Nothing is copied."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sia_events import app
from sia_events.agents.check import problems
from sia_events.driver import NAME, free_name, open_stores
from sia_events.errors import Unusable
from sia_events.feedback_svc.lever import gather
from sia_events.following import follow
from sia_events.forks import Fork, at_generation, at_position
from sia_events.reading import Gap, records
from sia_events.roles import is_local, require_askable
from sia_events.run_settings import merged
from sia_events.shared.code import code
from sia_events.shared.events import (
    SEEDS_APART,
    Algorithm,
    Event,
    FeedbackGiven,
    HarnessPatched,
    Lever,
    RunBranched,
    RunSettings,
    RunSteered,
    Value,
    Weights,
)
from sia_events.shared.failpoints import reach
from sia_events.shared.record import IMPORTED, Record, opening
from sia_events.shared.registration import REQUIREMENTS
from sia_events.shared.settings import Settings
from sia_events.shared.tree import TreeRefused, read_tree, store_tree
from sia_events.starting import lay_down, require_backend, require_learnable


class Feedback(Value):
    """What a person decides in the place of the feedback-agent; an algorithm goes with the weights alone."""

    lever: Lever
    algorithm: Algorithm | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Change:
    """What is different in a branch: settings by name, and a word to every feedback.

    The next generation begins with what a person gives for it: a candidate's harness, or the feedback.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    harness: Path | None = None
    feedback: Feedback | None = None
    steer: str | None = None


@dataclass(frozen=True)
class Branch:
    """One branch about to be opened: its name, its settings, and what of them is not its parent's."""

    name: str
    parent: str
    settings: RunSettings
    change: Change


async def branch(
    settings: Settings,
    parent: str,
    generation: int | None,
    position: int | None,
    change: Change,
    name: str | None = None,
    repeats: int = 1,
    control: bool = False,
    go: bool = True,
    as_json: bool = False,
) -> int:
    """Open branches of `parent`, behind a generation's verdict or any position, and go on with one after the other.

    `repeats` of them differ by their seeds; a `control` comes first and changes nothing. Returns the last exit status
    that is not 0. Raises Unusable before anything is written.
    """
    try:
        history = await records(settings, parent)
    except Gap as gap:
        if not gap.whole:
            raise
        history = gap.whole
        print(f"sia: {gap}", file=sys.stderr)
    parent = history[-1].run
    if history[0].producer == IMPORTED:
        raise Unusable(f"run {parent} was imported: SIA keeps no data to go on with; start one with its agent: sia run")
    fork = at_generation(history, generation) if generation is not None else at_position(history, position or 0)
    files = _harness(change.harness)
    _require_room(fork, change)
    changes = planned(fork.state.settings, change, repeats, control)
    _require_different(fork, change)
    asked = [_lengthened(merged(fork.state.settings, each.overrides), fork) for each in changes]
    require_items(fork, asked, change)
    for each in asked:
        # Feedback of a person's own pulls the weights whatever the policy is.
        by_hand = change.feedback is not None and change.feedback.lever == "weights"
        require_learnable(settings, each.model_copy(update={"lever": "weights"}) if by_hand else each)
        if not settings.nats_url:
            require_askable(settings, each)
            require_backend(each)
        await app.ready(settings, each.sandbox, is_local(settings, each))
    await lay_down(settings.home, files.get(REQUIREMENTS))
    status = 0
    async with open_stores(settings, f"branch {name or ''}".strip()) as node:
        known = await node.bus.runs()
        names = _names(name, known, len(changes), control)
        branches = [Branch(*each) for each in zip(names, [parent] * len(names), asked, changes, strict=True)]
        for each in branches:
            opened = await _opening(node, each, history[: fork.at], fork, files)
            reach("sia branch before opening")
            await node.bus.append(each.name, opening(each.name, opened))
            reach("sia branch after opening")
        for each in branches:
            if go:
                status = await follow(node, settings, each.name, as_json) or status
            else:
                told = {"run": each.name, "parent": parent, "at": fork.at}
                print(json.dumps(told) if as_json else f"{each.name}: sia run --resume {each.name} goes on", flush=True)
    return status


def read_feedback(file: Path) -> Feedback:
    """What a JSON file {lever, algorithm, reasons} says. Raises Unusable."""
    try:
        given = Feedback.model_validate_json(file.read_bytes())
    except OSError as error:
        raise Unusable(f"--replace-feedback {file}: {error.strerror or error}; nothing was written") from error
    except ValidationError as error:
        first = error.errors()[0]
        why = ": ".join(part for part in (".".join(map(str, first["loc"])), first["msg"]) if part)
        raise Unusable(f"--replace-feedback {file}: {why}; nothing was written") from error
    if (given.algorithm is None) != (given.lever == "harness"):
        raise Unusable(f"--replace-feedback {file}: an algorithm goes with the lever weights, and with no other")
    return given


def planned(settings: RunSettings, change: Change, repeats: int, control: bool) -> list[Change]:
    """What each branch changes: the control nothing, the others the same under one seed after another."""
    first = merged(settings, change.overrides).seed
    repeated = [
        replace(change, overrides={**change.overrides, "seed": first + SEEDS_APART * i}) for i in range(repeats)
    ]
    return [*([Change()] if control else []), *(repeated if repeats > 1 else [change])]


def _require_room(fork: Fork, change: Change) -> None:
    """Raises Unusable where another harness, model or feedback could not begin the next generation."""
    state = fork.state
    model = change.overrides.get("target_model", state.settings.target_model) != state.settings.target_model
    candidate = bool(change.harness or (model and state.versions))
    if (candidate or change.feedback) and not fork.closed:
        raise Unusable(
            f"another harness, model or feedback begins the next generation, and position {fork.at} of run "
            f"{state.name} is in the midst of generation {state.generation}: branch behind a verdict, --at GEN"
        )
    if candidate and change.feedback:
        raise Unusable("a generation begins with a candidate or with feedback: branch twice for both")


def _require_different(fork: Fork, change: Change) -> None:
    """Raises Unusable for a setting that would be recorded as different and could not be."""
    state, wanted = fork.state, change.overrides
    if fork.closed and int(wanted.get("generations", state.generation + 1)) <= state.generation:
        raise Unusable(
            f"generation {state.generation} is closed at position {fork.at}, and a branch goes on for one more at "
            f"least: --set generations={state.generation + 1} or more; nothing was written"
        )
    if state.versions and wanted.get("target_model") == state.settings.target_model:
        raise Unusable(f"{state.settings.target_model} is the model of run {state.name} already; nothing was written")


def require_items(fork: Fork, asked: Sequence[RunSettings], change: Change) -> None:
    """Raises Unusable where the weights could be changed, and the run's task has nothing to learn from."""
    task = fork.state.task
    levers = [*(each.lever for each in asked), *([change.feedback.lever] if change.feedback else [])]
    if task and "train" not in task.datasets and any(lever != "harness" for lever in levers):
        raise Unusable(
            f"task {task.task} was registered without a train split, so only the harness can change: leave the lever "
            "at harness; nothing was written"
        )


def _lengthened(settings: RunSettings, fork: Fork) -> RunSettings:
    """With one generation more where none would be left."""
    if fork.closed and fork.state.generation >= settings.generations:
        return merged(settings, {"generations": fork.state.generation + 1})
    return settings


def _harness(folder: Path | None) -> Mapping[str, bytes]:
    """The files of a harness of somebody's own. Raises Unusable."""
    if folder is None:
        return {}
    try:
        files = read_tree(folder)
    except TreeRefused as refused:
        raise Unusable(f"--replace-harness {folder}: {refused}; nothing was written") from refused
    if found := problems(files):
        raise Unusable(f"--replace-harness {folder}: {found[0]}; nothing was written")
    return files


async def _opening(
    node: app.Node, branch: Branch, history: Sequence[Record], fork: Fork, files: Mapping[str, bytes]
) -> Sequence[Event]:
    """What opens the branch: where it leaves its parent, what begins the next generation, the word that is said."""
    state, change = fork.state, branch.change
    opened: list[Event] = [
        RunBranched(
            parent=branch.parent,
            at=fork.at,
            generation=state.generation,
            overrides=dict(change.overrides),
            settings=branch.settings,
            code=code(),
        )
    ]
    model = branch.settings.target_model
    incumbent = state.versions[state.incumbent] if state.incumbent else None
    if incumbent and (change.harness or model != state.settings.target_model):
        entered = [f"the harness in {change.harness}"] if change.harness else []
        weights = incumbent.weights
        if model != state.settings.target_model:
            weights = Weights(model=model)
            entered.append(f"the model {model}")
        opened.append(
            HarnessPatched(
                version=f"g{state.generation + 1}a",
                generation=state.generation + 1,
                candidate=0,
                parent=incumbent.name,
                harness=await store_tree(node.blobs, files) if change.harness else incumbent.harness,
                weights=weights,
                edits=(),
                reason=f"entered by hand: {' and '.join(entered)}",
            )
        )
    if incumbent and change.feedback:
        begun = replace(state, generation=state.generation + 1, settings=branch.settings)
        opened.append(
            FeedbackGiven(
                generation=begun.generation,
                incumbent=incumbent.name,
                lever=change.feedback.lever,
                algorithm=change.feedback.algorithm,
                reasons=change.feedback.reasons or ("given by hand",),
                evidence=gather(begun, history),
            )
        )
    return [*opened, *([RunSteered(text=change.steer)] if change.steer else [])]


def _names(wanted: str | None, known: Sequence[str], count: int, control: bool) -> list[str]:
    """The branches' names: NAME alone, or NAME-control, NAME-1, NAME-2 …; the next free ones where none is wanted."""
    if wanted is None:
        names: list[str] = []
        while len(names) < count:
            names.append(free_name([*known, *names]))
        return names
    numbered = [f"{wanted}-{i}" for i in range(1, count + 1 - control)]
    names = [*([f"{wanted}-control"] if control else []), *([wanted] if len(numbered) == 1 else numbered)]
    for name in names:
        if not NAME.fullmatch(name):
            raise Unusable(f"a run's name is letters, digits, - and _, 64 at most, not {name!r}; nothing was written")
        if name in known:
            raise Unusable(f"run {name} exists already; nothing was written. Take another name: --run NAME")
    return names
