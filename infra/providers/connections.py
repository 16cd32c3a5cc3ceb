"""The connections to a provider that its SDK is handed: httpx2 carried by aiohttp, for half the CPU of its own."""

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx2

from sia_events.infra.providers.account import Account

# How long a connection is kept for the next call; most servers keep it for longer.
IDLE_S = 5.0
# A long reply says nothing for minutes, and routers forget a silent connection.
PROBE_S = 60


def connections(account: Account) -> httpx2.AsyncClient:
    """A client for the SDK, which closes it. To be made in the loop that uses it.

    How many calls there are at once is for the account's slots to say, so the client has no limit of its own.
    """
    row = account.provider
    # httpx2's own transport knows every kind of proxy, and reads them from the environment.
    carrier = None if _behind_proxy(row.base_url or "") else _Carrier(row.timeout_s)
    unlimited = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(transport=carrier, timeout=row.timeout_s, limits=unlimited, follow_redirects=True)


class _Carrier(httpx2.AsyncBaseTransport):
    """httpx2's transport on aiohttp, whose errors become httpx2's. Nothing may be silent for longer than `timeout`."""

    def __init__(self, timeout: float) -> None:
        # Decoding, cookies and redirects are done above.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=IDLE_S, ssl=httpx2.create_ssl_context(), socket_factory=_probed
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url, headers, body = request.url, request.headers.multi_items(), await request.aread()
        if url.userinfo:
            # It is a header by now, and aiohttp takes no address that says it too.
            url = url.copy_with(userinfo=b"")
        with _named():
            reply = await self._session.request(
                request.method, str(url), headers=headers, data=body, allow_redirects=False
            )
            if reply.content.is_eof():
                # It came with its head. Taken whole, it goes through none of the layers that hand on pieces.
                return httpx2.Response(reply.status, headers=reply.raw_headers, content=await reply.read())
        return httpx2.Response(reply.status, headers=reply.raw_headers, stream=_Body(reply))

    async def aclose(self) -> None:
        await self._session.close()


class _Body(httpx2.AsyncByteStream):
    """The bytes of a reply as they come; its connection is used again if it was read to its end, and closed if not."""

    def __init__(self, reply: aiohttp.ClientResponse) -> None:
        self._reply = reply

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _named():
            async for piece in self._reply.content.iter_any():
                yield piece

    async def aclose(self) -> None:
        self._reply.release()


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise httpx2.ReadTimeout(str(error)) from error
    except aiohttp.ClientError as error:
        raise httpx2.NetworkError(str(error)) from error


def _probed(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
        if hasattr(socket, option):  # not on every system
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), PROBE_S)
    return made


def _behind_proxy(url: str) -> bool:
    address, proxies = urlsplit(url), getproxies()
    return (address.scheme in proxies or "all" in proxies) and not proxy_bypass(address.netloc)
