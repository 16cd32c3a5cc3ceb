"""`sia dlq`: what services gave up on, looked at, offered again, or given up for good."""

import getpass
import sys
from typing import Any

from sia_events import app
from sia_events.catching_up import settled
from sia_events.errors import Unusable
from sia_events.log_here import require_ours
from sia_events.reading import lineage, look, resolve
from sia_events.shared.events import LetterDropped
from sia_events.shared.failpoints import reach
from sia_events.shared.letters import Letter, letters
from sia_events.shared.ports import BlobCorrupt, BlobMissing, Bus, Log
from sia_events.shared.record import NewerRecord, answers
from sia_events.shared.settings import Settings


async def listed(settings: Settings, run: str | None, everything: bool) -> list[dict[str, Any]]:
    """A row a letter, run by run: the open ones, or all of them."""

    async def ask(log: Log) -> list[dict[str, Any]]:
        sql = "SELECT DISTINCT run FROM events WHERE type = 'ServiceFailed' ORDER BY run"
        names = [await resolve(log, run)] if run else [row["run"] for row in await log.query(sql)]
        rows: list[dict[str, Any]] = []
        for name in names:
            try:
                found = letters(await lineage(log, name))
            except (Unusable, NewerRecord) as error:
                if run:
                    raise
                print(f"sia: {error}", file=sys.stderr)  # those of the others are told all the same
                continue
            rows += [_row(each) for each in found if each.record.run == name and (everything or each.state == "open")]
        return rows

    return await look(settings, ask)


async def shown(settings: Settings, run: str, position: int) -> dict[str, Any]:
    """One letter, and what its service was given: {…, text}, None where the payload is lost. Raises Unusable."""

    async def ask(log: Log) -> Letter:
        name = await resolve(log, run)
        return _at(letters(await lineage(log, name)), name, position)

    letter = await look(settings, ask)
    try:
        payload = await app.open_public_blobs(settings).get(letter.event.payload)
        text = payload.decode(errors="replace")
    except (BlobMissing, BlobCorrupt):
        text = None
    return {**_row(letter), "text": text}


async def retry(settings: Settings, run: str, position: int) -> dict[str, Any]:
    """Have the letter's service be given its record once more: {run, service, up}. Raises Unusable.

    Whoever serves all runs is handed the run again; where nobody does, the next to serve it begins there anyway.
    """
    running = await settled(settings)
    async with app.stores_of_home(settings, "dlq", running is not None) as node:
        await require_ours(settings, node.streams)
        letter = await _open(node.bus, run, position)
        if not letter.event.failed:
            raise Unusable("it is about a message that is no record of the run: no service can answer it. Drop it.")
        await node.bus.again(letter.record.run, letter.event.service)
    # Who is at one run of its own serves no other, and was offered its letters when it began.
    up = settings.nats_url is not None or (running is not None and running.get("purpose") == "serve")
    return {"run": letter.record.run, "service": letter.event.service, "up": up}


async def drop(settings: Settings, run: str, position: int, by: str | None, reason: str) -> dict[str, Any]:
    """Record that what the letter is about is given up: {run, position, event}. The letter stays. Raises Unusable."""
    running = await settled(settings)
    async with app.stores_of_home(settings, "dlq", running is not None) as node:
        await require_ours(settings, node.streams)
        letter = await _open(node.bus, run, position)
        event = LetterDropped(letter=str(letter.record.id), by=by or getpass.getuser(), reason=reason)
        reach("sia dlq before dropping")
        (record,) = await node.bus.append(letter.record.run, answers(letter.record.run, letter.record, "cli", [event]))
        reach("sia dlq after dropping")
    return {"run": record.run, "position": record.position, "event": record.type}


async def _open(bus: Bus, run: str, position: int) -> Letter:
    known = await bus.runs()
    found = [run] if run in known else [name for name in known if name.startswith(run)]
    if len(found) != 1:
        raise Unusable(f"{'no run' if not found else 'several runs begin with'} {run!r}; sia runs lists them")
    letter = _at(letters(await bus.history(found[0])), found[0], position)
    if letter.state != "open":
        raise Unusable(f"letter {position} of run {found[0]} is not open: {letter.state}; nothing was written")
    return letter


def _at(found: list[Letter], run: str, position: int) -> Letter:
    own = {each.record.position: each for each in found if each.record.run == run}
    if position not in own:
        there = ", ".join(map(str, own)) or "none"
        raise Unusable(f"run {run} has no dead letter at position {position}; there are: {there}")
    return own[position]


def _row(letter: Letter) -> dict[str, Any]:
    return {
        "run": letter.record.run,
        "position": letter.record.position,
        "time": letter.record.time.isoformat(),
        "state": letter.state,
        **letter.event.model_dump(mode="json", exclude={"type"}),
    }
