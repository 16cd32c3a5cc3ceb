"""Services for every run on the stream: in the foreground, and in the background behind `sia up`."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from typing import Any

import psutil

from sia_events import app, log_here
from sia_events.catching_up import settled
from sia_events.errors import NodeHeld, Unusable
from sia_events.following import recorded
from sia_events.home import describe, running_node
from sia_events.local_model.weights import CARRIER, prepare
from sia_events.shared.settings import Settings

# In the home: who was started by `sia up`.
STARTED = "up.json"


async def serve(settings: Settings, names: Sequence[str], as_json: bool) -> int:
    """Run services for every run on the stream until interrupted; always with the real sandbox."""
    running = await settled(settings)
    if running and running.get("purpose") != "serve":
        # It answers its own run with services of its own: a second set would make every attempt twice.
        raise NodeHeld(f"{describe(running, settings.home)}; wait for its end, or set SIA_HOME to another folder")
    if "target_runner" in names:
        await app.ready(settings, "bubblewrap", local_model=False)
    local = "model_gateway" in names and None not in (find_spec("torch"), find_spec(CARRIER))
    if local:
        await asyncio.to_thread(prepare, settings.home)
    async with app.stores_of_home(settings, "serve", running is not None) as node:
        await log_here.require_ours(settings, node.streams)
        node = app.as_asked(app.with_services(node, names), "bubblewrap", local)
        return await _serving(node, names, as_json)


async def _serving(node: app.Node, names: Sequence[str], as_json: bool) -> int:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupted() -> None:
        stop.set()
        # Interrupted once more, it waits for no reply that is under way.
        loop.remove_signal_handler(signal.SIGINT)
        loop.add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    scraping = nullcontext()
    if log_here.NAME in names and (port := node.settings.metrics_port):
        from sia_events.metrics import scraped  # a package that nothing else needs

        scraping = scraped(node, port)
    async with scraping, node.answering(None):
        told = {"serving": list(names), "pid": os.getpid()}
        print(json.dumps(told) if as_json else f"serving {', '.join(names)}; interrupt to stop", flush=True)
        await node.guard(stop.wait())
        if log_here.NAME in names:
            await node.stop(but=log_here.NAME)
            await node.guard(recorded(node))
    return 0


def up(settings: Settings) -> dict[str, Any]:
    """Start `sia serve` in the background and wait until it serves."""
    if running := _in_background(settings):
        raise Unusable(f"{describe(running, settings.home)} already; sia down stops what sia up started")
    settings.home.mkdir(parents=True, exist_ok=True)
    with (settings.home / "serve.log").open("ab") as talk:
        child = subprocess.Popen(
            [sys.executable, "-m", "sia_events", "serve", "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=talk,
            start_new_session=True,
            env={**os.environ, "SIA_HOME": str(settings.home)},
        )
    assert child.stdout
    line = child.stdout.readline()
    if not line:
        raise Unusable(f"the services did not start; see {settings.home / 'serve.log'}")
    told = json.loads(line)
    note = {"pid": child.pid, "born": born(psutil.Process(child.pid)), "purpose": "serve"}
    (settings.home / STARTED).write_text(json.dumps(note))
    return told


def down(settings: Settings) -> dict[str, Any]:
    """End what `sia up` started and wait until it is gone."""
    running = _in_background(settings)
    if not running:
        return {"pid": None}
    if running.get("purpose") != "serve":
        raise Unusable(f"{describe(running, settings.home)}, which sia up did not start; interrupt it where it runs")
    pid = int(str(running["pid"]))
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.terminate()
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(app.POLL_S)
    return {"pid": pid}


def _in_background(settings: Settings) -> Mapping[str, object] | None:
    """Who runs the home's services; on an outside bus nobody holds the home, and `up` has left a note."""
    if running := running_node(settings):
        return running
    with suppress(OSError, ValueError, LookupError, psutil.Error):
        note = json.loads((settings.home / STARTED).read_text())
        process = psutil.Process(note["pid"])
        # Earlier releases noted the time of day.
        if note["born"] in (born(process), process.create_time()) and process.status() != psutil.STATUS_ZOMBIE:
            return note
    return None


def born(process: psutil.Process) -> float:
    """When the process began, in seconds since the machine did: somebody may set the time of day meanwhile."""
    # Only Linux counts from its boot; elsewhere a process keeps the time of day that it was given.
    return round(process.create_time() - (psutil.boot_time() if psutil.LINUX else 0.0), 2)
