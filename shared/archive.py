"""The archive of a run's solutions, and which of them the next candidates or rollouts start from: PUCT. Pure.

State reuse as in TTT-Discover (arXiv 2601.16175, section 3.2 and appendix A.2). A state is a version with a score on
dev or, for rollouts, a whole attempt with a score on the same; R is the score, turned so that more is better. A
version's parent is the one it was made from, an attempt's the state that it started from, else its version. A state is
told by the attempt's name or else the version's. Of the N states that are kept

    puct(s) = Q(s) + c · scale · P(s) · √(1 + T) / (1 + n(s)),  c = 1

Q(s) is the best R among the scored children of s, kept or not, else R(s): what can be reached from a state counts, not
the mean of it. P(s) = (N − rank(s)) / Σ (N − rank), rank 0 for the highest R; equal ones rank in the order they were
proposed in. scale is the largest R less the smallest. T counts expansions, n(s) those of s and of its descendants. An
expansion is one generation's start from one state, however many candidates or rollouts start there and whatever
becomes of them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import sqrt

from sia_events.shared.events import Start
from sia_events.shared.run import Run

EXPLORATION = 1.0
CHILDREN_KEPT = 2
CAPACITY = 1000
DIGITS = 9


def starts(run: Run, wanted: int, most: int, rollouts: bool = False) -> tuple[Start, ...]:
    """Where `wanted` candidates start: up to `most` states, the highest PUCT first, no two of one lineage.

    A state that is picked blocks its ancestors and its descendants, so that several starts are several ideas. The
    candidates are dealt round the starts, however few these are. Empty where nothing is scored. Only versions have a
    harness to start from; `rollouts` start from what other rollouts wrote as well.
    """
    picked: list[Start] = []
    for state in ranked(run, rollouts):
        if len(picked) == min(wanted, most):
            break
        if not any(related(run, state.state, other.state) for other in picked):
            picked.append(state)
    shares = [len(range(place, wanted, len(picked))) for place in range(len(picked))]
    return tuple(state.model_copy(update={"share": share}) for state, share in zip(picked, shares, strict=True))


def best(run: Run) -> tuple[Start, ...]:
    """The state with the highest R, rollouts' too, as the one start; none where nothing is scored."""
    found = max(ranked(run, rollouts=True), key=lambda state: state.reward, default=None)
    return (found,) if found else ()


def ranked(run: Run, rollouts: bool = False) -> list[Start]:
    """The archive with every state's terms, the highest PUCT first; of equal ones the better, then the older."""
    rewards = scored(run, rollouts)
    best_child = best_of_children(run, rewards)
    visits = visited(run)
    by_reward = sorted(kept(run, rewards), key=lambda name: -rewards[name])
    if not by_reward:
        return []
    n, total = len(by_reward), len(run.expanded)
    scale = rewards[by_reward[0]] - rewards[by_reward[-1]]
    states: list[Start] = []
    for rank, name in enumerate(by_reward):
        value = best_child.get(name, rewards[name])
        prior = (n - rank) / (n * (n + 1) / 2)
        bonus = EXPLORATION * scale * prior * sqrt(1 + total) / (1 + visits[name])
        states.append(
            Start(
                version=run.attempts[name].version if name in run.attempts else name,
                attempt=name if name in run.attempts else None,
                share=1,
                reward=rewards[name],
                value=value,
                prior=round(prior, DIGITS),
                visits=visits[name],
                expansions=total,
                scale=round(scale, DIGITS),
                puct=round(value + bonus, DIGITS),
            )
        )
    return sorted(states, key=lambda state: -state.puct)


def kept(run: Run, rewards: Mapping[str, float]) -> list[str]:
    """The states in the archive, in the order they came.

    First versions are always kept, and of each parent's children the best two; beyond 1,000 in all, the best of those.
    """
    children: dict[str, list[str]] = defaultdict(list)
    seeds: list[str] = []
    for name in rewards:
        parent = parent_of(run, name)
        (seeds if parent is None else children[parent]).append(name)
    grown = [name for each in children.values() for name in _best(each, rewards, CHILDREN_KEPT)]
    stay = {*seeds, *_best(grown, rewards, max(0, CAPACITY - len(seeds)))}
    return [name for name in rewards if name in stay]


def scored(run: Run, rollouts: bool = False) -> dict[str, float]:
    """R of every version with a score on dev, in the order they were proposed; then, if asked for, of rollouts."""
    sign = 1.0 if run.task is None or run.task.maximize else -1.0
    found = {score.version: sign * score.score.value for score in run.scores.values() if score.split == "dev"}
    drawn = {
        name: sign * run.scores[name].score.value
        for name, asked in run.attempts.items()
        if rollouts and asked.group is not None and name in run.scores
    }
    return {**{name: found[name] for name in run.versions if name in found}, **drawn}


def best_of_children(run: Run, rewards: Mapping[str, float]) -> dict[str, float]:
    """The best R among the children of each state that has scored ones."""
    best: dict[str, float] = {}
    for name, reward in rewards.items():
        parent = parent_of(run, name)
        if parent is not None:
            best[parent] = max(reward, best.get(parent, reward))
    return best


def visited(run: Run) -> Counter[str]:
    """n of every state: how often it, or a descendant, was started from."""
    return Counter(name for start in run.expanded for name in ancestry(run, start))


def parent_of(run: Run, state: str) -> str | None:
    """What a state came from: a version's parent, None for a first one; what a rollout started from."""
    if asked := run.attempts.get(state):
        return asked.starts[0].state if asked.starts else asked.version
    return run.versions[state].parent


def ancestry(run: Run, state: str) -> Iterator[str]:
    """The state, its parent, and so on to a first version."""
    name: str | None = state
    while name is not None:
        yield name
        name = parent_of(run, name)


def related(run: Run, one: str, other: str) -> bool:
    """Whether one of the two descends from the other, or is the other."""
    return one in ancestry(run, other) or other in ancestry(run, one)


def _best(names: Sequence[str], rewards: Mapping[str, float], most: int) -> list[str]:
    return sorted(names, key=lambda name: -rewards[name])[:most]
