"""The judge's end of one worker process: start it, ask it, read its clocks, end it."""

import json
import math
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from signal import SIGKILL
from typing import IO, Any

import numpy as np

from sia_events.kernel_bench.problems import Array, Inputs
from sia_events.kernel_bench.timing import Cost, Instant, cost, instant, processes

HEADER_BYTES = 16 << 10
"""No honest reply header is longer; a worker does not get to size the judge's memory."""

STDERR_BYTES = 2000

REST_NS = 1_000_000
"""CPU time that a worker may take while it is asked nothing; an honest one takes a tenth of that at most."""

Launch = Callable[[Sequence[str], Path], Sequence[str]]
"""(worker's argv, its one writable folder) -> the argv to start, for example the same inside a box."""


class Refused(Exception):
    """The candidate did what a kernel does not do; the message says what, for the candidate's author to read."""


class BenchUnavailable(Exception):
    """Kernels cannot be measured on this machine; the message says why and how to mend it."""


class Stopped(Exception):
    """Whoever asked for the measurement wants it no more; the worker is ended."""


def plain(argv: Sequence[str], scratch: Path) -> Sequence[str]:
    """No box: for sources that are your own. The worker's limits apply; files, network and judge are open to it."""
    return argv


@contextmanager
def worker(launch: Launch, allowance_s: float, stop: int | None = None) -> "Iterator[Worker]":
    """A started worker, gone with its scratch folder at the end. Raises BenchUnavailable when it does not start.

    Once the descriptor `stop` can be read, or is at its end, whatever the worker is waited for raises Stopped.
    """
    if sys.platform != "linux":
        raise BenchUnavailable(f"kernels are timed by Linux's per-process clocks and this is {sys.platform}: use Linux")
    if find_spec("torch") is None:
        raise BenchUnavailable("kernels are written in torch, which is missing: pip install 'sia-events[model]'")
    program = Path(__file__).with_name("worker.py")
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder, tempfile.TemporaryFile() as stderr:
        # A second limit, for a worker that outlives the judge: what the allowance comes to on a few cores.
        cpu_s = str(math.ceil(4 * allowance_s))
        argv = launch((sys.executable, "-I", "-B", str(program), folder, cpu_s), Path(folder))
        pipe = subprocess.PIPE
        with subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, stderr=stderr, env={}, cwd=folder, start_new_session=True, bufsize=0
        ) as process:
            try:
                yield started(process, stderr, allowance_s, stop)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, SIGKILL)


def started(process: "subprocess.Popen[bytes]", stderr: IO[bytes], allowance_s: float, stop: int | None) -> "Worker":
    try:
        return Worker(process, stderr, allowance_s, stop)
    except Refused as refusal:
        raise BenchUnavailable(f"the worker did not start, nothing was measured: {refusal}") from None


class Worker:
    """A worker that waits for requests. `allowance_s` is the wall time for all it does, start included."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", stderr: IO[bytes], allowance_s: float, stop: int | None
    ) -> None:
        assert process.stdin and process.stdout
        self._process, self._stderr, self._left, self._stop = process, stderr, allowance_s, stop
        self._requests, self._replies = process.stdin.fileno(), process.stdout.fileno()
        self._rests_from = 0
        os.set_blocking(self._requests, False)
        self._header("starting")
        # From here on its filter refuses new processes, so this list stays complete.
        self._pids = processes(process.pid)

    def load(self, source: str) -> None:
        """Import `source`. Raises Refused."""
        self._ask({"do": "load"}, source.encode())
        self._header("being imported")

    def call(self, inputs: Inputs) -> tuple[Array, Cost]:
        """Run the kernel on `inputs`; its output and what that cost. Raises Refused, also when it changed its inputs.

        The clocks run from before the first byte of the request to after the last byte of the reply, so that work
        done early or late is paid for as well.
        """
        body = b"".join(array.tobytes() for array in (*inputs.tensors, *inputs.weights.values()))
        request = {
            "do": "call",
            "tensors": [array.shape for array in inputs.tensors],
            "weights": [(name, array.shape) for name, array in inputs.weights.items()],
            "config": dict(inputs.config),
        }
        self._must_be_silent()
        before = self._instant()
        self._ask(request, body)
        reply = self._header("computing")
        if reply.get("dtype") != "float32":
            raise Refused(f"the output is {printable(reply.get('dtype'))}, not float32")
        if reply.get("shape") != list(inputs.output_shape):
            raise Refused(f"the output has shape {printable(reply.get('shape'))}, not {list(inputs.output_shape)}")
        output = self._read(4 * math.prod(inputs.output_shape), "sending its output")
        spent = cost(before, self._instant())

        self._must_be_silent()
        self._ask({"do": "echo"}, b"")
        self._header("returning its inputs")
        if self._read(len(body), "returning its inputs") != body:
            raise Refused("it changed its inputs")
        self._rests_from = self._instant().cpu
        return np.frombuffer(output, np.float32).reshape(inputs.output_shape), spent

    def require_rest(self) -> None:
        """Raises Refused where it has worked since its last reply: that slows down whoever is timed meanwhile."""
        if self._instant().cpu - self._rests_from > REST_NS:
            raise Refused("it worked while it was asked nothing")

    def _instant(self) -> Instant:
        try:
            return instant(self._pids)
        except OSError:
            raise Refused(self._end("computing")) from None

    def _must_be_silent(self) -> None:
        if polled(self._replies, select.POLLIN, 0.0):
            self._read(1, "waiting for a request")
            raise Refused("it wrote something that was not asked for")

    def _ask(self, header: dict[str, Any], body: bytes) -> None:
        text = json.dumps(header | {"bytes": len(body)}).encode()
        for part in (memoryview(struct.pack(">I", len(text)) + text), memoryview(body)):
            while part:
                self._wait(self._requests, select.POLLOUT, "reading a request")
                try:
                    part = part[os.write(self._requests, part) :]
                except BrokenPipeError:
                    raise Refused(self._end("reading a request")) from None

    def _header(self, doing: str) -> dict[str, Any]:
        length = struct.unpack(">I", self._read(4, doing))[0]
        if length > HEADER_BYTES:
            raise Refused(f"it wrote something else than a reply while {doing}")
        try:
            reply = json.loads(self._read(length, doing))
        except (ValueError, RecursionError):
            raise Refused(f"it wrote something else than a reply while {doing}") from None
        if not isinstance(reply, dict) or reply.get("ok") is not True:
            error = reply.get("error") if isinstance(reply, dict) else reply
            raise Refused(f"it failed while {doing}: {printable(error)}")
        return reply

    def _read(self, size: int, doing: str) -> bytearray:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            self._wait(self._replies, select.POLLIN, doing)
            count = os.readv(self._replies, [view])
            if not count:
                raise Refused(self._end(doing))
            view = view[count:]
        return buffer

    def _wait(self, descriptor: int, event: int, doing: str) -> None:
        start = time.monotonic()
        ready = polled(descriptor, event, max(0.0, self._left), self._stop)
        self._left -= time.monotonic() - start
        if not ready:
            raise Refused(f"the time limit passed while it was {doing}")

    def _end(self, doing: str) -> str:
        """How it ended, when its pipe closed; one that closed the pipe and lives on is ended with the others."""
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return f"it closed its pipe while {doing}"
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - STDERR_BYTES))
        last_words = printable(self._stderr.read().decode(errors="replace"))
        return f"its process ended with status {status} while {doing}" + (f": {last_words}" if last_words else "")


def polled(descriptor: int, event: int, seconds: float, stop: int | None = None) -> bool:
    """Whether `event`, or the end of the pipe, came within `seconds`. Raises Stopped when `stop` can be read."""
    poll = select.poll()
    poll.register(descriptor, event)
    if stop is not None:
        poll.register(stop, select.POLLIN)
    ready = [found for found, _ in poll.poll(1000 * seconds)]
    if stop in ready:
        raise Stopped("the measurement was stopped; nothing came of it")
    return bool(ready)


def printable(text: object) -> str:
    """Text of a candidate without control sequences and of bounded length, for terminals and logs."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in str(text)[-STDERR_BYTES:]).strip()
