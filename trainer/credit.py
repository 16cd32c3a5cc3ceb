"""Who is given the credit: the advantages of a group's samples, spread over the calls that each of them made. Pure."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sia_events.shared.events import Learning
from sia_events.trainer.algorithms import Algorithm
from sia_events.trainer.groups import RolloutGroup

Advantages = tuple[tuple[float, ...], ...]
"""Of each sample of a group, of each of its calls."""


def credit(
    group: RolloutGroup, rewards: Sequence[float], algorithm: Algorithm, learning: Learning
) -> tuple[Advantages, Mapping[str, float]] | None:
    """The advantage of every call, and the algorithm's own figures; None where the samples cannot be told apart.

    `terminal`: every call has its sample's advantage. `per-step`: calls made in the same scene are weighed against each
    other on what was rewarded from there on, reward · discount ** (calls left); a scene that one sample alone met, be
    it again and again, has nothing to be weighed against, and its calls keep the sample's advantage. These are the
    anchor states of GiGPO (Feng et al. 2025, arXiv 2505.10978), which adds the two; here the nearer comparison replaces
    the farther one.
    """
    weighed = algorithm.weigh(rewards, learning)
    if weighed.advantages is None:
        return None
    spread = [[advantage] * len(s.acts) for s, advantage in zip(group.samples, weighed.advantages, strict=True)]
    if learning.credit == "per-step":
        met: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, sample in enumerate(group.samples):
            for turn, act in enumerate(sample.acts):
                met[act.scene].append((number, turn))
        for places in met.values():
            if len({number for number, _ in places}) < 2:
                continue
            left = [len(group.samples[number].acts) - 1 - turn for number, turn in places]
            onward = [rewards[n] * learning.discount**calls for (n, _), calls in zip(places, left, strict=True)]
            advantages = algorithm.weigh(onward, learning).advantages or [0.0] * len(places)
            for (number, turn), advantage in zip(places, advantages, strict=True):
                spread[number][turn] = advantage
    return tuple(map(tuple, spread)), weighed.figures


def teaching(
    groups: Sequence[RolloutGroup], algorithm: Algorithm, learning: Learning
) -> tuple[list[RolloutGroup], int]:
    """The groups whose samples can be told apart by their rewards, and how many others there are."""
    if algorithm.objective == "likelihood":
        groups = [distinct(group) for group in groups]
    kept = [g for g in groups if algorithm.weigh([s.reward for s in g.samples], learning).advantages is not None]
    return kept, len(groups) - len(kept)


def distinct(group: RolloutGroup) -> RolloutGroup:
    """Samples that say the same word by word as one, the best rewarded of them: what is cloned is cloned once."""
    best: dict[object, int] = {}
    for number, sample in enumerate(group.samples):
        said = tuple((act.scene, act.answer) for act in sample.acts)
        if said not in best or sample.reward > group.samples[best[said]].reward:
            best[said] = number
    return replace(group, samples=tuple(group.samples[number] for number in sorted(best.values())))
