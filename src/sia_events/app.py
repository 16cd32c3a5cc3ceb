"""The composition root: which services there are, and the adapters they are given on this machine."""

import asyncio
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from filelock import FileLock, Timeout

from sia_events.agents.agentic import Agentic
from sia_events.agents.direct import Direct
from sia_events.errors import NodeHeld, Unusable
from sia_events.evaluator.service import evaluator
from sia_events.event_log.recorder import lag, record
from sia_events.feedback_svc.service import feedback_svc
from sia_events.infra import clickhouse, nats_disk
from sia_events.infra.blobs import open_blobs
from sia_events.infra.box import kernel_box
from sia_events.infra.child import Child
from sia_events.infra.claude_agent import ClaudeAgent, find_program
from sia_events.infra.instant import InstantModels
from sia_events.infra.models import LocalModels
from sia_events.infra.nats import connect
from sia_events.infra.nats_server import running as nats_running
from sia_events.infra.providers.finder import Providers
from sia_events.infra.providers.prices import pricing
from sia_events.infra.sandbox import Bubblewrap, UnsafeProcess, binary, check
from sia_events.infra.store_lock import owner
from sia_events.kernel_bench.service import kernel_bench
from sia_events.local_model.weights import prepare
from sia_events.meta_svc.service import meta_svc
from sia_events.model_gateway.budget import Ledger
from sia_events.model_gateway.door import gateway
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.token import TokenDoor, keep_secret
from sia_events.shared.ports import (
    Backend,
    Blobs,
    Bus,
    BusUnreachable,
    Log,
    Ports,
    Sandbox,
    SandboxUnavailable,
)
from sia_events.shared.record import Record
from sia_events.shared.service import Service, serve
from sia_events.shared.settings import Settings
from sia_events.target_runner.service import target_runner
from sia_events.trainer.service import trainer

T = TypeVar("T")

SERVICES: Mapping[str, Service] = {
    service.name: service for service in (meta_svc, target_runner, evaluator, kernel_bench, feedback_svc, trainer)
}
# These two answer no single record: one serves HTTP, the other copies whole batches.
LOOPS = ("model_gateway", "recorder")
POLL_S = 0.1
# In the home: how long the embedded streams' files were when the log had everything in them.
COPIED = "copied.json"
MARK_S = 5.0


class SystemClock:
    """The `Clock` port."""

    def now(self) -> datetime:
        return datetime.now(UTC)


@dataclass(frozen=True)
class Node:
    """The parts a verb works with, and the services it may have running. `names` are those that `answering` starts."""

    settings: Settings
    bus: Bus
    blobs: Blobs
    private: Blobs
    names: tuple[str, ...] = ()
    sandbox: str = "bubblewrap"
    local_model: bool = True
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @asynccontextmanager
    async def answering(self, run: str | None) -> AsyncIterator[None]:
        """Have the services answer records, of `run` or of every run, until the block ends."""
        try:
            for name in self.names:
                self.tasks.append(asyncio.create_task(_run_service(name, self, run), name=name))
            yield
        finally:
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            self.tasks.clear()

    def stop_all_but(self, name: str) -> None:
        """Let every service end but one."""
        for task in self.tasks:
            if task.get_name() != name:
                task.cancel()

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`; a service that ends meanwhile ends it too, with that service's error."""
        main = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait({main, *self.tasks}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            main.cancel()
            raise
        if main in done:
            return main.result()
        main.cancel()
        for task in done:
            task.result()
        raise RuntimeError(f"service {next(iter(done)).get_name()} ended by itself")


def log_dsn(settings: Settings) -> str:
    return settings.log_dsn or f"chdb://{settings.home / 'log'}"


@asynccontextmanager
async def open_log(settings: Settings) -> AsyncIterator[Log]:
    """The log, for reading: the embedded store's owner is asked when there is one, else the store is opened here."""
    make_home(settings)
    log = await asyncio.to_thread(clickhouse.connect, log_dsn(settings))
    try:
        yield log
    finally:
        await log.close()


def make_home(settings: Settings) -> None:
    """Raises Unusable where the home cannot be."""
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"{settings.home} cannot be made: {error.strerror}"
        raise Unusable(f"{said}; set SIA_HOME to a folder of yours") from error


@asynccontextmanager
async def hold(settings: Settings, purpose: str) -> AsyncIterator[None]:
    """Be the one process that runs this home's services. Raises NodeHeld."""
    make_home(settings)
    lock, note = FileLock(settings.home / "node.lock"), settings.home / "node.json"
    try:
        # Others that only look whether we run take it for an instant.
        lock.acquire(timeout=0.3, poll_interval=0.02)
    except Timeout as error:
        running = running_node(settings) or {"pid": "?", "purpose": "?"}
        raise NodeHeld(
            f"{describe(running, settings.home)}; nothing was written. Wait for it, set SIA_HOME to another folder, "
            "or have runs share services: sia up"
        ) from error
    try:
        note.write_text(json.dumps({"pid": os.getpid(), "purpose": purpose}))
        for left in (settings.home / "tmp").glob("*-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        note.unlink(missing_ok=True)
        with suppress(OSError):  # not there, or not empty: whoever has a socket in it still runs
            socket_place(settings).rmdir()
        lock.release()


def running_node(settings: Settings) -> Mapping[str, object] | None:
    """{pid, purpose} of the process that runs this home's services, or None."""
    file = settings.home / "node.lock"
    if not file.exists():
        return None
    try:
        FileLock(file).acquire(timeout=0).lock.release()
    except Timeout:
        with suppress(OSError, ValueError):
            return json.loads((settings.home / "node.json").read_text())
    except OSError:
        return None
    return None


def own_nats_url(settings: Settings) -> str:
    """The URL of the bus server that another process of this home runs."""
    found = owner(settings.home / "nats")
    if found is None or found.dsn is None:
        raise NodeHeld(f"the process that runs the services of {settings.home} has no bus yet; try again in a moment")
    return found.dsn


def describe(running: Mapping[str, object], home: Path) -> str:
    return f"process {running['pid']} (sia {running['purpose']}) runs the services of {home}"


@asynccontextmanager
async def stores(settings: Settings) -> AsyncIterator[Node]:
    """Bus and blobs without any service; a bus server of our own is started when none is named."""
    blobs, private = open_public_blobs(settings), open_blobs(str(settings.home / "private"))
    async with AsyncExitStack() as stack:
        url = settings.nats_url
        if url is None:
            url = await stack.enter_async_context(nats_running(settings.home / "nats"))
        bus = await stack.enter_async_context(connect(url, blobs, SystemClock()))
        yield Node(settings, bus, blobs, private)


def with_services(node: Node, names: Sequence[str]) -> Node:
    """The node with these services to start when it answers."""
    return replace(node, names=tuple(names))


def as_asked(node: Node, sandbox: str, local_model: bool) -> Node:
    """The node with this sandbox; without `local_model` its gateway has no model server behind it."""
    return replace(node, sandbox=sandbox, local_model=local_model)


def open_public_blobs(settings: Settings) -> Blobs:
    return open_blobs(settings.blobs_url or str(settings.home / "blobs"))


async def ready(settings: Settings, sandbox: str, local_model: bool = True) -> None:
    """Whether runs can be driven here: the box can be built and the model is laid down (converted once, ten seconds).

    Raises SandboxUnavailable or ModelNotReady before anything is written.
    """
    if sandbox == "bubblewrap" and (why := await asyncio.to_thread(check)):
        raise SandboxUnavailable(why)
    if local_model:
        await asyncio.to_thread(prepare, settings.home)


async def _run_service(name: str, node: Node, run: str | None) -> None:
    match name:
        case "model_gateway":
            with _only_one(name, node.settings):
                await _serve_gateway(node)
        case "recorder":
            with _only_one(name, node.settings):
                await _record(node)
        case _:
            await serve(SERVICES[name], node.bus, ports_of(name, node), run, at_once(name, node.settings))


def at_once(service: str, settings: Settings) -> int:
    """How many records of a run a service answers at the same time: those of attempts are independent of each other."""
    return settings.side_by_side if service in ("target_runner", "evaluator") else 1


def sandbox_named(kind: str, settings: Settings) -> Sandbox:
    return UnsafeProcess() if kind == "process" else Bubblewrap(hidden=(settings.home,))


@contextmanager
def _only_one(name: str, settings: Settings) -> Iterator[None]:
    """Be this home's one gateway or recorder: they own a socket and a store. Raises NodeHeld."""
    lock = FileLock(settings.home / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise NodeHeld(f"another process is the {name} of {settings.home} already; nothing was changed") from error
    try:
        yield
    finally:
        lock.release()


def ports_of(name: str, node: Node) -> Ports:
    """What a service is given here; the evaluator alone gets the answers."""
    secret = keep_secret(node.settings.home, node.settings.gateway_secret)
    return Ports(
        bus=node.bus,
        blobs=node.blobs,
        sandbox=sandbox_named(node.sandbox, node.settings),
        clock=SystemClock(),
        door=TokenDoor(socket_folder(node.settings) / "gateway.sock", secret),
        home=node.settings.home,
        private=node.private if name == "evaluator" else None,
        threads=node.settings.model_threads,
        backends=backends(),
        boxed=None if node.sandbox == "process" else partial(kernel_box, binary(), hidden=(node.settings.home,)),
    )


def backends() -> Mapping[str, Backend]:
    """The ways to have a harness written by an LLM that this installation has."""
    program = find_program()
    claude = {"claude": ClaudeAgent(program)} if program else {}
    return {"direct": Direct(), "agentic": Agentic(), **claude}


def socket_folder(settings: Settings) -> Path:
    """A folder of ours for unix sockets, whose names must stay under 108 bytes however deep the home lies."""
    folder = socket_place(settings)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else; remove it or set TMPDIR")
    return folder


def socket_place(settings: Settings) -> Path:
    """That folder's name; whoever holds the home removes it at its end."""
    mark = hashlib.sha256(str(settings.home).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"sia-{os.getuid()}-{mark}"


async def _serve_gateway(node: Node) -> None:
    """The door on its socket, and behind it the model server as a child process."""
    settings = node.settings
    folder = socket_folder(settings)
    inner, outer = folder / "model.sock", folder / "gateway.sock"
    threads = str(settings.model_threads)
    command = ("-m", "sia_events.local_model.server", "--home", str(settings.home), "--socket", str(inner))
    server = Child(
        "the model server",
        (sys.executable, *command, "--threads", threads, "--die-with-parent"),
        {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"},
    )
    local = LocalModels(node.blobs, settings.home / "models" / "adapters", inner)
    providers = Providers(settings.providers, os.environ, {"local": local, "instant": InstantModels()})
    journal = Journal(node.bus)
    app = gateway(
        journal,
        providers.find,
        keep_secret(settings.home, settings.gateway_secret),
        SystemClock(),
        Ledger(node.bus, SystemClock(), pricing(settings.providers, settings.prices)),
        settings.patience_s,
    )
    outer.unlink(missing_ok=True)
    config = uvicorn.Config(app, uds=str(outer), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    door = _Door(config)
    async with AsyncExitStack() as ending:
        for socket in (inner, outer):
            ending.callback(socket.unlink, missing_ok=True)
        # Last: what was answered until then has been paid for, and goes on disk.
        ending.push_async_callback(journal.close)
        ending.push_async_callback(local.close)
        ending.push_async_callback(providers.aclose)
        ending.push_async_callback(server.close)
        async with asyncio.TaskGroup() as group:
            group.create_task(door.serve())
            if node.local_model:
                group.create_task(server.start())


class _Door(uvicorn.Server):
    """Uvicorn without its own signal handling: the process around it decides when to end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _record(node: Node) -> None:
    """The recorder; the embedded store gets an owner process, so that other processes can ask it meanwhile."""
    keeper: Child | None = None
    dsn, store = node.settings.log_dsn or "", node.settings.home / "log"
    if not dsn:
        command = ("-m", "sia_events.infra.chdb_server", "--path", str(store), "--die-with-parent")
        keeper = Child("the log's owner", (sys.executable, *command))
        dsn = (await keeper.start())["dsn"]
    try:
        while True:
            # Never opened here: while the owner is being started again we would be in its way.
            if keeper and (held := owner(store)) and held.dsn:
                dsn = held.dsn
            try:
                log = await asyncio.to_thread(clickhouse.connect, dsn)
                try:
                    await record(node.bus, log)
                finally:
                    await log.close()
            except clickhouse.LogUnavailable:
                # The stream keeps everything; the owner is being started again.
                await asyncio.sleep(0.5)
    finally:
        with suppress(TimeoutError, BusUnreachable, OSError):
            async with asyncio.timeout(MARK_S):
                await mark_copied(node)
        if keeper:
            await keeper.close()


def log_is_behind(settings: Settings) -> bool:
    """Whether the embedded streams may have what the log has not; no server is started to tell."""
    return settings.nats_url is None and nats_disk.has_news(settings.home / "nats", settings.home / COPIED)


async def mark_copied(node: Node) -> None:
    """Note how far the embedded streams had come, if the log has all of it; what comes later shows as news."""
    if node.settings.nats_url is None:
        # Looked at first: what comes between the two looks must not pass for copied.
        copied = nats_disk.sizes(node.settings.home / "nats")
        if copied and await lag(node.bus) <= 0:
            nats_disk.keep(copied, node.settings.home / COPIED)


def forget_copied(settings: Settings) -> None:
    """What the log has is about to be less."""
    (settings.home / COPIED).unlink(missing_ok=True)


async def follow(bus: Bus, run: str, after: int = 0) -> AsyncIterator[Record]:
    """The run's records behind position `after`, and then each new one as it comes."""
    while True:
        for new in (await bus.history(run))[after:]:
            after = new.position
            yield new
        await asyncio.sleep(POLL_S)
