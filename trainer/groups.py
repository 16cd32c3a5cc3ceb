"""Rollouts as the learner sees them: read from JSON lines and grouped, with equal states of a group seen as one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

import msgspec

from sia_events.trainer.rollouts import Sample, Step


class RolloutsRefused(ValueError):
    """The rollout file cannot be learned from; the message names the line."""


@dataclass(frozen=True)
class Scene:
    """A state in which the model was asked: prompt, and the distribution that an answer was drawn from.

    `choice` tells whether `continuations` were offered, with `bias`, or are what was written, each once.
    """

    choice: bool
    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    bias: tuple[float, ...] | None
    temperature: float

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.continuations))

    def only(self, answers: Sequence[int]) -> "Scene":
        """With some of its continuations, in that order."""
        return replace(self, continuations=tuple(self.continuations[answer] for answer in answers))


@dataclass(frozen=True)
class Act:
    """One call of a sample: which continuation of which scene of its group came of it.

    `logprobs` are the behaviour policy's: of every choice for a choice, of every token for a completion.
    """

    scene: int
    answer: int
    logprobs: tuple[float, ...] | None


@dataclass(frozen=True)
class Rollout:
    """A whole attempt: its calls in the order they were made, and the reward that they share."""

    reward: float
    acts: tuple[Act, ...]


@dataclass(frozen=True)
class RolloutGroup:
    """All samples of one item by one policy; `scenes` in the order in which they were first met."""

    name: str
    scenes: tuple[Scene, ...]
    samples: tuple[Rollout, ...]

    def met(self) -> dict[int, list[int]]:
        """The scenes that the samples came to, each with the answers to be known: all of a choice, of text theirs."""
        written: dict[int, set[int]] = {}
        for sample in self.samples:
            for act in sample.acts:
                written.setdefault(act.scene, set()).add(act.answer)
        return {
            number: list(range(len(scene.continuations))) if scene.choice else sorted(written[number])
            for number, scene in enumerate(self.scenes)
            if number in written
        }

    def said(self, act: Act) -> tuple[int, ...]:
        """The tokens of the act's answer."""
        return self.scenes[act.scene].continuations[act.answer]

    def actions(self, act: Act) -> int:
        """How many decisions it was: a choice is one, a completion one a token."""
        return 1 if self.scenes[act.scene].choice else len(self.said(act))

    def behaviour(self, act: Act) -> tuple[float, ...] | None:
        """The behaviour policy's log-probs of the act's actions; None where they are not known."""
        if act.logprobs is None:
            return None
        return act.logprobs[act.answer : act.answer + 1] if self.scenes[act.scene].choice else act.logprobs


def read(path: Path, needs_logprobs: bool = True) -> tuple[list[RolloutGroup], Counter[str]]:
    """The groups of two samples or more, in order of first appearance, and how many had only a `single_sample`.

    A line is a `rollouts.Sample` as JSON. Raises RolloutsRefused at the first line that is none or cannot be learned
    from.
    """
    siblings: dict[str, list[Sample]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            sample = msgspec.json.decode(line, type=Sample)
            _check(sample, needs_logprobs)
        except ValueError as error:
            raise RolloutsRefused(f"{path}, line {number}: {error}. Nothing was trained.") from error
        siblings.setdefault(sample.group, []).append(sample)
    groups = [_group(name, samples) for name, samples in siblings.items() if len(samples) > 1]
    return groups, Counter(single_sample=len(siblings) - len(groups))


def _group(name: str, samples: Sequence[Sample]) -> RolloutGroup:
    """Two calls are of one scene when nothing that the answer was drawn from differs."""
    numbers: dict[tuple[object, ...], int] = {}
    written: list[dict[tuple[int, ...], int]] = []
    first: list[Step] = []
    rollouts = []
    for sample in samples:
        acts = []
        for step in sample.steps:
            state = (step.kind, step.prompt_ids, step.choice_ids, step.bias, step.temperature)
            at = numbers.setdefault(state, len(numbers))
            if at == len(first):
                first.append(step)
                written.append({})
            answer = step.index
            if step.kind == "completion":
                answer = written[at].setdefault(step.completion_ids, len(written[at]))
            acts.append(Act(at, answer, step.logprobs))
        rollouts.append(Rollout(sample.reward, tuple(acts)))
    scenes = tuple(
        Scene(step.kind == "choice", step.prompt_ids, step.choice_ids or tuple(texts), step.bias, step.temperature)
        for step, texts in zip(first, written, strict=True)
    )
    return RolloutGroup(name, scenes, tuple(rollouts))


def _check(sample: Sample, needs_logprobs: bool) -> None:
    if not isfinite(sample.reward):
        raise ValueError(f"the reward {sample.reward} is not a finite number")
    if not sample.steps:
        raise ValueError("it has no steps")
    for step in sample.steps:
        choice, offered = step.kind == "choice", len(step.choice_ids)
        if not step.temperature > 0:
            raise ValueError("temperature must be above 0: an arg-max is no sample")
        if not step.prompt_ids:
            raise ValueError("prompt_ids is empty")
        if choice and not (0 <= step.index < offered and all(step.choice_ids)):
            raise ValueError("index and choice_ids do not fit together")
        if choice and step.bias is not None and len(step.bias) != offered:
            raise ValueError("bias needs one number a choice")
        if not choice and not step.completion_ids:
            raise ValueError("completion_ids is empty")
        if step.logprobs is None and needs_logprobs:
            raise ValueError("log-probs are missing, and the algorithm needs them")
        if step.logprobs is not None and len(step.logprobs) != (offered if choice else len(step.completion_ids)):
            raise ValueError("logprobs needs one number a choice, or one a token")
