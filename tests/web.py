"""A web application on a socket, for as long as a test needs it."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn

# Uvicorn's own loop looks every tenth of a second whether it is to end, and its end waits for another.
LOOK_S = 0.005


@asynccontextmanager
async def served(app: Any, listening: socket.socket, patience_s: float | None = None) -> AsyncIterator[None]:
    """Serve until the block ends, and then until every request is answered, or `patience_s` are over.

    Who connects early waits in the socket's queue. The socket is closed at the end.
    """
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup(sockets=[listening])
    state = server.server_state
    try:
        yield
    finally:
        for listener in server.servers:
            listener.close()
        for connection in list(state.connections):
            connection.shutdown()
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while state.connections or state.tasks:  # noqa: ASYNC110 - uvicorn tells nobody when one ends
                    await asyncio.sleep(LOOK_S)
        for task in state.tasks:
            task.cancel()
