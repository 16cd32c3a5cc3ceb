"""Rollouts as the learner sees them: read from JSON lines, grouped by prompt, weighed by advantage."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class RolloutsRefused(ValueError):
    """The rollout file cannot be learned from; the message names the line."""


@dataclass(frozen=True)
class Sample:
    """One logged action: `answer` is its place among the group's continuations.

    `logprobs` are the behaviour policy's: of every choice for a choice call, of every token for a completion.
    """

    answer: int
    advantage: float
    reward: float
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Group:
    """All samples of one prompt. `choice` tells whether `continuations` were offered, with `bias`, or written."""

    name: str
    choice: bool
    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    bias: tuple[float, ...] | None
    temperature: float
    samples: tuple[Sample, ...]


def read(path: Path, advantages: Callable[[Sequence[float]], list[float] | None]) -> tuple[list[Group], int]:
    """The groups that teach something, in order of first appearance, and how many were dropped for equal rewards.

    A line is {"group", "item", "reward", "kind": "choice", "prompt_ids", "choice_ids", "bias" or null, "temperature",
    "index", "logprobs"} or {..., "kind": "completion", "prompt_ids", "completion_ids", "temperature", "logprobs"};
    other keys are ignored. Raises RolloutsRefused at the first line that is not.
    """
    siblings: dict[str, list[dict[str, Any]]] = {}
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            line = json.loads(text)
            _check(line)
            siblings.setdefault(_prompt_key(line), []).append(line)
        except (KeyError, TypeError, ValueError) as error:
            raise RolloutsRefused(f"{path}, line {number}: {error!r}. Nothing was trained.") from error
    groups = []
    for lines in siblings.values():
        weights = advantages([line["reward"] for line in lines])
        if weights is not None:
            groups.append(_group(lines, weights))
    return groups, len(siblings) - len(groups)


def _prompt_key(line: dict[str, Any]) -> str:
    """Only samples of one distribution are compared: an item that was asked in two ways makes two groups."""
    keys = ("group", "kind", "prompt_ids", "choice_ids", "bias", "temperature")
    return json.dumps([line.get(key) for key in keys])


def _group(lines: Sequence[dict[str, Any]], advantages: Sequence[float]) -> Group:
    first = lines[0]
    choice = first["kind"] == "choice"
    if choice:
        continuations = [tuple(ids) for ids in first["choice_ids"]]
        answers = [line["index"] for line in lines]
    else:
        written = [tuple(line["completion_ids"]) for line in lines]
        continuations = list(dict.fromkeys(written))
        answers = [continuations.index(tokens) for tokens in written]
    samples = tuple(
        Sample(answer, advantage, line["reward"], tuple(line["logprobs"]))
        for answer, advantage, line in zip(answers, advantages, lines, strict=True)
    )
    bias = tuple(first["bias"]) if first.get("bias") else None
    return Group(
        first["group"], choice, tuple(first["prompt_ids"]), tuple(continuations), bias, first["temperature"], samples
    )


def _check(line: dict[str, Any]) -> None:
    if line["kind"] not in ("choice", "completion"):
        raise ValueError(f"kind {line['kind']!r} is neither 'choice' nor 'completion'")
    if not line["temperature"] > 0:
        raise ValueError("temperature must be above 0: an arg-max is no sample")
    if not line["prompt_ids"]:
        raise ValueError("prompt_ids is empty")
    if line["kind"] == "choice":
        offered = len(line["choice_ids"])
        fits = 0 <= line["index"] < offered and len(line["logprobs"]) == offered and all(line["choice_ids"])
        if not fits:
            raise ValueError("index, logprobs and choice_ids do not fit together")
        if line.get("bias") and len(line["bias"]) != offered:
            raise ValueError("bias needs one number a choice")
    elif not 0 < len(line["completion_ids"]) == len(line["logprobs"]):
        raise ValueError("completion_ids and logprobs must be equally long and not empty")
