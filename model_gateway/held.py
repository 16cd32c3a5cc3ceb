"""How long the start of a program was kept waiting by us: for its journal, whatever its models took to answer."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

KEPT = 4096


@dataclass
class _Waits:
    under_way: int = 0
    longest: float = 0.0
    failed: Exception | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    joined: "list[_Waits]" = field(default_factory=list)


class Held:
    """By run and start. An agent whose time ran out meanwhile, or that gave up waiting, is not to blame."""

    def __init__(self) -> None:
        self._starts: OrderedDict[tuple[str, str], _Waits] = OrderedDict()

    def __len__(self) -> int:
        return len(self._starts)

    @contextmanager
    def waiting(self, run: str, start: str) -> Iterator[None]:
        """Around whatever this start of a program waits for that is not its model's doing."""
        waits = self._of(run, start)
        began = time.monotonic()
        waits.under_way += 1
        try:
            yield
            waits.failed = None  # what had failed before was asked for once more, or told to have failed
        except Exception as error:
            waits.failed = error
            raise
        finally:
            waits.longest = max(waits.longest, time.monotonic() - began)
            waits.under_way -= 1
            if not waits.under_way:
                waits.over.set()
                waits.over = asyncio.Event()

    def join(self, run: str, start: str, other: str) -> None:
        """This start waits for a call that the `other` one has made, and for its record: what keeps that, keeps it."""
        mine, theirs = self._of(run, start), self._of(run, other)
        if mine is not theirs and not any(each is theirs for each in mine.joined):
            mine.joined.append(theirs)

    async def longest(self, run: str, start: str) -> float:
        """In seconds, told when it waits for nothing any more. Raises what kept the last of it off the record."""
        mine = self._starts.get((run, start), _Waits())
        mine_and_joined = [mine, *mine.joined]
        for waits in mine_and_joined:
            while waits.under_way:
                await waits.over.wait()
            if waits.failed:
                raise waits.failed
        return max(waits.longest for waits in mine_and_joined)

    def _of(self, run: str, start: str) -> _Waits:
        waits = self._starts.setdefault((run, start), _Waits())
        self._starts.move_to_end((run, start))
        if len(self._starts) > KEPT:
            idle = (name for name, each in self._starts.items() if not each.under_way and each is not waits)
            if oldest := next(idle, None):
                del self._starts[oldest]
        return waits
