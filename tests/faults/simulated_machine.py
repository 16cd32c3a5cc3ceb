"""A simulated machine: an event loop whose time jumps to the next timer, processes that can be killed, drawn faults.

Whatever is drawn, the order of what is ready at once too, is drawn from one `Random`: the same seed is the same run.
"""

import asyncio
import logging
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from typing import Any

import pytest
import structlog

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Stuck(AssertionError):
    """Everybody waits for somebody else, and nothing will ever happen."""


class _Task(asyncio.Task[Any]):
    """A set of tasks is walked in the order of their hashes: those are numbers here, and no addresses."""

    def __init__(self, number: int, work: Coroutine[Any, Any, Any], **more: Any) -> None:
        self._number = number
        super().__init__(work, **more)

    def __hash__(self) -> int:
        return self._number


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs what is ready in an order of `chance`; when nothing is, it is at once as late as the next timer says."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance, self._now, self._numbers = chance, 0.0, count()
        self._selector = self  # the one thing that a loop waits in
        self.set_task_factory(self._task)

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stuck(f"{self._now:.1f} s: nobody is ready, and nobody waits for a time to come")
        self._now += timeout
        if len(self._ready) > 1:
            self._chance.shuffle(self._ready)
        return []

    def run_in_executor(self, executor: Any, work: Any, *args: Any) -> asyncio.Future[Any]:
        """What is left to a thread is done at once: there is none here."""
        done = self.create_future()
        try:
            done.set_result(work(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _task(self, loop: Any, work: Any, context: Context | None = None) -> asyncio.Task[Any]:
        task = _Task(next(self._numbers), work, loop=loop, context=context)
        if process := context.get(_PROCESS) if context else _PROCESS.get(None):
            process.tasks.append(task)
        return task


class Process:
    """Tasks that end together, and whatever they started: none of them gets to do anything more, to the outside.

    `replace` starts another one in its place, whether or not this one has ended; None where there may be but one.
    """

    def __init__(self, replace: Callable[[], None] | None) -> None:
        self.replace, self.dead, self.stopped_until = replace, False, 0.0
        self.tasks: list[asyncio.Task[Any]] = []
        self._context = copy_context()
        self._context.run(_PROCESS.set, self)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(work, context=self._context.copy())

    def kill(self) -> None:
        self.dead = True
        for task in self.tasks:
            task.cancel()


_PROCESS: ContextVar[Process] = ContextVar("process")


def this_process() -> Process:
    """The process that the running task belongs to."""
    return _PROCESS.get()


class Machine:
    """What happens to processes while they run. `rates` are chances of a fault at a place where it can happen.

    From `calm` on, in seconds, nothing goes wrong any more: whatever happened before, it has to be got over.
    """

    def __init__(self, chance: random.Random, rates: Mapping[str, float], calm: float) -> None:
        self.chance, self._rates, self._calm = chance, rates, calm
        self.loop = SimulatedLoop(chance)
        self._processes: list[Process] = []
        self.happened: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self._leap = timedelta()
        # One way in a schedule: nobody can tell that a clock which was put right again had leapt.
        self._way = chance.choice((-1, 1))
        self._over = False

    def now(self) -> datetime:
        """The time of day, as the `Clock` port tells it: it may be set while the machine runs."""
        if self.strikes("clock set"):
            self._leap += timedelta(seconds=self._way * self.chance.uniform(0, 7200))
        return NOON + timedelta(seconds=self.loop.time()) + self._leap

    def strikes(self, fault: str) -> bool:
        rate = self._rates.get(fault, 0.0)
        if not rate or self.loop.time() >= self._calm or self.chance.random() >= rate:
            return False
        self.happened[fault] += 1
        return True

    async def pause(self, least: float, most: float) -> None:
        await asyncio.sleep(self.chance.uniform(least, most))

    async def step(self) -> None:
        """Between two steps of whoever comes here: here it may be killed, stopped, or overtaken by others."""
        process = this_process()
        if process.dead:
            raise asyncio.CancelledError
        if self.strikes("kill"):
            process.kill()
        if self.strikes("power cut"):
            for each in self._processes:
                each.kill()
        if self.strikes("stop"):
            process.stopped_until = self.loop.time() + self.chance.uniform(1, 120)
            if process.replace and self.strikes("replace"):
                process.replace()
                process.replace = None
        if self.strikes("slow"):
            await self.pause(0, 10)
        elif self.chance.random() < 0.25:
            await asyncio.sleep(0)
        while process.stopped_until > self.loop.time() and not process.dead:  # noqa: ASYNC110 - time is what it waits for
            await asyncio.sleep(process.stopped_until - self.loop.time())
        if process.dead:
            raise asyncio.CancelledError

    def run(
        self, main: Callable[[], Coroutine[Any, Any, None]], ends_by: tuple[type[Exception], ...], alone: bool
    ) -> None:
        """Have a process do `main`, and when that ends another one, until the machine is switched off.

        Where it need not be `alone`, one that is stopped may be replaced meanwhile, and then there are two.
        """

        def start() -> None:
            process = Process(None if alone else start)
            self._processes.append(process)
            process.spawn(main()).add_done_callback(partial(ended, process))

        def ended(process: Process, task: asyncio.Task[None]) -> None:
            process.kill()
            error = None if task.cancelled() else task.exception()
            if error and not isinstance(error, ends_by):
                self.unexpected.append(f"a process ended: {error!r}")
            if not self._over and (alone or process.replace):
                self.loop.call_later(self.chance.uniform(0, 20), start)

        start()

    def simulate(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Switch the machine on, until `work` is done."""
        with _owned(self), asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            try:
                runner.run(work())
            finally:
                self._over = True


@contextmanager
def _owned(machine: Machine) -> Iterator[None]:
    """Time and chance that code takes from the process itself are the machine's, and nothing is printed."""
    state, before = random.getstate(), structlog.get_config()
    with pytest.MonkeyPatch.context() as process:
        random.seed(machine.chance.random())
        process.setattr(time, "monotonic", machine.loop.time)
        process.setattr(secrets, "token_hex", lambda size: machine.chance.randbytes(size).hex())
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        try:
            yield
        finally:
            structlog.configure(**before)
            random.setstate(state)
