"""A request that a provider fails for good, told from a provider that is away: by asking it something plain."""

import secrets
from collections.abc import Hashable, Mapping
from datetime import timedelta
from http import HTTPStatus
from typing import Any

import httpx

from sia_events.shared.calls import journal_key
from sia_events.shared.events import AttemptRequested, ServiceFailed
from sia_events.shared.ports import Ports
from sia_events.shared.record import Record
from sia_events.shared.service import Work

PLAIN = "Say hello."
# Some models think before they say anything.
MAX_TOKENS = 1024
CALL_S = 600.0


async def fails_alone(work: Work, away: Exception, claims: Mapping[str, Any]) -> bool:
    """Whether the model of `claims` answers something plain, where this piece of work was stopped so before.

    The first time a person is asked to look: nothing is judged by an outage, however long it lasts. Where the same
    comes of it again while the provider answers others, no waiting mends it, and the piece is to be given up. The plain
    call is recorded with those of the piece, and paid for by the run.
    """
    return await _stopped_before(work, away) and await _answers(work.ports, claims)


async def _stopped_before(work: Work, away: Exception) -> bool:
    """Whether the run has a dead letter of the same kind on this piece of work."""
    history = await work.ports.bus.history(work.run.name)
    mine = {record.id for record in history if _piece(record) == _piece(work.cause)}
    return any(
        record.cause in mine
        and isinstance(record.event, ServiceFailed)
        and record.event.error.startswith(f"{type(away).__name__}:")
        for record in history
    )


def _piece(record: Record) -> Hashable:
    """What is to be done about a record; all tries of an attempt are one piece."""
    return journal_key(record.event.attempt) if isinstance(record.event, AttemptRequested) else record.id


async def _answers(ports: Ports, claims: Mapping[str, Any]) -> bool:
    expires = ports.clock.now() + timedelta(seconds=CALL_S)
    # The base model: an adapter that cannot be served is no outage. A start of its own has no failed call yet.
    own = {"start": secrets.token_hex(8), "adapter": None, "sample": False, "calls": None}
    token = ports.door.token({**claims, **own, "expires": expires.timestamp()})
    body = {
        "model": claims["model"],
        "messages": [{"role": "user", "content": PLAIN}],
        "max_tokens": MAX_TOKENS,
        # Never asked before, or the journal would answer.
        "metadata": {"plain": own["start"]},
    }
    transport = httpx.AsyncHTTPTransport(uds=str(ports.door.socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=CALL_S) as http:
        try:
            reply = await http.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {token}"})
        except httpx.HTTPError:
            return False
    return reply.status_code == HTTPStatus.OK
