"""The first program inside a box: starts the job under its limits and carries 127.0.0.1 to the gateway's socket.

Run by path under a bare `python -I -S`: it sees none of the package. Of `socket`, `signal` and `ctypes` it takes the
modules beneath, because what these do for people takes longer than all else until the job starts.

    relay.py gate=FD lost=FD [unread=FD] [socket=PATH port=N] [cpu=S] [fsize=BYTES] [data=BYTES] [nofile=N] -- ARGV…

The job starts when a byte comes through the descriptor `gate`: whoever started us binds us to the job's limits first.
When `gate` closes, they are gone, or want the end, and every descendant of ours is killed; so it is when the job ends.
We reap those whose parent is gone. `unread` is closed, and was only to be open until now.
One thread and one epoll carry every connection, because a thread per connection would be charged to the job's
process limit. The exit status is the job's, 128 + N when signal N ended it. For each request that the gateway lost, one
byte is written to the descriptor `lost`: a gateway that is down keeps no record of what it did not answer. The job can
not open our descriptors: who tells of a loss is tried again instead of scored. Beyond 256 connections, or as many as
the gateway lets wait, a new one waits for its turn, up to the job's own limits.
"""

import _ctypes  # pyright: ignore[reportMissingImports]
import _signal as signal  # pyright: ignore[reportMissingImports]
import _socket as socket
import os
import resource
import select
import sys

CHUNK = 65536
CONNECTIONS = 256
FULL_S = 0.01
ADDRESS = "127.0.0.1:8080"
REQUESTS = (b"GET ", b"POST ")
# A gateway that broke down over a request; what it refuses, or a provider did not answer, has another status.
BROKEN = (b"HTTP/1.0 500", b"HTTP/1.1 500")
# A stream says so in its head, and has an end of its own (RFC 9112, section 7.1); without it, it broke off.
HEAD_ENDS = b"\r\n\r\n"
STREAM, STREAM_ENDS = b"transfer-encoding: chunked", b"\r\n0\r\n\r\n"
DUMPABLE, SUBREAPER = 4, 36  # PR_SET_DUMPABLE and PR_SET_CHILD_SUBREAPER, linux/prctl.h


class Half:
    """One direction of a connection. It holds one chunk at most, so a slow reader slows its writer.

    The client's is `asking` from a request's first byte to the reply's; the gateway's is `streaming` until the reply's
    last, of which `tail` is what came so far.
    """

    __slots__ = ("asking", "chunk", "ended", "other", "sink", "source", "streaming", "tail")

    other: "Half"

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source, self.sink = source, sink
        self.chunk, self.ended, self.asking = b"", False, False
        self.streaming, self.tail = False, b""

    def fill(self) -> bool:
        """Whether there was something to take from the source, its end included."""
        if self.chunk or self.ended:
            return False
        self.chunk = self.source.recv(CHUNK)
        self.ended = not self.chunk
        return True

    def flush(self) -> None:
        if self.chunk:
            self.chunk = self.chunk[self.sink.send(self.chunk) :]
        elif self.ended:
            self.sink.shutdown(socket.SHUT_WR)

    def offer(self) -> None:
        """Flush what the sink takes. What is wrong with it is told by an event of its own, and charged to that end."""
        try:
            self.flush()
        except OSError:
            return


class Relay:
    """Carries every connection of `listener` to the unix socket at `path`, byte for byte, half-closes included.

    What the gateway loses is told to the descriptor `lost`.
    """

    def __init__(self, poll: select.epoll, listener: socket.socket, path: str, lost: int) -> None:
        self.poll, self.listener, self.path, self.lost = poll, listener, path, lost
        self.halves: dict[int, Half] = {}  # by the descriptor that is read
        self.masks: dict[int, int] = {}
        self.full = False  # the gateway lets nobody more wait; nothing tells when it does again
        listener.setblocking(False)
        self.listen()

    def handle(self, fd: int, events: int) -> None:
        """Move what can be moved for a descriptor that epoll named."""
        if fd == self.listener.fileno():
            self.accept()
        elif half := self.halves.get(fd):
            try:
                if events & ~select.EPOLLOUT and half.fill():
                    self.account(half)
                if events & select.EPOLLOUT:
                    half.other.flush()
            except BlockingIOError:
                pass
            except OSError:
                self.account(half)
                self.close(half)
                return
            half.offer()
            self.settle(half)

    def account(self, half: Half) -> None:
        """Keep track of what was asked, and report what the gateway ended or broke down over before it replied.

        A client that ended first gave up, and is owed nothing.
        """
        if half.source.family != socket.AF_UNIX:
            half.asking = half.chunk.startswith(REQUESTS) or (half.asking and not half.ended)
        elif half.other.asking:
            half.other.asking = False
            # In the head alone: what stands behind it is the model's word, and so may be its agent's.
            half.streaming = STREAM in half.chunk.partition(HEAD_ENDS)[0].lower()
            if not half.chunk or half.chunk.startswith(BROKEN):
                self.lose()
        elif half.streaming and not half.chunk and not half.other.ended:
            half.streaming = False
            self.lose()
        if half.streaming:
            half.tail = (half.tail + half.chunk)[-len(STREAM_ENDS) :]
            half.streaming = half.tail != STREAM_ENDS

    def lose(self) -> None:
        try:
            os.write(self.lost, b".")
        except BlockingIOError:
            return  # beyond what the pipe holds nobody counts

    def accept(self) -> None:
        gateway, gone = socket.socket(socket.AF_UNIX), False
        gateway.setblocking(False)
        try:
            gateway.connect(self.path)
        except BlockingIOError:
            # As many wait for the gateway as it lets: who comes now waits for us, in the listener's own queue.
            gateway.close()
            self.full = True
            self.watch(self.listener.fileno(), 0)
            return
        except OSError:
            gone = True
        try:
            accepted, _ = self.listener._accept()
        except OSError:
            gateway.close()
            return
        client = socket.socket(fileno=accepted)
        if gone:
            # The job sees a closed connection, as it would from a server that is down, and may try again.
            self.lose()
            client.close()
            gateway.close()
            return
        client.setblocking(False)
        there, back = Half(client, gateway), Half(gateway, client)
        there.other, back.other = back, there
        self.halves |= {client.fileno(): there, gateway.fileno(): back}
        self.settle(there)

    def settle(self, half: Half) -> None:
        """Wait for exactly what the connection can use next; close it when both directions have ended."""
        back = half.other
        if half.ended and back.ended and not half.chunk and not back.chunk:
            self.close(half)
            return
        for this in (half, back):
            readable = 0 if this.chunk or this.ended else select.EPOLLIN
            writable = select.EPOLLOUT if this.other.chunk else 0
            self.watch(this.source.fileno(), readable | writable)
        self.listen()

    def listen(self) -> None:
        """Take connections as long as there is room; who comes then waits, and is not lost."""
        room = len(self.halves) < 2 * CONNECTIONS and not self.full
        self.watch(self.listener.fileno(), select.EPOLLIN if room else 0)

    def watch(self, fd: int, mask: int) -> None:
        # A hang-up is reported whatever the mask, for ever, so a descriptor without business is taken out.
        before = self.masks.get(fd, 0)
        if mask and not before:
            self.poll.register(fd, mask)
        elif before and not mask:
            self.poll.unregister(fd)
        elif mask != before:
            self.poll.modify(fd, mask)
        self.masks[fd] = mask

    def close(self, half: Half) -> None:
        for end in (half.source, half.sink):
            self.watch(end.fileno(), 0)
            del self.halves[end.fileno()], self.masks[end.fileno()]
            end.close()
        self.listen()


def start(argv: list[str], options: dict[str, str]) -> int:
    """Start the job with its limits on; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        # Python ignores these two, and what is ignored stays ignored across exec.
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for name in ("fsize", "data", "nofile"):
            if value := options.get(name):
                resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (int(value), int(value)))
        if "cpu" in options:
            # The soft limit's SIGXCPU names the limit; the hard one is for a job that ignores it.
            resource.setrlimit(resource.RLIMIT_CPU, (int(options["cpu"]), int(options["cpu"]) + 1))
        os.execvp(argv[0], argv)
    except (OSError, ValueError) as error:
        os.write(2, f"cannot start {argv[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def prctl(option: int, value: int) -> None:
    if _ctypes.call_function(_ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl"), (option, value, 0, 0, 0)):
        raise OSError(f"prctl({option}, {value}) failed")


class Reaper:
    """Takes the dead from the kernel, the orphans that became ours too, and keeps the exit status of the `job`."""

    def __init__(self, job: int) -> None:
        self.job, self.code = job, 128 + signal.SIGKILL
        signal.signal(signal.SIGCHLD, self.reap)
        self.reap()

    def reap(self, *_: object) -> None:
        try:
            while pid := (dead := os.waitpid(-1, os.WNOHANG))[0]:
                if pid == self.job:
                    code = os.waitstatus_to_exitcode(dead[1])
                    self.code = code if code >= 0 else 128 - code
        except ChildProcessError:
            return


def end_descendants() -> None:
    """Kill children until there are none; grandchildren become children as their parents die."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            for pid in children.read().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main(words: list[str]) -> int:
    split = words.index("--")
    options, argv = dict(word.split("=", 1) for word in words[:split]), words[split + 1 :]
    # Whoever is of our user could trace us, or open what we have open under /proc; exec lets the job have it again.
    prctl(DUMPABLE, 0)
    poll = select.epoll()
    relay = None
    lost = int(options["lost"])
    os.set_inheritable(lost, False)
    os.set_blocking(lost, False)
    if "socket" in options:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(options["port"])))
        listener.listen(CONNECTIONS)
        relay = Relay(poll, listener, options["socket"], lost)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        for name, value in os.environ.items():
            os.environ[name] = value.replace(ADDRESS, address)
    # bubblewrap adds it, and a job's environment is what was asked for.
    os.environ.pop("PWD", None)
    if "unread" in options:
        os.close(int(options["unread"]))
    gate = int(options["gate"])
    os.set_inheritable(gate, False)
    # Of every descendant that loses its parent we become it, so that none is out of reach at the end.
    prctl(SUBREAPER, 1)
    if not os.read(gate, 1):
        return 1
    poll.register(gate, select.EPOLLIN)
    child = start(argv, options)
    done = os.pidfd_open(child)
    poll.register(done, select.EPOLLIN)
    reaper = Reaper(child)
    while True:
        ready = poll.poll(FULL_S if relay and relay.full else None)
        if relay and relay.full:
            relay.full = False
            relay.listen()
        for fd, events in ready:
            if fd in (done, gate):
                reaper.reap()
                if os.getpid() != 1:
                    # The first process of a box takes all others along, and the kernel is quicker.
                    end_descendants()
                return reaper.code
            if relay:
                relay.handle(fd, events)


if __name__ == "__main__":
    # Without the interpreter's tidying up: somebody waits for the end of the box.
    os._exit(main(sys.argv[1:]))
