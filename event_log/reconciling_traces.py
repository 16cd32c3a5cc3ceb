"""A run's traces in two copies. They have no chain: each tells of the other, and the server's count of both."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from sia_events.event_log.reconciling import ONCE, Finding
from sia_events.shared.ports import Traced


@dataclass
class Traces:
    """A run's traces as they stand on the stream: digests of the lines of each envelope, by sequence.

    `strangers` are messages that are no envelope, and why; `put_back` the sequences of lost ones that stand there
    again, `returned` those where they stand. `counted` is how many messages of the run the server counts, whether or
    not it can read them.
    """

    counted: int
    envelopes: dict[int, Sequence[str]] = field(default_factory=dict)
    strangers: dict[int, str] = field(default_factory=dict)
    put_back: set[int] = field(default_factory=set)
    returned: set[int] = field(default_factory=set)

    def take(self, message: Traced) -> None:
        if message.envelope is None:
            self.strangers[message.sequence] = message.why
            return
        self.envelopes[message.sequence] = [hashlib.sha256(line).hexdigest() for line in message.envelope.lines]
        if message.in_place_of is not None:
            self.put_back.add(message.in_place_of)
            self.returned.add(message.sequence)

    def gone(self, tabled: Collection[int]) -> int:
        """How many were lost and are neither put back nor among those that the tables still have."""
        unread = self.counted - len(self.envelopes) - len(self.strangers)
        return max(0, unread - len(self.put_back.union(tabled)))


def reconcile_lines(
    run: str, stream: Traces, rows: Iterable[tuple[int, int, str]], copied: int, first: int = 1
) -> tuple[tuple[Finding, ...], frozenset[int], frozenset[int]]:
    """Hold the run's envelopes on the stream against their rows: findings, and the sequences that are wrong.

    `rows` are (sequence, line, digest). What stood before the sequence `first` the stream has let go by its age: those
    rows may be there or have gone too. The first set are sequences whose rows are missing, also only until they are
    copied, or altered, the second those that only the tables still have.
    """
    tabled: dict[int, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    counted: Counter[int] = Counter()
    for sequence, line, digest in rows:
        if sequence < first:
            continue
        tabled[sequence][line].add(digest)
        counted[sequence] += 1
    found = [
        Finding("unreadable", "stream", run, f"trace sequence {sequence}", why, "no reader takes it for a trace")
        for sequence, why in stream.strangers.items()
    ]
    wrong: set[int] = set()
    lost = set(tabled) - stream.envelopes.keys()
    for sequence, digests in stream.envelopes.items():
        place, has = f"trace sequence {sequence}", tabled.get(sequence)
        if sequence < first or (has is None and not digests):
            continue
        if has is None and sequence > copied:
            wrong.add(sequence)
            continue
        if has == {line: {digest} for line, digest in enumerate(digests)}:
            if counted[sequence] > len(digests):
                told = f"{counted[sequence]} rows of {len(digests)} lines"
                found.append(Finding("doubled", "tables", run, place, told, ONCE))
            continue
        if has and sequence in stream.returned - stream.put_back:
            # Those of one that was lost too: its sequence was given anew, to what was put back for another.
            lost.add(sequence)
            continue
        wrong.add(sequence)
        kind = "altered" if has and len(has) >= len(digests) else "missing"
        found.append(Finding(kind, "tables", run, place, f"of {len(digests)} lines"))
    found += [Finding("missing", "stream", run, f"trace sequence {sequence}") for sequence in sorted(lost)]
    if gone := stream.gone(lost):
        envelopes = "a trace envelope" if gone == 1 else f"{gone} trace envelopes"
        found.append(Finding("missing", "stream", run, envelopes, "by the server's count; the tables lack them too"))
    return tuple(found), frozenset(wrong), frozenset(lost)
