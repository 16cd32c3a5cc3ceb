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


class Held:
    """By run and start. An agent whose time ran out meanwhile, or that gave up waiting, is not to blame."""

    def __init__(self) -> None:
        self._starts: OrderedDict[tuple[str, str], _Waits] = OrderedDict()

    @contextmanager
    def waiting(self, run: str, start: str) -> Iterator[None]:
        """Around whatever this start of a program waits for that is not its model's doing."""
        waits = self._starts.setdefault((run, start), _Waits())
        self._starts.move_to_end((run, start))
        while len(self._starts) > KEPT:
            self._starts.popitem(last=False)
        began = time.monotonic()
        waits.under_way += 1
        try:
            yield
        except Exception as error:
            waits.failed = error
            raise
        finally:
            waits.longest = max(waits.longest, time.monotonic() - began)
            waits.under_way -= 1
            if not waits.under_way:
                waits.over.set()
                waits.over = asyncio.Event()

    async def longest(self, run: str, start: str) -> float:
        """In seconds, told when it waits for nothing any more. Raises what kept something of it off the record."""
        waits = self._starts.get((run, start), _Waits())
        while waits.under_way:
            await waits.over.wait()
        if waits.failed:
            raise waits.failed
        return waits.longest
