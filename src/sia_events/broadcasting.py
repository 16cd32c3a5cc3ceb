"""A past run as if it happened now: its records under subjects of their own, in their own time or faster."""

import asyncio
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from sia_events import app
from sia_events.catching_up import settled
from sia_events.errors import Unusable
from sia_events.home import own_nats_url
from sia_events.infra.nats_connection import masked
from sia_events.infra.nats_publisher import publisher
from sia_events.reading import records
from sia_events.shared.record import Record, to_wire
from sia_events.shared.settings import Settings

SUBJECT = "sia.replay.RUN.TYPE"
# What our streams keep, and what belongs to the server: a replay must not come to stand there.
TAKEN = re.compile(r"sia\.(?!replay\.)|\$|_INBOX\b")


async def broadcast(settings: Settings, run: str, speed: float | None, subject: str) -> dict[str, Any]:
    """Publish the run's records, `speed` times as fast as they came, None for at once; returns {run, records, subject}.

    They go to the server of the home's services, or the one that is named, or one of our own while it lasts.
    """
    history = await records(settings, run)
    name = history[-1].run
    subject_of(subject, name, history[0].type)
    running = await settled(settings)
    async with app.stores_of_home(settings, f"replay {name}", running is not None):
        url = settings.nats_url or own_nats_url(settings)
        shown = ".".join("*" if word == "TYPE" else name if word == "RUN" else word for word in subject.split("."))
        # Whoever listens to a server of our own needs its token; another's address is known to whoever set it.
        at = masked(url) if settings.nats_url else url
        print(f"sia: {len(history)} records of {name} to {shown} at {at}", file=sys.stderr, flush=True)
        async with publisher(url) as publish:
            for wait_s, record in schedule(history, speed):
                await asyncio.sleep(wait_s)
                await publish(subject_of(subject, name, record.type), to_wire(record))
    return {"run": name, "records": len(history), "subject": shown}


def schedule(history: Sequence[Record], speed: float | None) -> Iterator[tuple[float, Record]]:
    """Each record and the seconds to wait before it. The time between a parent and its branch is nobody's."""
    before = history[0]
    for record in history:
        same = record.run == before.run
        passed = (record.time - before.time).total_seconds() if same and speed is not None else 0.0
        yield max(0.0, passed) / (speed or 1.0), record
        before = record


def subject_of(pattern: str, run: str, kind: str) -> str:
    """The subject of an event of that kind: the words RUN and TYPE of the pattern stand for them. Raises Unusable."""
    words = {"RUN": run, "TYPE": kind}
    subject = ".".join(words.get(word, word) for word in pattern.split("."))
    if TAKEN.match(subject) or not all(re.fullmatch(r"[^\s.*>]+", word) for word in subject.split(".")):
        raise Unusable(
            f"--subject {pattern}: words with dots between, no * and no >, and none that our streams or the server "
            f"keep (sia., $, _INBOX); RUN and TYPE stand for the run and the event, as in {SUBJECT}"
        )
    return subject


def speed_of(text: str) -> float | None:
    """ "10x" is 10.0, "max" is None. Raises Unusable."""
    if text == "max":
        return None
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)x?", text)) or not float(found[1]):
        raise Unusable(f"--speed is a factor above zero such as 10x or 0.5x, or max, not {text!r}")
    return float(found[1])
