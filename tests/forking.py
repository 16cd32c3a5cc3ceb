"""The `sia` command, forked off one process that has imported it: a new interpreter spends a second on its imports.

What is forked is a process with an id, signals and an end of its own. What it has not is a command line and a first
environment of its own to be seen in /proc, nor a say in what was imported: whoever looks at these starts one anew.
"""

import ctypes
import gc
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from threading import Lock

import msgspec

PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37  # prctl(2)
LARGEST = 1 << 17  # bytes of a request
_ONE_AT_A_TIME = Lock()  # the line to the server has one end here
AT_THE_START = ("LD_", "PYTHON")  # how the variables begin that are read when an interpreter starts


class Request(msgspec.Struct):
    """What is to be run; the ends of its stdout and stderr come beside it. `program` is a file, or "" for `sia`."""

    words: Sequence[str]
    env: Mapping[str, str]
    folder: str
    leads: bool
    program: str


class Forked(subprocess.Popen[str]):
    """`python -m sia_events` with these words, under way; where it `leads`, in a session and a group of its own.

    A `program` of the tests is run in its place, which may change what has been imported before it calls that.
    """

    def __init__(self, words: Sequence[str], env: Mapping[str, str], leads: bool = False, program: str = "") -> None:
        late = [name for name in env if name.startswith(AT_THE_START) and env[name] != os.environ.get(name)]
        assert not late, f"{late} would do nothing to what is forked: start an interpreter anew"
        self._request = Request(words, env, os.getcwd(), leads, program)
        (out, self._out), (err, self._err) = os.pipe(), os.pipe()
        super().__init__(words, text=True)
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)

    def _execute_child(self, *_: object) -> None:
        # Popen's own hook. What comes of it is a child of ours, so all that Popen does with a process holds.
        with _ONE_AT_A_TIME, orphans_adopted():
            socket.send_fds(_server().door, [msgspec.json.encode(self._request)], [self._out, self._err])
            forked = _server().door.recv(20)
        assert forked, "the process that forks has ended; its last words stand on stderr"
        self.pid, self._child_created = int(forked), True
        os.close(self._out)
        os.close(self._err)


class Server(msgspec.Struct):
    """The process that forks, and our end of the line to it."""

    process: subprocess.Popen[bytes]
    door: socket.socket


@cache
def _server() -> Server:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, __file__, str(its.fileno())]
        env = {name: value for name, value in os.environ.items() if not name.startswith("SIA_")}
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            command, env={**env, "OMP_NUM_THREADS": "1"}, pass_fds=[its.fileno()], stdin=quiet, stdout=quiet
        )
    return Server(process, ours)


def is_server(pid: int) -> bool:
    """Whether that process is the one that forks: it is there for as long as the tests are."""
    return bool(_server.cache_info().currsize) and pid == _server().process.pid


@contextmanager
def orphans_adopted() -> Iterator[None]:
    """While this lasts, whoever loses its parent and descends from us becomes a child of ours."""
    prctl, before = ctypes.CDLL(None).prctl, ctypes.c_int()
    prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, before.value)


def serve(door: socket.socket) -> None:
    """Fork for every request until the other end is gone; in what was forked, run the command."""
    import sia_events

    # Not the log's engine, which starts when it is imported.
    for module in pkgutil.iter_modules(sia_events.__path__):
        if module.name != "__main__":
            import_module(f"sia_events.{module.name}")
    import_module("sia_events.infra.providers.openai")
    gc.freeze()
    while True:
        body, ends, _, _ = socket.recv_fds(door, LARGEST, 2)
        if not body:
            return
        told, tell = os.pipe()
        between = os.fork()
        if not between:
            if os.fork():
                # It is left an orphan, so that whoever asked for it can adopt it.
                os._exit(0)
            request = msgspec.json.decode(body, type=Request)
            if request.leads:
                os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Told once it is what was asked for: whoever knows it may send it, or its group, a signal.
            os.write(tell, str(os.getpid()).encode())
            for end in (door.detach(), told, tell):
                os.close(end)
            return run(request, ends)
        os.waitpid(between, 0)
        for end in (*ends, tell):
            os.close(end)
        with open(told) as line:
            door.send(line.read().encode())


def run(request: Request, ends: Sequence[int]) -> None:
    """Be `python -m sia_events`, or `python PROGRAM`."""
    for end, number in zip(ends, (1, 2), strict=True):
        os.dup2(end, number)
        os.close(end)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.env)
    sys.argv[1:] = request.words
    sys.path[0] = os.path.dirname(request.program) or request.folder
    if request.program:
        runpy.run_path(request.program, run_name="__main__")
    else:
        runpy.run_module("sia_events", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # A terminal's Ctrl-C is for what was forked; this one ends with whoever asks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))
