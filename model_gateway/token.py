"""Attempt tokens: what a gateway believes of a caller, signed, so that it need not remember anybody."""

import os
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import msgspec
from itsdangerous import BadData, URLSafeSerializer

from sia_events.shared.ports import GatewayAway
from sia_events.shared.settings import SettingsError

HELD_UP_S = 120.0  # the bus may be away for a minute, and the gateway says so then


class Claims(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For whom a call is made and with what.

    `start` tells one start of the attempt's program from the next; `sample`: replies are drawn at temperature 1,
    whatever is asked for; `expires`: when the token is worth nothing any more, in seconds since 1970 UTC. `models` may
    be asked for by name beside `model`; with `any_model` every other name means `model`. `calls`: how many model calls
    the attempt may make, all its tries together.
    """

    run: str
    attempt: str
    start: str
    version: str
    model: str
    adapter: str | None
    sample: bool
    seed: int
    expires: float
    role: Literal["target", "meta", "feedback", "trainer"] = "target"
    models: tuple[str, ...] = ()
    any_model: bool = False
    calls: int | None = None


class TokenRefused(Exception):
    """Not a token of ours, or one whose time is up."""


@dataclass(frozen=True)
class TokenDoor:
    """The `Door` port: the gateway's socket, and tokens signed with a secret that only gateway and runner share."""

    socket: Path
    secret: str

    def token(self, claims: Mapping[str, Any]) -> str:
        return _serializer(self.secret).dumps(msgspec.to_builtins(msgspec.convert(claims, Claims)))

    async def held_up(self, token: str) -> float:
        import httpx

        # A gateway that is just started again: `retries` are waits of 0, 0.5, 1, 2, … seconds for a connection.
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket), retries=5)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=HELD_UP_S) as http:
            try:
                reply = await http.get("/v1/held_up", headers={"Authorization": f"Bearer {token}"})
            except httpx.HTTPError as error:
                raise GatewayAway(f"the gateway does not say what it kept waiting: {error!r}") from error
        if reply.status_code != HTTPStatus.OK:
            raise GatewayAway(f"the gateway does not say what it kept waiting: {reply.text[:500]}")
        return float(reply.json()["seconds"])


def read_token(token: str, secret: str, now: datetime) -> Claims:
    """The claims of a token that is good at `now`. Raises TokenRefused."""
    claims = _signed(token, secret)
    if now.timestamp() >= claims.expires:
        raise TokenRefused(f"this token opens nothing any more: the time of attempt {claims.attempt} is up")
    return claims


def keep_secret(home: Path, given: str | None) -> str:
    """The signing secret: the one given, or one drawn once for this home and kept readable by its owner only.

    Raises SettingsError where the file that keeps it is empty.
    """
    if given:
        return given
    file = home / "gateway.secret"
    if not file.exists():
        # Whole or not there at all: with an empty secret anybody could sign, an agent in its box too.
        handle, new = tempfile.mkstemp(dir=home, prefix="secret-")  # readable by its owner only
        with os.fdopen(handle, "w") as drawn:
            drawn.write(secrets.token_urlsafe(32))
            drawn.flush()
            os.fsync(drawn.fileno())
        with suppress(FileExistsError):  # somebody was quicker
            os.link(new, file)
        os.unlink(new)
    if not (secret := file.read_text().strip()):
        said = "empty, and with an empty secret anybody could sign. Nothing is lost. Delete it: a new one is drawn"
        raise SettingsError(f"{file}: {said}")
    return secret


@lru_cache
def _signed(token: str, secret: str) -> Claims:
    """The claims of a token that we signed, whatever the time; a caller shows the same one with each of its calls."""
    try:
        return msgspec.convert(_serializer(secret).loads(token), Claims)
    except (BadData, msgspec.ValidationError) as error:
        raise TokenRefused(f"this token opens nothing: {error}") from error


def _serializer(secret: str) -> URLSafeSerializer:
    return URLSafeSerializer(secret, salt="sia-attempt")
