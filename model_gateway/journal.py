"""The journal of model calls: written to the trace stream before a reply is given, read when a handler runs again."""

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from sia_events.shared.calls import GivenAgain, ModelCall, decode_call, encode_call, journal_key
from sia_events.shared.ports import Bus, Envelope

LINES = 128
KEPT = 32


@dataclass
class _Sent:
    """How many numbers a request was given, and those given back since."""

    count: int = 0
    back: set[int] = field(default_factory=set)


class Journal:
    """Recorded replies by run, attempt, request digest and count. One flush is in flight; calls gather behind it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._known: OrderedDict[tuple[str, str], dict[tuple[str, int], ModelCall]] = OrderedDict()
        self._sent: OrderedDict[tuple[str, str], dict[str, _Sent]] = OrderedDict()
        self._waiting: list[tuple[str, ModelCall, asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()

    async def open(self, run: str, attempt: str) -> dict[tuple[str, int], ModelCall]:
        """What is recorded of the attempt, by (request digest, count); read from the stream the first time."""
        key = (run, journal_key(attempt))
        async with self._opening:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
            found: dict[tuple[str, int], ModelCall] = {}
            for envelope in await self._bus.traces(run, "model_call", key[1]):
                for call in map(decode_call, envelope.lines):
                    if call.reply is not None:
                        found[(call.digest, call.n)] = call
            self._known[key] = found
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
            return found

    def number(self, run: str, start: str, digest: str, again: bool = False, under_way: Sequence[int] = ()) -> int:
        """The how-manieth reply to this request is wanted, since the attempt's program was started this time, from 0.

        Only what is answered counts, so that a later start, which may be answered at once, finds each reply under the
        number that it asks for. `again`: whoever sends it says that it is an earlier sending once more: of those whose
        reply is `under_way` the first, else the last.
        """
        sent = self._sent.setdefault((run, start), defaultdict(_Sent))[digest]
        self._sent.move_to_end((run, start))
        while len(self._sent) > KEPT:
            self._sent.popitem(last=False)
        if sent.back:
            sent.back.remove(first := min(sent.back))
            return first
        if again and (late := [n for n in under_way if n < sent.count]):
            return min(late)
        if not (again and sent.count):
            sent.count += 1
        return sent.count - 1

    def give_back(self, run: str, start: str, digest: str, n: int) -> None:
        """There was no reply under this number: the next sending of the request takes it."""
        if sent := self._sent.get((run, start)):
            sent[digest].back.add(n)

    async def record(self, run: str, call: ModelCall) -> None:
        """Returns when the call is on disk; only then may its reply be given away."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((run, call, done))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        await done

    async def given_again(self, run: str, attempt: str, told: GivenAgain) -> None:
        """Returns when it is on disk, before the reply is given: whose outputs are judged is told apart by it."""
        await self._bus.trace(Envelope(run, "step", journal_key(attempt), (msgspec.json.encode(told),)))

    async def close(self) -> None:
        """Returns when every call that was recorded so far is on disk."""
        if self._flusher:
            await self._flusher

    async def _flush(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:LINES], self._waiting[LINES:]
            bundles: dict[tuple[str, str], list[tuple[ModelCall, asyncio.Future[None]]]] = defaultdict(list)
            for run, call, done in batch:
                bundles[(run, journal_key(call.attempt))].append((call, done))
            for (run, key), calls in bundles.items():
                try:
                    await self._bus.trace(
                        Envelope(run, "model_call", key, tuple(encode_call(call) for call, _ in calls))
                    )
                    known = await self.open(run, key)
                    known.update({(call.digest, call.n): call for call, _ in calls if call.reply is not None})
                    outcome = None
                except Exception as error:
                    # Nobody told us, but it may stand there all the same: what is recorded has to be read again.
                    self._known.pop((run, key), None)
                    outcome = error
                for _, done in calls:
                    if done.done():  # whoever asked has gone away meanwhile
                        continue
                    if outcome:
                        done.set_exception(outcome)
                    else:
                        done.set_result(None)
