"""What the bench measured of a run's kernels on dev, as rows for who writes the next one. Pure."""

from collections.abc import Sequence

from sia_events.agents.fit import Part
from sia_events.shared.events import KernelMeasured
from sia_events.shared.record import Record
from sia_events.shared.run import Run

REASON_CHARS = 400
HEAD = (
    "A kernel has no items; this is what the bench measured on dev.\n\n"
    "| version | started from | speed-up | 20-80 % | what the bench says | record |\n"
    "| --- | --- | --- | --- | --- | --- |\n"
)


def kernels(run: Run, records: Sequence[Record], version: str) -> list[Part]:
    """A row a kernel: the one that is gone on from, what was started from it, then the others, the newest first.

    Of a long reason the end is shown: a traceback says what happened in its last line.
    """
    rows: list[tuple[tuple[int, int], Part]] = []
    for record in records:
        event = record.event
        if not isinstance(event, KernelMeasured) or run.attempts[event.attempt].split != "dev":
            continue
        parent = run.versions[event.version].parent
        says = "right" if event.correct and not event.flagged else "refused" if not event.correct else "quarantined"
        why = " ".join(event.reason.replace("|", "/").replace("`", "'").split())[-REASON_CHARS:]
        row = (
            f"| {event.version} | {parent or ''} | {event.speedup:.3f} | {event.low:.3f} - {event.high:.3f} "
            f"| {says}{f': `{why}`' if why else ''} | {record.position} |"
        )
        near = 0 if event.version == version else 1 if parent == version else 2
        rows.append(((near, -record.position), Part(row, event.version, record.position, (record.position,))))
    return [part for _, part in sorted(rows, key=lambda row: row[0])]
