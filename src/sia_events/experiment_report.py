"""The report of an experiment with levers: what it shows in words, its tables and its data. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from statistics import fmean
from typing import Any

from sia_events.experiment_figures import METHOD, Interval, Outcome, difference, score

NO_BUDGET = "none"
EQUAL = """\
The policies share the task, the first agent, the model and its limits, the seeds, the most generations, with them each
look's share of the gate's error, and the items of the sealed test."""
UNLIMITED = """\
They do not share what a run spends: no budget was set, and a generation of the weights costs other than one of the
harness. `--set budget.tokens=N`, or minutes or calls, gives each run the same."""
LIMITED = """\
They share the budget too, a hard limit on each run: {budget}. A run that had used it up went to the sealed test with
the incumbent behind its last whole generation, {spent} of {runs} did; that test is beyond the budget."""
NOT_SPENT = " The others had\nturned all their generations by then."
SPENT = """\
Means of the runs in the figures, up to the sealed test, which asks each final agent the same items; in brackets, times
`{first}`. Seconds are by the clock, including any for which a run lay still; `learning s` is the part that training
took."""


def said(one: str, other: str, gain: Interval | None) -> str:
    """A comparison in plain words."""
    if gain is None:
        return f"{one} and {other} share no seed on which both came to a sealed test: nothing is shown."
    figures = f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    seeds = "one seed, which says nothing of others" if gain.seeds == 1 else f"{gain.seeds} seeds"
    if gain.low > 0:
        return f"{one} is better than {other}: {figures}, {seeds}."
    if gain.high < 0:
        return f"{one} is worse than {other}: {figures}, {seeds}."
    return f"No difference shown between {one} and {other}: {figures}, {seeds}."


def shown(outcomes: Sequence[Outcome], policies: Sequence[str]) -> list[str]:
    """What the experiment shows of its first policy, a sentence a comparison, the sum of it at the head."""
    first, *others = policies
    gains = {other: difference(outcomes, first, other) for other in others}
    beaten = [other for other, gain in gains.items() if gain and gain.low > 0]
    lost = [other for other, gain in gains.items() if gain and gain.high < 0]
    level = [other for other in others if other not in beaten and other not in lost]
    parts = [
        f"is better than {_listed(beaten)}" if beaten else "is better than none of them",
        f"is worse than {_listed(lost)}" if lost else "",
        f"no difference is shown to {_listed(level)}" if level else "",
    ]
    head = [f"`{first}` {'; '.join(filter(None, parts))}."] if others else ["One policy alone: nothing is compared."]
    return [*head, *(f"{said(first, other, gain)}{_apart(outcomes, first, other)}" for other, gain in gains.items())]


def _apart(outcomes: Sequence[Outcome], one: str, other: str) -> str:
    """Whether the intervals of two policies' own scores are apart, which asks for more than a difference does."""
    a, b = score(outcomes, one), score(outcomes, other)
    if a is None or b is None:
        return ""
    return f" Their own intervals {'are apart' if a.low > b.high or b.low > a.high else 'overlap'}."


def report(outcomes: Sequence[Outcome], policies: Sequence[str], heading: Mapping[str, str], picture: bool) -> str:
    """The whole report in Markdown. `heading` is what it was measured on; `picture`, whether there is a curves.png."""
    left_out = [f"- {each.run}: {each.reason}" for each in outcomes if not each.tested]
    curves = (
        "![gate score by generation](curves.png)"
        if picture
        else "No picture: there is no matplotlib (`pip install 'sia-events[report]'`). curves.json has the figures."
    )
    parts = [
        f"# Levers on {heading['task']}",
        "\n".join(f"- {name}: {value}" for name, value in heading.items()),
        "## What it shows",
        "\n".join(f"- {line}" for line in shown(outcomes, policies)),
        "## Policies",
        _table(_policies(outcomes, policies)),
        METHOD,
        "## What was equal, and what was spent",
        f"{EQUAL}\n{_budget(outcomes, heading['budget'])}",
        _table(_spent(outcomes, policies)),
        SPENT.format(first=policies[0]),
        "## Runs",
        _table(_runs(outcomes)),
        *(["## Not in the figures", "\n".join(left_out)] if left_out else []),
        "## Curves",
        curves,
        "The score on the gate of the incumbent behind each generation, the first agent being generation 0. The gate\n"
        "chose these versions, so their scores on it flatter them; the sealed test above does not.",
    ]
    return "\n\n".join(parts) + "\n"


def scores_csv(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row a run, for scores.csv."""
    return [
        {
            "run": each.run,
            "policy": each.policy,
            "seed": each.seed,
            "first": fmean(each.first) if each.tested else None,
            "final": fmean(each.final) if each.tested else None,
            "items": len(each.final),
            "levers": " ".join(each.levers),
            "calls": each.calls,
            "tokens": each.tokens,
            "usd": each.usd,
            "seconds": each.seconds,
            "learning_seconds": each.learning_seconds,
            "spent": each.spent,
            "code": each.code,
        }
        for each in outcomes
    ]


def curves(outcomes: Sequence[Outcome], policies: Sequence[str], heading: Mapping[str, str]) -> dict[str, Any]:
    """What curves.json holds: the figures the report rests on, item by item, and the mean curve of each policy."""
    mean: dict[str, list[float]] = {}
    for policy in policies:
        own = [each.curve for each in outcomes if each.policy == policy]
        mean[policy] = [
            fmean(value for value in at if value is not None)
            for at in zip_longest(*own)
            if any(v is not None for v in at)
        ]
    return {
        "heading": dict(heading),
        "scores": {policy: _figures(score(outcomes, policy)) for policy in policies},
        "differences": {other: _figures(difference(outcomes, policies[0], other)) for other in policies[1:]},
        "mean_gate_score": mean,
        "runs": [asdict(each) for each in outcomes],
    }


def _figures(interval: Interval | None) -> dict[str, Any] | None:
    return asdict(interval) if interval else None


def _policies(outcomes: Sequence[Outcome], policies: Sequence[str]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        (
            "policy",
            "runs",
            "sealed test",
            "harness tried, accepted",
            "weights tried, accepted",
            "learned by",
        )
    ]
    for policy in policies:
        own = [each for each in outcomes if each.policy == policy]
        pulled = Counter(lever for each in own for lever in each.levers)
        learned = {lever: n for lever, n in pulled.items() if lever != "harness"}
        accepted = [sum(each.accepted.get(lever, 0) for each in own) for lever in ("harness", "weights")]
        over = score(outcomes, policy)
        rows.append(
            (
                f"`{policy}`",
                f"{sum(each.tested for each in own)} of {len(own)}",
                str(over) if over else "none",
                f"{pulled['harness']}, {accepted[0]}",
                f"{sum(learned.values())}, {accepted[1]}",
                ", ".join(f"{name} ×{n}" for name, n in sorted(learned.items())) or "–",
            )
        )
    return rows


def _budget(outcomes: Sequence[Outcome], budget: str) -> str:
    """What the policies share of a budget."""
    if budget == NO_BUDGET:
        return UNLIMITED
    spent = sum(bool(each.spent) for each in outcomes)
    said = LIMITED.format(budget=budget, spent=spent, runs=len(outcomes))
    return f"{said}{NOT_SPENT}" if spent < len(outcomes) else said


def _spent(outcomes: Sequence[Outcome], policies: Sequence[str]) -> list[Sequence[str]]:
    """What a run of each policy spent in the mean, and how many times the first policy's that is."""
    means = {
        policy: _means([each for each in outcomes if each.policy == policy and each.tested]) for policy in policies
    }
    rows: list[Sequence[str]] = [("policy", "calls", "tokens", "s", "learning s", "USD", "out of budget")]
    for policy, own in means.items():
        over = sum(bool(each.spent) for each in outcomes if each.policy == policy)
        cells = [_beside(mean, first) for mean, first in zip(own, means[policies[0]], strict=True)]
        rows.append((f"`{policy}`", *cells, f"{over} of {sum(each.policy == policy for each in outcomes)}"))
    return rows


def _means(own: Sequence[Outcome]) -> list[float | None]:
    """None for what no run tells, and for money where a call had no known price."""
    columns = [(each.calls, each.tokens, each.seconds, each.learning_seconds, each.usd) for each in own]
    told = [[value for value in column if value is not None] for column in zip(*columns, strict=True)] or [[]] * 5
    return [fmean(values) if values and len(values) == len(own) else None for values in told]


def _beside(mean: float | None, first: float | None) -> str:
    if mean is None:
        return "unknown"
    shown = f"{mean:,.0f}" if mean >= 10 or mean == int(mean) else f"{mean:.2f}"
    return f"{shown} ({mean / first:.2f} ×)" if first else shown


def _runs(outcomes: Sequence[Outcome]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("run", "policy", "seed", "first agent", "final", "levers", "gate, generation 0 on")]
    for each in outcomes:
        ends = [f"{fmean(items):.3f}" if items else "none" for items in (each.first, each.final)]
        gate = " ".join(f"{value:.3f}" for value in each.curve)
        rows.append((each.run, f"`{each.policy}`", str(each.seed), *ends, ", ".join(each.levers), gate))
    return rows


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"|{' --- |' * len(rows[0])}", *body])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
