"""Which stream a run stands in, and under which subjects: history may be cut into several streams, a run never is."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sia_events.shared.ports import StreamName

EVENTS: StreamName = "SIA"
TRACE: StreamName = "SIA_TRACE"
ROOTS = {EVENTS: "sia.events", TRACE: "sia.trace"}
ANY = "*"

_WORDS = {EVENTS: 2, TRACE: 3}  # that follow the root: run and type; run, kind and key
_NAME = re.compile(r"SIA(_TRACE)?(_\d+)?")


@dataclass(frozen=True)
class Partitions:
    """History in `count` streams of records, SIA_0 and on, and as many of traces; one of each has no number.

    A subject ends in the number of its stream where there are several, so `sia.events.RUN.>` finds a run in any case.
    """

    count: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.cut(EVENTS), *self.cut(TRACE))

    def cut(self, history: StreamName) -> Mapping[str, str]:
        """The streams by name, and the subjects that each takes in."""
        root = ROOTS[history]
        if self.count == 1:
            return {history: f"{root}.>"}
        words = ".".join(ANY * _WORDS[history])
        return {f"{history}_{number}": f"{root}.{words}.{number}" for number in range(self.count)}

    def of(self, history: StreamName, run: str) -> str:
        """The stream that has the run's records, or its traces."""
        return history if self.count == 1 else f"{history}_{self._number(run)}"

    def subject(self, history: StreamName, run: str, *words: str) -> str:
        """The run's subject of those words, which may be wildcards; as may the run, ANY."""
        return ".".join((ROOTS[history], run, *words, *self.last(run)))

    def last(self, run: str) -> list[str]:
        """The words that a subject of the run ends in."""
        if self.count == 1:
            return []
        return [ANY if run == ANY else str(self._number(run))]

    def _number(self, run: str) -> int:
        # Python's own hash is another one in each process.
        return int.from_bytes(hashlib.sha256(run.encode()).digest()[:8]) % self.count


WHOLE = Partitions()


def holds_history(stream: str) -> bool:
    """Whether a stream of that name is one of history, however that is cut."""
    return _NAME.fullmatch(stream) is not None
