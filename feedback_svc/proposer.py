"""The built-in proposer: typed edits of a template spec, ranked by what the evidence says is wrong, without a model."""

import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from math import prod

from sia_events.feedback_svc.template import Spec, digest

# Ranking. The exponents and factors only order proposals; the gate, not this file, decides what is kept.
COST_AVERSION = 0.6
DEPENDENT_PAIR = 0.9  # one edit needs the other; still more can go wrong than with one
UNRELATED_PAIR = 0.5  # two edits that each work alone: their pair does not tell which of them helped
SAME_FAMILY_AGAIN = 0.3  # candidates tried side by side should differ in kind
PRIOR_ITEMS = 20  # symptoms seen on few items are believed less


@dataclass(frozen=True)
class Evidence:
    """What is known of the incumbent, from splits that the loop may tune on.

    `invalid` and `skew` are fractions of `n` answered items: answers that are no label, the share of the most common
    answer. `score` is their mean under the task's metric, of which more is better if `maximize`, else less. `gains` are
    the gains last seen by edit name, in the metric's unit, above zero for the better. `cost` is the model work of one
    attempt, in a unit of the caller's; expected costs are in that unit too.
    """

    invalid: float
    skew: float
    score: float
    n: int
    maximize: bool = True
    gains: Mapping[str, float] = field(default_factory=dict)
    cost: float = 1.0

    @property
    def headroom(self) -> float:
        """How far the score is from the best there could be: 1 for a fraction right, 0 for what is to be small.

        A score with no end on its better side, a speed-up of 3 say, is measured by its own size. At least 0.01.
        """
        bounded = self.maximize and 0 <= self.score <= 1
        return max(1 - self.score if bounded else abs(self.score), 0.01)


@dataclass(frozen=True)
class Proposal:
    """A spec to try: the edits that made it, why, and what is expected of it (gain and cost as in Evidence)."""

    spec: Spec
    edits: tuple[str, ...]
    reason: str
    expected_gain: float
    expected_cost: float


@dataclass(frozen=True)
class Edit:
    """One typed change. `apply` gives None where it changes nothing or does not fit.

    `gain` is the share of the errors it is expected to mend, from (invalid, excess skew), each 0 to 1; `cost` is the
    factor on the model work of an attempt.
    """

    name: str
    family: str
    apply: Callable[[Spec], Spec | None]
    gain: Callable[[float, float], float]
    cost: float
    reason: str


def score_labels(spec: Spec) -> Spec | None:
    # The labels are scored as continuations of an opened answer; after a bare chat turn the model wants to write prose.
    if spec.answer == "choose":
        return None
    return replace(spec, answer="choose", prefill=spec.prefill or spec.opening, retries=0, votes=1, temperature=0.0)


def remove_bias(spec: Spec) -> Spec | None:
    return replace(spec, calibrate=64) if spec.answer == "choose" and not spec.calibrate else None


def calibrate_longer(spec: Spec) -> Spec | None:
    return replace(spec, calibrate=256) if 0 < spec.calibrate < 256 else None


def few_shot(spec: Spec) -> Spec | None:
    return replace(spec, examples=min(len(spec.label_words), 16)) if not spec.examples else None


def more_examples(spec: Spec) -> Spec | None:
    return replace(spec, examples=2 * spec.examples) if 0 < spec.examples <= 16 else None


def nearest_examples(spec: Spec) -> Spec | None:
    return replace(spec, examples=4, example_choice="nearest") if spec.example_choice == "fixed" else None


def open_answer(spec: Spec) -> Spec | None:
    return replace(spec, prefill=spec.opening) if not spec.prefill else None


def ask_for_one_word(spec: Spec) -> Spec | None:
    added = " Answer with one word."
    return replace(spec, instruction=spec.instruction + added) if added not in spec.instruction else None


def plain_words(spec: Spec) -> Spec | None:
    """Shows the model the task's plainer words in place of labels, in the instruction too."""
    words = {label: spec.plain_words.get(label, word) for label, word in spec.label_words.items()}
    if words == spec.label_words:
        return None
    instruction = spec.instruction
    for label, word in spec.plain_words.items():
        instruction = re.sub(rf"\b{re.escape(spec.label_words[label])}\b", lambda _, word=word: word, instruction)
    return replace(spec, label_words=words, instruction=instruction)


def capitalise_labels(spec: Spec) -> Spec | None:
    words = {label: word[:1].upper() + word[1:] for label, word in spec.label_words.items()}
    return replace(spec, label_words=words) if words != spec.label_words else None


def read_first_word(spec: Spec) -> Spec | None:
    return replace(spec, extraction="first_word") if _reads(spec) and spec.extraction != "first_word" else None


def read_last_label(spec: Spec) -> Spec | None:
    return replace(spec, extraction="last") if _reads(spec) and spec.extraction != "last" else None


def write_longer(spec: Spec) -> Spec | None:
    return replace(spec, max_tokens=4 * spec.max_tokens) if _reads(spec) and spec.max_tokens < 32 else None


def ask_again(spec: Spec) -> Spec | None:
    return replace(spec, retries=2) if _reads(spec) and not spec.retries else None


def vote(spec: Spec) -> Spec | None:
    return replace(spec, votes=5, temperature=0.7) if _reads(spec) and spec.votes == 1 else None


def _reads(spec: Spec) -> bool:
    return spec.answer == "generate"


# fmt: off
EDITS = (
    Edit("score_labels", "scoring", score_labels, lambda invalid, skew: 0.1 + 0.4 * invalid, 0.6,
         "answers that are no label cannot occur when labels are scored"),
    Edit("remove_bias", "scoring", remove_bias, lambda invalid, skew: 0.1 + 0.5 * skew, 1.2,
         "one label is answered far more often than it occurs"),
    Edit("calibrate_longer", "scoring", calibrate_longer, lambda invalid, skew: 0.02 + 0.1 * skew, 2.0,
         "the bias is estimated on few items"),
    Edit("few_shot", "examples", few_shot, lambda invalid, skew: 0.15 + 0.2 * invalid, 3.0,
         "solved examples show the form and the meaning of the labels"),
    Edit("more_examples", "examples", more_examples, lambda invalid, skew: 0.05, 2.0,
         "more solved examples, where some are there"),
    Edit("nearest_examples", "examples", nearest_examples, lambda invalid, skew: 0.15, 7.0,
         "examples like the item at hand; every prompt is its own, so it is slow"),
    Edit("open_answer", "wording", open_answer, lambda invalid, skew: 0.05 + 0.3 * invalid, 1.0,
         "an opened answer leaves no room for prose"),
    Edit("ask_for_one_word", "wording", ask_for_one_word, lambda invalid, skew: 0.04 + 0.2 * invalid, 1.0,
         "replies that are prose hide the label"),
    Edit("plain_words", "words", plain_words, lambda invalid, skew: 0.06, 1.0,
         "words that people use for these things"),
    Edit("capitalise_labels", "words", capitalise_labels, lambda invalid, skew: 0.03, 1.0,
         "a capital opens an answer more often than a small letter"),
    Edit("read_first_word", "reading", read_first_word, lambda invalid, skew: 0.02 + 0.1 * skew, 1.0,
         "a label named in passing is taken for the answer"),
    Edit("read_last_label", "reading", read_last_label, lambda invalid, skew: 0.02 + 0.1 * skew, 1.0,
         "the first label named may be the question's, repeated"),
    Edit("write_longer", "reading", write_longer, lambda invalid, skew: 0.01 + 0.1 * invalid, 3.0,
         "replies end before they come to a label"),
    Edit("ask_again", "sampling", ask_again, lambda invalid, skew: 0.01 + 0.25 * invalid, 1.5,
         "a reply without a label is asked for again"),
    Edit("vote", "sampling", vote, lambda invalid, skew: 0.03, 5.0,
         "single answers vary; their majority varies less"),
)
# fmt: on


def propose(spec: Spec, evidence: Evidence, tried: Collection[str], k: int, seed: int) -> list[Proposal]:
    """Up to `k` different specs to try next, the most promising first, none of whose digests is in `tried`.

    Fewer, or none, when the edits are used up. The same arguments give the same list.
    """
    ranked = list(_candidates(spec, evidence, set(tried) | {digest(spec)}, seed))
    chosen: list[Proposal] = []
    families: list[str] = []
    while ranked and len(chosen) < k:
        value, proposal, its_families = max(
            ranked, key=lambda each: each[0] * prod(SAME_FAMILY_AGAIN for f in each[2] if f in families)
        )
        ranked.remove((value, proposal, its_families))
        chosen.append(proposal)
        families += its_families
    return chosen


def _candidates(
    spec: Spec, evidence: Evidence, tried: set[str], seed: int
) -> Iterator[tuple[float, Proposal, frozenset[str]]]:
    """(worth, proposal, its edits' families) for every single edit and every pair that is not tried yet."""
    for used in [*((edit,) for edit in EDITS), *permutations(EDITS, 2)]:
        edited = _applied(spec, used)
        if edited is None or (mark := digest(edited)) in tried:
            continue
        tried.add(mark)
        gain = evidence.headroom * (1 - prod(1 - _expected(edit, spec, evidence) for edit in used))
        factor = prod(edit.cost for edit in used)
        proposal = Proposal(
            spec=edited,
            edits=tuple(edit.name for edit in used),
            reason="; ".join(edit.reason for edit in used),
            expected_gain=round(gain, 4),
            expected_cost=evidence.cost * factor,
        )
        tie_break = 1 + 0.01 * random.Random(f"{seed} {mark}").random()
        worth = gain / factor**COST_AVERSION * tie_break
        if len(used) == 2:
            worth *= UNRELATED_PAIR if all(edit.apply(spec) for edit in used) else DEPENDENT_PAIR
        yield worth, proposal, frozenset(edit.family for edit in used)


def _applied(spec: Spec, used: Sequence[Edit]) -> Spec | None:
    edited: Spec | None = spec
    for edit in used:
        edited = edit.apply(edited) if edited else None
    return edited


def _expected(edit: Edit, spec: Spec, evidence: Evidence) -> float:
    """The share of errors that `edit` is expected to mend: its rule, averaged with what it last gained, if tried."""
    trust = evidence.n / (evidence.n + PRIOR_ITEMS)
    even = 1 / len(spec.label_words)
    excess = max(0.0, evidence.skew - even) / (1 - even)
    rule = edit.gain(trust * evidence.invalid, trust * excess)
    if edit.name not in evidence.gains:
        return rule
    seen = min(1.0, evidence.gains[edit.name] / evidence.headroom)
    return max(0.0, (rule + seen) / 2)
