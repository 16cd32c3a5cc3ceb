"""What an attempt's program said: the lines of its stdout and stderr, on the trace stream as kind `log`."""

from collections.abc import Iterator
from typing import Literal

import msgspec
import structlog

from sia_events.shared.ports import BusFull, Envelope, Outcome
from sia_events.shared.service import Work

KEPT = 16_384
"""Characters of each of the two that are kept, the last ones: that is where a program says what it died of."""


log = structlog.get_logger()


class LogLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line that was said. The first that was kept tells how much went before it; `more`: the box took no more."""

    attempt: str
    stream: Literal["stdout", "stderr"]
    text: str
    omitted_lines: int = 0
    omitted_characters: int = 0
    more: bool = False


async def log_lines(work: Work, attempt: str, outcome: Outcome, token: str) -> None:
    """Put what was said on the trace, under the attempt's name, its token blotted out; told of where there is no room.

    Nothing in it changes by the clock or by chance: who handles the record again, and is told the same, adds nothing.
    """
    lines = tuple(
        msgspec.json.encode(line)
        for stream, said in (("stdout", outcome.stdout), ("stderr", outcome.stderr))
        for line in _kept(attempt, stream, said.decode(errors="replace").replace(token, "[token]"), outcome.truncated)
    )
    run, bus = work.run.name, work.ports.bus
    if lines and all(there.lines != lines for there in await bus.traces(run, "log", attempt)):
        try:
            await bus.trace(Envelope(run, "log", attempt, lines))
        except BusFull as error:
            # What the attempt came to does not rest on what its program said.
            log.warning("what a program said is not kept", run=run, attempt=attempt, error=str(error))


def _kept(attempt: str, stream: Literal["stdout", "stderr"], said: str, truncated: bool) -> Iterator[LogLine]:
    if not said:
        return
    tail = said[-KEPT:].removesuffix("\n").split("\n")
    omitted = said[:-KEPT]
    yield LogLine(attempt, stream, tail[0], omitted.count("\n"), len(omitted), truncated)
    for text in tail[1:]:
        yield LogLine(attempt, stream, text)
