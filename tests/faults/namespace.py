"""A network namespace with a NATS server in it, at the other end of a virtual cable that can be pulled."""

import asyncio
import os
import secrets
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sia_events.infra.nats_server import binary, server_info

PORT, READY_S = 4222, 30.0
POSSIBLE = os.geteuid() == 0 and shutil.which("ip") is not None


class Cable:
    """A pair of virtual interfaces, one of them in the namespace; `url` leads over it."""

    def __init__(self, device: str, host: str) -> None:
        self._device = device
        self.url = f"nats://{host}:{PORT}"

    async def pull(self) -> None:
        await ip("link", "set", self._device, "down")

    async def plug(self) -> None:
        await ip("link", "set", self._device, "up")


@asynccontextmanager
async def apart(store: Path) -> AsyncIterator[Cable]:
    """A server on the folder `store`, as it comes but for syncing, in a namespace of its own until the block ends."""
    mark = secrets.token_hex(3)
    name, near, far = f"sia-{mark}", f"sia-n{mark}", f"sia-f{mark}"
    # Link-local (RFC 3927): the two ends of one cable that nothing else is on.
    link = f"169.254.{1 + secrets.randbelow(254)}"
    host, config = f"{link}.2", _configuration(store, f"{link}.2")
    await ip("netns", "add", name)
    try:
        await ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        await ip("addr", "add", f"{link}.1/30", "dev", near)
        await ip("-n", name, "addr", "add", f"{host}/30", "dev", far)
        await ip("-n", name, "link", "set", far, "up")
        await ip("link", "set", near, "up")
        inside = ("ip", "netns", "exec", name, await binary(), "-c", str(config))
        server = await asyncio.create_subprocess_exec(*inside, stdout=-3, stderr=-3)
        try:
            async with asyncio.timeout(READY_S):
                await _listening(host)
            yield Cable(near, host)
        finally:
            server.kill()
            await server.wait()
    finally:
        # The cable's other end, and so this one, goes with the namespace.
        await ip("netns", "del", name)


def _configuration(store: Path, host: str) -> Path:
    store.mkdir()
    config = store / "server.conf"
    config.write_text(f"""\
host: {host}
port: {PORT}
max_payload: 8MB
jetstream {{ store_dir: "{store}", max_file_store: 16GB, max_memory_store: 64MB, sync_interval: always }}
""")
    return config


async def _listening(host: str) -> None:
    while True:
        try:
            await server_info(host, PORT)
            return
        except (OSError, ValueError, TimeoutError):
            await asyncio.sleep(0.05)


async def ip(*words: str) -> None:
    process = await asyncio.create_subprocess_exec("ip", *words, stdout=-3, stderr=sys.stderr)
    if status := await process.wait():
        raise RuntimeError(f"ip {' '.join(words)} ended with status {status}")
