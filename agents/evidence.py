"""What may be said of a scored attempt, item by item, and which items say most. Pure; it knows no right answer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from sia_events.agents.fit import cut
from sia_events.shared.calls import ModelCall

Outcome = Literal["right", "wrong", "invalid", "unanswered", "above", "below"]
OUTPUT_CHARS = 200
PER_CLASS = 3
REGRESSIONS = 4


@dataclass(frozen=True)
class PublicFeedback:
    """All that an LLM agent learns about one dev item: a class of outcome, and what the target agent itself did.

    It has no field that a right answer, a grader's words or a score could travel in. `outcome` is "above" or "below"
    the attempt's own mean where items are not simply right or wrong.
    """

    item: str
    outcome: Outcome
    output: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Attempt:
    """A version's scored attempt on dev: `items` are public texts by id in the split's order, as `feedback` is.

    `record` is the position of its score, `trajectory` the blob of its calls, `scores` are the evaluator's per-item
    scores, more being better; they choose what is shown and are not shown.
    """

    version: str
    record: int
    trajectory: str
    items: Mapping[str, str]
    scores: tuple[float, ...]
    calls: tuple[ModelCall, ...]
    feedback: tuple[PublicFeedback, ...]


@dataclass(frozen=True)
class Chosen:
    """An item whose trajectory is worth reading, and why."""

    item: str
    reasons: tuple[str, ...]


def feedback_on(
    ids: Sequence[str],
    scores: Sequence[float],
    outputs: Mapping[str, str],
    calls: Iterable[ModelCall],
    labels: Sequence[str],
    maximize: bool = True,
) -> tuple[PublicFeedback, ...]:
    """Feedback on each item; the evaluator's `scores` stand in the order of `ids`, `outputs` are the agent's own.

    `labels` are the answers that a labelled task allows; with none, an item without an output is not held against the
    agent. Raises ValueError when ids and scores are not of one length.
    """
    tokens: dict[str, int] = dict.fromkeys(ids, 0)
    seconds: dict[str, float] = dict.fromkeys(ids, 0.0)
    for call in calls:
        if call.item is not None and call.item in tokens:
            tokens[call.item] += call.prompt_tokens + call.completion_tokens
            seconds[call.item] += call.seconds
    gains = [score if maximize else -score for score in scores]
    best = 1.0 if maximize else 0.0
    exact = all(score in (0.0, 1.0) for score in scores)
    mean = sum(gains) / len(gains) if gains else 0.0
    # Scores are reduced to two classes: a distance from the right answer, shown as a number, would give it away.
    met = [gain >= (best if exact else mean) for gain in gains]
    return tuple(
        PublicFeedback(
            item=item,
            outcome=_outcome(outputs.get(item), labels, exact, well),
            output=cut(outputs.get(item, ""), OUTPUT_CHARS),
            tokens=tokens[item],
            seconds=round(seconds[item], 3),
        )
        for item, well in zip(ids, met, strict=True)
    )


def choose(attempt: Attempt, before: Sequence[float] | None = None, parent: str = "") -> tuple[Chosen, ...]:
    """Items to read: what broke against the parent, failures of each class, the longest, the costliest, one success.

    `before` are the parent's scores on the same items. One of each kind comes before the second of any.
    """
    feedback = {one.item: one for one in attempt.feedback}
    groups: list[list[tuple[str, str]]] = []
    if before is not None:
        broken = [i for i, was, now in zip(feedback, before, attempt.scores, strict=True) if now < was]
        groups.append([(item, f"worse than under the parent, {parent}") for item in broken[:REGRESSIONS]])
    for outcome in ("unanswered", "invalid", "wrong", "below"):
        failures = [one for one in attempt.feedback if one.outcome == outcome]
        groups.append([(one.item, f"a failure: {outcome}") for one in _unlike(failures)[:PER_CLASS]])
    if any(one.tokens for one in attempt.feedback):
        groups.append([(max(feedback, key=lambda item: feedback[item].tokens), "the most tokens")])
        groups.append([_costliest(attempt)])
    groups.append([(one.item, "a success") for one in attempt.feedback if one.outcome in ("right", "above")][:1])
    reasons: dict[str, list[str]] = {}
    for one_of_each in zip_longest(*groups):
        for item, reason in filter(None, one_of_each):
            reasons.setdefault(item, []).append(reason)
    return tuple(Chosen(item, tuple(why)) for item, why in reasons.items())


def _outcome(output: str | None, labels: Sequence[str], exact: bool, well: bool) -> Outcome:
    if labels and not output:
        return "unanswered"
    if labels and output not in labels:
        return "invalid"
    if exact:
        return "right" if well else "wrong"
    return "above" if well else "below"


def _unlike(failures: Sequence[PublicFeedback]) -> list[PublicFeedback]:
    """The failures, each output's first one before any output's second."""
    seen: dict[str, int] = {}
    ranked: list[tuple[int, PublicFeedback]] = []
    for one in failures:
        seen[one.output] = seen.get(one.output, 0) + 1
        ranked.append((seen[one.output], one))
    return [one for _, one in sorted(ranked, key=lambda pair: pair[0])]


def _costliest(attempt: Attempt) -> tuple[str, str]:
    """By money where money was paid, by time where the model was free or nobody knows its price."""
    usd: dict[str, float] = {}
    for call in attempt.calls:
        if call.item is not None and call.item in attempt.items:
            usd[call.item] = usd.get(call.item, 0.0) + (call.usd or 0.0)
    if any(usd.values()):
        return max(usd, key=lambda item: usd[item]), "the most money"
    return max(attempt.feedback, key=lambda one: one.seconds).item, "the most time"
