"""Several measurements side by side, as plain text."""

from collections.abc import Sequence

from sia_events.kernel_bench.measure import Measurement

COLUMNS = "{:<20}{:>14}{:>14}{:>10}{:>17}{:>12}  {}\n"


def render(rows: Sequence[tuple[str, Measurement]]) -> str:
    """A fixed-width table of (candidate's name, its measurement); refused ones say why in place of figures."""
    lines = [COLUMNS.format("candidate", "reference ms", "candidate ms", "speed-up", "20-80 %", "max error", "verdict")]
    for name, row in rows:
        if row.speedup is None:
            lines.append(COLUMNS.format(name, *["-"] * 5, f"refused: {last_line(row.reason)}"))
            continue
        lines.append(
            COLUMNS.format(
                name,
                f"{row.reference_ms:.1f}",
                f"{row.candidate_ms:.1f}",
                f"{row.speedup:.2f}",
                f"{row.low:.2f} - {row.high:.2f}",
                f"{row.max_error:.1e}",
                f"quarantined: {row.reason}" if row.flagged else "right",
            )
        )
    for where, problem, repeats in sorted({(row.environment, row.problem, row.repeats) for _, row in rows}, key=str):
        lines.append(
            f"\n{problem}: CPU time of one thread, median of {repeats} paired ratios, fresh inputs each, every output "
            f"checked.\n{where.cpu}, {where.cores} cores, {where.system}, Python {where.python}, torch {where.torch}\n"
        )
    return "".join(lines)


def last_line(reason: str) -> str:
    """A traceback says what happened in its last line."""
    return reason.rstrip().rpartition("\n")[2]
