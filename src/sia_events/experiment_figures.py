"""What the runs of an experiment came to, and intervals over seeds and items. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import sqrt
from statistics import fmean

from scipy import special

from sia_events.cost import Calls, total
from sia_events.shared.events import AttemptRequested, RunBranched, RunStarted, VersionAccepted, WeightsUpdated
from sia_events.shared.record import Record
from sia_events.shared.run import Run, fold

METHOD = """\
The interval is 95 %. Seeds and test items both count as drawn: with the scores of all runs of a policy as a table of
seeds by items, the variance of its mean is (MS_seeds + MS_items − MS_rest) / (seeds · items), components below zero
left out (two-way analysis of variance with random effects, Cornfield and Tukey 1956), and Student's t has
Satterthwaite's degrees of freedom. A difference is of runs with the same seed on the same items. Intervals are not
corrected for how many comparisons there are."""


@dataclass(frozen=True)
class Outcome:
    """What one run came to. `first` and `final` are sealed test scores item by item, empty without a sealed test.

    `curve` has the gate score of the incumbent behind each generation, the first agent's first; `levers` what each
    generation pulled: "harness", or the algorithm that learned; `accepted` how often each of the two was. `calls`,
    `tokens`, `usd` and `seconds` are what it took to its sealed test, which is the same for all and stands apart.
    `spent` is the limit that ended it, such as "1000 calls"; empty where it ended before one did.
    """

    run: str
    policy: str
    seed: int
    tested: bool
    reason: str
    maximize: bool
    first: tuple[float, ...]
    final: tuple[float, ...]
    curve: tuple[float, ...]
    levers: tuple[str, ...]
    accepted: Mapping[str, int]
    calls: int
    tokens: int
    usd: float | None
    seconds: float
    learning_seconds: float
    code: str
    spent: str = ""


@dataclass(frozen=True)
class Interval:
    """A mean over `seeds` runs with its 95 % interval."""

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def outcome(records: Sequence[Record], calls: Sequence[Calls] = (), tested: Sequence[Record] = ()) -> Outcome:
    """The outcome of a run by its records and the calls it made; one that is not over has what it came to so far.

    `tested` are the records of the branch on which it was tested where it had run out of budget.
    """
    run, end = fold(records), fold(tested or records)
    sealed = end.finished.sealed if end.finished else None
    versions = (end.first, end.incumbent) if sealed else ()
    first, final = (end.scored(v, "test")[-1].items for v in versions if v) if sealed else ((), ())
    verdicts = [v for v in run.verdicts.values() if isinstance(v, VersionAccepted)]
    behind = {run.versions[v.version].generation: run.scored(v.version, "gate")[-1].score.value for v in verdicts}
    curve: list[float] = []
    for generation in range(run.generation + 1 if behind else 0):
        curve.append(behind[generation] if generation in behind else curve[-1])
    search = list(takewhile(lambda record: not _tests(record), records))
    took = total(each for each in calls if not (each.role == "target" and each.key.endswith(".test")))
    opened = [r.event.code for r in records if isinstance(r.event, RunStarted | RunBranched)]
    return Outcome(
        run=run.name,
        policy=run.settings.lever,
        seed=run.settings.seed,
        tested=sealed is not None,
        reason=end.finished.reason if end.finished else _standing(run),
        maximize=run.task is None or run.task.maximize,
        first=first,
        final=final,
        curve=tuple(curve),
        levers=tuple(given.algorithm or given.lever for given in run.feedback),
        accepted=dict(Counter(run.versions[v.version].lever or "first" for v in verdicts)),
        calls=took.calls,
        tokens=took.prompt_tokens + took.completion_tokens,
        usd=took.usd,
        seconds=round((search[-1].time - search[0].time).total_seconds(), 3),
        learning_seconds=round(sum(r.event.seconds for r in records if isinstance(r.event, WeightsUpdated)), 3),
        code=opened[-1] if opened else "",
        spent=_limit(run),
    )


def _tests(record: Record) -> bool:
    return isinstance(record.event, AttemptRequested) and record.event.split == "test"


def _standing(run: Run) -> str:
    """How a run stands that is not over."""
    return f"{run.status}: its budget of {_limit(run)} is used up" if run.exhausted else run.paused or run.status


def _limit(run: Run) -> str:
    return f"{run.exhausted.allowed:g} {run.exhausted.limit}" if run.exhausted else ""


def crossed(table: Sequence[Sequence[float]]) -> Interval:
    """The mean of a table of seeds by items, with the interval that METHOD describes.

    With one seed, or one item, the interval says nothing of what another would have brought. Raises ValueError for a
    table that is empty or whose rows are not of one length.
    """
    seeds, items = len(table), len(table[0]) if table else 0
    if not items or any(len(row) != items for row in table):
        raise ValueError(f"scores of the same items are needed for every seed, not {[len(row) for row in table]}")
    rows, columns = [fmean(row) for row in table], [fmean(column) for column in zip(*table, strict=True)]
    mean = fmean(rows)
    rest = [
        value - row - column + mean
        for row, each in zip(rows, table, strict=True)
        for column, value in zip(columns, each, strict=True)
    ]
    freedom = (seeds - 1, items - 1, (seeds - 1) * (items - 1))
    sums = (
        items * sum((row - mean) ** 2 for row in rows),
        seeds * sum((column - mean) ** 2 for column in columns),
        sum(value**2 for value in rest),
    )
    of_seeds, of_items, of_rest = (total / n if n else 0.0 for total, n in zip(sums, freedom, strict=True))
    kept = max(
        ((of_seeds, of_items, of_rest), (of_seeds, 0, 0), (0, of_items, 0)), key=lambda ms: ms[0] + ms[1] - ms[2]
    )
    spread = kept[0] + kept[1] - kept[2]
    if spread <= 0:
        return Interval(mean, mean, mean, seeds)
    degrees = spread**2 / sum(ms**2 / n for ms, n in zip(kept, freedom, strict=True) if n)
    reach = float(special.stdtrit(degrees, 0.975)) * sqrt(spread / (seeds * items))
    return Interval(mean, mean - reach, mean + reach, seeds)


def score(outcomes: Sequence[Outcome], policy: str) -> Interval | None:
    """A policy's sealed test score over its seeds; None where none of its runs has one."""
    table = [each.final for each in outcomes if each.policy == policy and each.tested]
    return crossed(table) if table else None


def difference(outcomes: Sequence[Outcome], one: str, other: str) -> Interval | None:
    """What policy `one` has over `other`, above zero for the better; over the seeds that both finished."""
    runs = {(each.policy, each.seed): each for each in outcomes if each.tested}
    seeds = sorted(seed for policy, seed in runs if policy == one and (other, seed) in runs)
    table = [_over(runs[one, seed], runs[other, seed]) for seed in seeds]
    return crossed(table) if table else None


def _over(one: Outcome, other: Outcome) -> list[float]:
    sign = 1 if one.maximize else -1
    return [sign * (a - b) for a, b in zip(one.final, other.final, strict=True)]
