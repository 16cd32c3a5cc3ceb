"""What people see of costs: what a run's calls came to, and what a run will cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from sia_events.estimate import Estimate, Line
from sia_events.views.records import clean

HEADS = ("calls", "prompt tokens", "completion tokens", "USD")


def cost_text(cost: Mapping[str, Any]) -> str:
    """`sia cost` for people: a branch's own calls first, then those it shares with its parents."""
    lines = [f"run {cost['run']}   task {cost['task']}   {cost['status']}", "", _table(cost["own"])]
    if cost["inherited"]:
        lines += ["", f"shared with {cost['parent']}, which paid for it:", _table(cost["inherited"])]
    limits = [_limit(name, held) for name, held in cost["budget"].items() if held["allowed"] is not None]
    lines += ["", f"budget: {'; '.join(limits)}" if limits else "budget: no limits"]
    if cost["own"]["total"]["unpriced_calls"]:
        lines.append(
            'unknown: nobody here knew the price; [prices."provider/model"] in config.toml is for calls to come'
        )
    return clean("\n".join(lines))


def usd(cost: Mapping[str, Any]) -> str:
    """A sum in US dollars; where some calls have no price, that of the others, and how many have none."""
    if cost["usd"] is not None:
        return dollars(cost["usd"])
    if cost["unpriced_calls"] == cost["calls"]:
        return "unknown"
    return f"{dollars(cost['priced_usd'])} + {cost['unpriced_calls']:,} calls unknown"


def estimate_text(estimate: Estimate) -> str:
    """One line: what a run will cost about, role by role, and what the figures rest on."""
    if not estimate.lines:
        return "estimate: 0.00 USD: no hosted model plays a role"
    known = sum(line.usd or 0.0 for line in estimate.lines)
    unknown = sorted({line.model for line in estimate.lines if line.usd is None})
    head = f"about {dollars(known)} USD"
    if unknown:
        head = f"{f'{head} + ' if known else ''}unknown, as nobody here knows the price of {', '.join(unknown)}"
    over = f"; over the limit of {estimate.limit:g} USD, where the run pauses" if estimate.passes_limit else ""
    return f"estimate: {head}{over}. {'; '.join(map(_line, estimate.lines))}. {estimate.rests_on}"


def _line(line: Line) -> str:
    tokens = line.prompt_tokens + line.completion_tokens
    price = "price unknown" if line.usd is None else f"{dollars(line.usd)} USD"
    return f"{line.role} {line.model}: {line.calls:,} calls, {tokens:,} tokens ({line.basis}), {price}"


def _table(sums: Mapping[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("", *HEADS)]
    for name in ("role", "model", "generation"):
        for each in sums[f"by_{name}"]:
            rows.append((f"{name} {'?' if each[name] is None else each[name]}", *_cells(each)))
    rows.append(("total", *_cells(sums["total"])))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(_padded(row, widths) for row in rows)


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    figures = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return "  ".join((row[0].ljust(widths[0]), *figures))


def _cells(cost: Mapping[str, Any]) -> tuple[str, ...]:
    return (f"{cost['calls']:,}", f"{cost['prompt_tokens']:,}", f"{cost['completion_tokens']:,}", usd(cost))


def _limit(name: str, held: Mapping[str, float]) -> str:
    return f"{held['spent']:,g} of {held['allowed']:,g} {name}, {held['left']:,g} left"


def dollars(amount: float) -> str:
    """Cents, and more places below ten cents, where calls of small models are."""
    return f"{amount:.2f}" if amount >= 0.1 or amount == 0 else f"{amount:.4f}"
