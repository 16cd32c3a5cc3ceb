"""The gateway as a home runs it: its door on a socket, and behind it the model server as a child process."""

import asyncio
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

import uvicorn

from sia_events.corked import CorkedProtocol
from sia_events.home import door_socket, only_one, socket_folder
from sia_events.infra.child import Child
from sia_events.infra.clock import SystemClock
from sia_events.infra.instant import InstantModels
from sia_events.infra.models import LocalModels
from sia_events.infra.providers.finder import Providers
from sia_events.infra.providers.prices import pricing
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.budget import Ledger
from sia_events.model_gateway.door import gateway
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.token import keep_secret
from sia_events.shared.ports import Blobs, Bus
from sia_events.shared.settings import Settings

NAME = "model_gateway"


async def serve_gateway(settings: Settings, bus: Bus, blobs: Blobs, local_model: bool) -> None:
    """Serve until cancelled; without `local_model` there is no model server behind it. Raises NodeHeld."""
    with only_one(NAME, settings):
        await _serve(settings, bus, blobs, local_model)


async def _serve(settings: Settings, bus: Bus, blobs: Blobs, local_model: bool) -> None:
    inner, outer = socket_folder(settings) / "model.sock", door_socket(settings)
    threads = str(settings.model_threads)
    command = ("-m", "sia_events.local_model.server", "--home", str(settings.home), "--socket", str(inner))
    server = Child(
        "the model server",
        (sys.executable, *command, "--threads", threads, "--die-with-parent"),
        {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"},
    )
    adapters = settings.home / "models" / "adapters"
    local = LocalModels(blobs, adapters / "local", inner)
    environ = dict(os.environ)
    for provider in settings.providers.values():
        # A library's own child, such as the `uname -p` behind an SDK's header, gets our environment as it stands.
        os.environ.pop(provider.key_env or "", None)
    providers = Providers(
        settings.providers,
        environ,
        own={"local": local, "instant": InstantModels()},
        given={"vllm": {"blobs": blobs, "folder": adapters}},
    )
    journal = Journal(bus)
    ledger = Ledger(bus, SystemClock(), pricing(settings.providers, settings.prices))
    calls = Calls(journal, providers.find, SystemClock(), ledger, settings.patience_s)
    app = gateway(calls, keep_secret(settings.home, settings.gateway_secret), SystemClock())
    outer.unlink(missing_ok=True)
    config = uvicorn.Config(
        app,
        uds=str(outer),
        log_level="error",
        access_log=False,
        http=CorkedProtocol,
        proxy_headers=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    async with AsyncExitStack() as ending:
        for socket in (inner, outer):
            ending.callback(socket.unlink, missing_ok=True)
        # From the last one up: what is answered until then has been paid for, and goes on disk.
        ending.push_async_callback(journal.close)
        ending.push_async_callback(local.aclose)
        ending.push_async_callback(providers.aclose)
        ending.push_async_callback(server.close)
        ending.push_async_callback(calls.end, settings.drain_s)
        ending.callback(providers.turn_away)
        ending.callback(_hush)
        async with asyncio.TaskGroup() as group:
            group.create_task(Door(config).serve())
            if local_model:
                group.create_task(server.start())


def _hush() -> None:
    """Requests that are cut off from here on are cut off by us: their tracebacks would tell of nothing."""
    logging.getLogger("uvicorn.error").disabled = True


class Door(uvicorn.Server):
    """Uvicorn without its own signal handling: the process around it decides when to end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
