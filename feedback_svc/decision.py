"""An LLM's choice of a lever: what it has to say, and what of that is allowed. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Annotated

import msgspec

from sia_events.agents.structured import Unusable, json_object
from sia_events.shared import providers
from sia_events.shared.events import Lever, RunSettings

RULES = "You choose what an agent's next generation changes. Reply with the JSON object asked for and nothing else."


class _Said(msgspec.Struct):
    lever: str
    reasons: Annotated[list[str], msgspec.Meta(min_length=1, max_length=12)]
    algorithm: str | None = None
    references: list[int | str] = []
    expected_gain: float | None = None


@dataclass(frozen=True)
class Decision:
    """A choice that holds; `references` are ids of records, `expected_gain` is in units of the task's metric."""

    lever: Lever
    algorithm: str | None
    reasons: tuple[str, ...]
    references: tuple[str, ...]
    expected_gain: float | None


def trainable(settings: RunSettings) -> bool:
    """Whether the target model's weights are ours to change."""
    return providers.trainable(settings.target_model)


def read_decision(text: str, algorithms: Collection[str], by_rule: str, shown: Mapping[int, str]) -> Decision:
    """The decision in a reply; `shown` are the ids of the records its author has seen, by position.

    Weights without an algorithm are learned with the one `by_rule`. Raises Unusable.
    """
    found = json_object(text)
    if found is None:
        raise Unusable("it holds no JSON object that can be read")
    try:
        said = msgspec.convert(found, _Said)
    except msgspec.ValidationError as error:
        raise Unusable(f"the JSON object is not of the form asked for: {error}") from error
    wrong: list[str] = []
    if said.lever not in ("harness", "weights"):
        wrong.append(f'lever is "harness" or "weights", not {said.lever[:100]!a}')
    if said.lever == "weights" and said.algorithm is not None and said.algorithm not in algorithms:
        wrong.append(f"algorithm {said.algorithm[:100]!a} is not there; there are: {', '.join(algorithms)}")
    if said.expected_gain is not None and not isfinite(said.expected_gain):
        wrong.append("expected_gain is a number, or null")
    if not all(reason.strip() for reason in said.reasons):
        wrong.append("a reason is empty")
    by_name = {str(position): id for position, id in shown.items()} | {id: id for id in shown.values()}
    if strange := [name for name in map(str, said.references) if name not in by_name]:
        wrong.append(f"references name records that you were not shown: {', '.join(strange)[:300]}")
    if wrong:
        raise Unusable(*wrong)
    lever: Lever = "weights" if said.lever == "weights" else "harness"
    return Decision(
        lever=lever,
        algorithm=(said.algorithm or by_rule) if lever == "weights" else None,
        reasons=tuple(reason.strip().encode(errors="replace").decode() for reason in said.reasons),
        references=tuple(dict.fromkeys(by_name[str(name)] for name in said.references)),
        expected_gain=said.expected_gain,
    )
