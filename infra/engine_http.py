"""Requests to an engine that speaks vLLM's API: JSON goes in, JSON comes out, failures are ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from sia_events.infra.providers.failures import kind_of
from sia_events.shared.ports import ModelFailed

QUOTED = 500
IDLE_S = 4.0
"""How long a connection is kept for the next request: vLLM closes it behind 5 s, and one that closes is of no use."""


class EngineHttp:
    """The engine `name` at `url`, behind the unix socket `socket` where one is named. To be made in the loop it serves.

    It may be silent for `timeout` seconds.
    """

    def __init__(self, name: str, url: str, timeout: float, key: str = "", socket: Path | None = None) -> None:
        self._name, self._url = name, url
        # Who asks bounds how many there are at once, so the connections have no limit of their own.
        kept: Mapping[str, Any] = {"limit": 0, "keepalive_timeout": IDLE_S}
        # On aiohttp: httpx looks through all its connections for each request, which took half of the gateway's CPU.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(socket), **kept) if socket else aiohttp.TCPConnector(**kept),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=not socket,
        )

    async def ask(self, path: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """The reply to a POST of `body`, or to a GET without one; {} where it is a mere word.

        Raises ModelFailed with the engine's own status.
        """
        method, sent = ("GET", None) if body is None else ("POST", msgspec.json.encode(body))
        headers = {"Content-Type": "application/json"} if sent else {}
        try:
            async with self._session.request(
                method, self._url + path, data=sent, headers=headers, allow_redirects=False
            ) as response:
                told = await response.read()
        except TimeoutError as error:
            raise ModelFailed(504, f"{self._name} gave no answer in time", "timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ModelFailed(503, f"{self._name} does not answer: {type(error).__name__}: {error}") from error
        if (status := response.status) != 200:
            said = told[:QUOTED].decode(errors="replace")
            raise ModelFailed(status, f"{self._name} answered {status}: {said}", kind_of(status))
        if not response.headers.get("content-type", "").startswith("application/json"):
            return {}
        try:
            return msgspec.json.decode(told)
        except ValueError as error:
            raise ModelFailed(502, f"{self._name} answered with what is no JSON", "garbage") from error

    async def aclose(self) -> None:
        await self._session.close()
