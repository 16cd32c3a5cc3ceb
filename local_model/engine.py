"""The engine: one thread that gathers waiting requests into batches and hands each its reply."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from time import monotonic
from typing import Any

from sia_events.local_model.policy import ChoiceRequest, Chosen, Policy, Sampled, TextRequest

BATCH = 64
GATHER_S = 0.002
"""How long the first request of a batch waits for company, at most."""
RETURN_S, RETURNED_S = 0.1, 0.5
"""Texts that were answered together mostly come again together: until there are as many as last time, the next is
waited for so long, and all of them so long, but never longer than the last ones took."""
WAITING = 4096


class EngineBusy(Exception):
    """More requests are waiting than the engine takes on; nothing was queued."""


@dataclass(frozen=True)
class _Job:
    ask: ChoiceRequest | TextRequest | Callable[[Policy], Any]
    reply: Future


class Engine:
    """All work on the policy, in one thread: requests in batches, changes of adapters between them."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._jobs: queue.Queue[_Job] = queue.Queue(WAITING)
        self._texts, self._took = 0, 0.0
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    def choose(self, request: ChoiceRequest) -> "Future[Chosen]":
        return self._put(request)

    def generate(self, request: TextRequest) -> "Future[Sampled]":
        return self._put(request)

    def call(self, change: Callable[[Policy], Any]) -> "Future[Any]":
        """Run `change` on the policy between two batches, after all that was asked before it."""
        return self._put(change)

    def _put(self, ask: ChoiceRequest | TextRequest | Callable[[Policy], Any]) -> Future:
        job = _Job(ask, Future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise EngineBusy(f"{WAITING} requests are waiting already. Try again later.") from None
        return job.reply

    def _work(self) -> None:
        while True:
            jobs = [job for job in self._gather() if job.reply.set_running_or_notify_cancel()]
            _answer([job for job in jobs if isinstance(job.ask, ChoiceRequest)], self._policy.choose)
            texts = [job for job in jobs if isinstance(job.ask, TextRequest)]
            begun = monotonic()
            _answer(texts, self._policy.generate)
            if texts and len(texts) == len(jobs):
                self._texts, self._took = len(texts), monotonic() - begun
            for job in jobs:
                if callable(job.ask):
                    _answer([job], lambda changes: [change(self._policy) for change in changes])

    def _gather(self) -> list[_Job]:
        """What is waiting, up to a batch; a change of adapters ends it, so that no request overtakes one.

        Begun with the first of thirty texts that are on their way, a batch takes nearly as long as with all of them,
        and the others would wait for its end. Choices are soon answered: they wait for nobody, and end the waiting.
        """
        jobs = [self._jobs.get()]
        begun = monotonic()
        while len(jobs) < BATCH and not callable(jobs[-1].ask):
            returning = len(jobs) < self._texts and all(isinstance(job.ask, TextRequest) for job in jobs)
            left = (min(RETURNED_S, self._took) if returning else GATHER_S) - (monotonic() - begun)
            try:
                jobs.append(self._jobs.get(timeout=max(0.0, min(RETURN_S, left))))
            except queue.Empty:
                break
        return jobs


def _answer(jobs: list[_Job], work: Callable[[list[Any]], list[Any]]) -> None:
    """A batch that fails is answered one by one: only whoever asked for what cannot be done gets the error."""
    if not jobs:
        return
    try:
        replies = work([job.ask for job in jobs])
    except Exception as error:  # whoever asked gets it; the engine lives on for the next batch
        if len(jobs) == 1:
            jobs[0].reply.set_exception(error)
            return
        for job in jobs:
            _answer([job], work)
        return
    for job, reply in zip(jobs, replies, strict=True):
        job.reply.set_result(reply)
