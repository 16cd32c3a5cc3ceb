"""The composition root: which services there are, and the adapters they are given on this machine."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from sia_events import gateway_here, log_here
from sia_events.agents.agentic import Agentic
from sia_events.agents.direct import Direct
from sia_events.evaluator.service import evaluator
from sia_events.feedback_svc.service import feedback_svc
from sia_events.home import at_work, door_socket, hold, own_nats_url
from sia_events.infra.blobs import StoredBlobs, open_blobs
from sia_events.infra.box import kernel_box
from sia_events.infra.claude_agent import ClaudeAgent, find_program
from sia_events.infra.clock import SystemClock
from sia_events.infra.nats import connect
from sia_events.infra.nats_server import running as nats_running
from sia_events.infra.nats_streams import Retention
from sia_events.infra.sandbox import Bubblewrap, UnsafeProcess, binary, check
from sia_events.kernel_bench.service import kernel_bench
from sia_events.local_model.weights import prepare
from sia_events.meta_svc.service import meta_svc
from sia_events.model_gateway.token import TokenDoor, keep_secret
from sia_events.shared.code import code
from sia_events.shared.ports import Backend, Bus, Ports, Sandbox, SandboxUnavailable, Streams
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
LOOPS = (gateway_here.NAME, log_here.NAME)
POLL_S = 0.1


@dataclass(frozen=True)
class Node:
    """The parts a verb works with, and the services it may have running. `names` are those that `answering` starts."""

    settings: Settings
    bus: Bus
    blobs: StoredBlobs
    private: StoredBlobs
    streams: Streams
    names: tuple[str, ...] = ()
    sandbox: str = "bubblewrap"
    local_model: bool = True
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @asynccontextmanager
    async def answering(self, run: str | None) -> AsyncIterator[None]:
        """Have the services answer records, of `run` or of every run, until the block ends."""
        with at_work(self.settings) if self.names else nullcontext():
            try:
                for name in self.names:
                    self.tasks.append(asyncio.create_task(_run_service(name, self, run), name=name))
                yield
            finally:
                await self.stop()

    async def stop(self, but: str | None = None) -> None:
        """End every service but one: the gateway behind those who ask models, and the recorder behind the gateway."""
        for names in (SERVICES, (gateway_here.NAME,), (log_here.NAME,)):
            ending = [task for task in self.tasks if task.get_name() in names and task.get_name() != but]
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            self.tasks[:] = [task for task in self.tasks if task not in ending]

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


@asynccontextmanager
async def stores(settings: Settings) -> AsyncIterator[Node]:
    """Bus and blobs without any service; a bus server of our own is started when none is named."""
    code()  # read once, now: the sources of a process that runs for long may change under it
    blobs, private = open_public_blobs(settings), open_private_blobs(settings)
    retention = Retention(settings.events_gb, settings.trace_gb, settings.trace_days)
    async with AsyncExitStack() as stack:
        url = settings.nats_url
        if url is None:
            url = await stack.enter_async_context(nats_running(settings.home / "nats"))
        bus = await stack.enter_async_context(
            connect(url, blobs, SystemClock(), partitions=settings.partitions, retention=retention)
        )
        yield Node(settings, bus, blobs, private, bus.streams)


@asynccontextmanager
async def stores_of_home(settings: Settings, purpose: str, running: bool) -> AsyncIterator[Node]:
    """The stores of the home's services where they are `running`, or on the server that is named; else our own.

    Raises NodeHeld: our own are opened by the one process that holds the home.
    """
    url = settings.nats_url or (own_nats_url(settings) if running else None)
    async with AsyncExitStack() as stack:
        if url is None:
            await stack.enter_async_context(hold(settings, purpose))
        yield await stack.enter_async_context(stores(settings.model_copy(update={"nats_url": url})))


def with_services(node: Node, names: Sequence[str]) -> Node:
    """The node with these services to start when it answers."""
    return replace(node, names=tuple(names))


def as_asked(node: Node, sandbox: str, local_model: bool) -> Node:
    """The node with this sandbox; without `local_model` its gateway has no model server behind it."""
    return replace(node, sandbox=sandbox, local_model=local_model)


def open_public_blobs(settings: Settings) -> StoredBlobs:
    return open_blobs(settings.blobs_url or str(settings.home / "blobs"))


def open_private_blobs(settings: Settings) -> StoredBlobs:
    """Answers and judges, which the evaluator alone is handed."""
    return open_blobs(str(settings.home / "private"))


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
        case gateway_here.NAME:
            await gateway_here.serve_gateway(node.settings, node.bus, node.blobs, node.local_model)
        case log_here.NAME:
            await log_here.keep_log(node.settings, node.bus, node.streams)
        case _:
            await serve(SERVICES[name], node.bus, ports_of(name, node), run, at_once(name, node.settings))


def at_once(service: str, settings: Settings) -> int:
    """How many records of a run a service answers at the same time: those of attempts are independent of each other."""
    return settings.side_by_side if service in ("target_runner", "evaluator") else 1


def ports_of(name: str, node: Node) -> Ports:
    """What a service is given here; the evaluator alone gets the answers."""
    secret = keep_secret(node.settings.home, node.settings.gateway_secret)
    return Ports(
        bus=node.bus,
        blobs=node.blobs,
        sandbox=sandbox_named(node.sandbox, node.settings),
        clock=SystemClock(),
        door=TokenDoor(door_socket(node.settings), secret),
        home=node.settings.home,
        private=node.private if name == "evaluator" else None,
        threads=node.settings.model_threads,
        trainer_usd_per_hour=node.settings.trainer_usd_per_hour,
        backends=backends(),
        boxed=None if node.sandbox == "process" else partial(kernel_box, binary(), hidden=(node.settings.home,)),
    )


def sandbox_named(kind: str, settings: Settings) -> Sandbox:
    return UnsafeProcess() if kind == "process" else Bubblewrap(hidden=(settings.home,))


def backends() -> Mapping[str, Backend]:
    """The ways to have a harness written by an LLM that this installation has."""
    program = find_program()
    claude = {"claude": ClaudeAgent(program)} if program else {}
    return {"direct": Direct(), "agentic": Agentic(), **claude}


async def follow(bus: Bus, run: str, after: int = 0) -> AsyncIterator[Record]:
    """The run's records behind position `after`, and then each new one as it comes."""
    while True:
        for new in (await bus.history(run))[after:]:
            after = new.position
            yield new
        await asyncio.sleep(POLL_S)
