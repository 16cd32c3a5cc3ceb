"""Each test tries one way a job could do harm, or one thing it must be able to do."""

import asyncio
import contextlib
import http.server
import os
import resource
import shutil
import signal
import socket
import socketserver
import stat
import sys
import sysconfig
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from command import adopting, assert_none_left

import sia_events.shared
from sia_events.infra.box import kernel_box, masks
from sia_events.infra.limits import find_controllers, sweep
from sia_events.infra.sandbox import Bubblewrap, UnsafeProcess, binary, check, limits_applied
from sia_events.shared.ports import Job, Limits, Outcome, Sandbox, SandboxUnavailable

pytestmark = pytest.mark.skipif(check() is not None, reason=str(check()))

BOTH = pytest.mark.parametrize("box", [Bubblewrap(), UnsafeProcess()], ids=["bubblewrap", "process"])
# Control groups where this machine has them, and the watcher that stands in for them elsewhere.
MEANS = pytest.mark.parametrize("box", [Bubblewrap(), Bubblewrap(controllers={})], ids=["groups", "watched"])
SMALL = Limits(wall_s=10.0, cpu_s=10.0, memory_mb=128, processes=32, file_mb=8, open_files=64, output_bytes=20_000)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (folder := tmp_path / "work").mkdir()
    return folder


def python(work: Path, code: str, limits: Limits = SMALL, **more: object) -> Job:
    """A job that runs `code` as a target agent is run."""
    harness = work.parent / "harness"
    harness.mkdir(exist_ok=True)
    (harness / "target_agent.py").write_text(textwrap.dedent(code))
    argv = ("python", "/harness/target_agent.py", "--working_dir", "/work")
    return Job(argv, work, reads={"/harness": harness, **more.pop("reads", {})}, limits=limits, **more)  # type: ignore[dict-item,arg-type]


def limits(**changed: float) -> Limits:
    return Limits(**{**vars(SMALL), **changed})  # type: ignore[arg-type]


class Gateway(http.server.BaseHTTPRequestHandler):
    """Echoes a posted body, or streams ten numbered lines."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(10):
            self.wfile.write(b"7\r\nline %d\n\r\n" % number)
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def address_string(self) -> str:
        return "box"

    def log_message(self, format: str, *args: object) -> None:
        pass


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "gateway.sock"
    with UnixServer(str(path), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield path
        server.shutdown()
        thread.join()


# A grandchild in a session of its own, whose parent is gone, holding a connection to the bell.
DAEMON = """
import os, socket, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        bell = socket.socket(socket.AF_UNIX)
        bell.connect(os.environ["BELL"])
        bell.send(b"x")
        time.sleep(1000)
    os._exit(0)
os.wait()
"""


def daemon(work: Path, bell: socket.socket, box: object, tail: str, wall_s: float = 30.0) -> Job:
    path = Path(bell.getsockname())
    inside = "/run/gateway.sock" if isinstance(box, Bubblewrap) else str(path)
    return python(work, DAEMON + tail, limits(wall_s=wall_s), socket=path, env={"BELL": inside})


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


async def rung(bell: socket.socket) -> socket.socket:
    connection, _ = await asyncio.to_thread(bell.accept)
    connection.settimeout(20)
    assert await asyncio.to_thread(connection.recv, 1) == b"x"
    return connection


async def platform(box: Sandbox, job: Job, code: str) -> asyncio.subprocess.Process:
    """Another process that runs `code`, in which `box` and `job` are these."""
    head = """
import asyncio, os, signal, threading
from pathlib import Path, PosixPath
from sia_events.infra.sandbox import Bubblewrap, UnsafeProcess
from sia_events.shared.ports import Job, Limits
"""
    values = f"box, job = {type(box).__name__}(), {job!r}\n"
    return await asyncio.create_subprocess_exec(sys.executable, "-c", head + values + code)


# --- what every sandbox does -----------------------------------------------------------------------------------------


@BOTH
async def test_a_job_runs_in_its_work_folder_and_its_output_and_files_come_back(box: Sandbox, work: Path):
    code = "import sys; print('hi'); print('oh', file=sys.stderr); open('answers', 'w').write('42')"
    outcome = await box.run(python(work, code))
    assert outcome == Outcome("ok", 0, b"hi\n", b"oh\n", False, outcome.seconds)
    assert (work / "answers").read_text() == "42"


@BOTH
async def test_a_job_that_fails_is_a_crash_with_its_exit_code_and_its_last_words(box: Sandbox, work: Path):
    outcome = await box.run(python(work, "raise ValueError('no idea')"))
    assert (outcome.status, outcome.exit_code) == ("crash", 1)
    assert b"ValueError: no idea" in outcome.stderr


@BOTH
async def test_a_job_that_a_signal_ends_is_a_crash_with_128_and_the_signal(box: Sandbox, work: Path):
    outcome = await box.run(python(work, "import os; os.kill(os.getpid(), 11)"))
    assert (outcome.status, outcome.exit_code) == ("crash", 128 + signal.SIGSEGV)


@BOTH
async def test_a_program_that_is_not_there_is_a_crash_that_names_it(box: Sandbox, work: Path):
    outcome = await box.run(Job(("no-such-program",), work))
    assert (outcome.status, outcome.exit_code) == ("crash", 127)
    assert b"no-such-program" in outcome.stderr


@BOTH
async def test_a_job_sees_its_own_environment_and_no_other_variable(box: Sandbox, work: Path):
    code = "import os; print(sorted(os.environ), os.environ['SIA_MODEL'])"
    outcome = await box.run(python(work, code, env={"SIA_MODEL": "m1"}))
    assert outcome.stdout == b"['HOME', 'LANG', 'PATH', 'SIA_MODEL'] m1\n"


@BOTH
async def test_a_job_reads_the_data_it_was_given(box: Sandbox, work: Path, tmp_path: Path):
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "items").write_text("a b c")
    job = python(work, "import sys; print(open(sys.argv[1] + '/items').read())", reads={"/data": tmp_path / "public"})
    outcome = await box.run(Job((*job.argv[:2], "/data"), work, reads=job.reads))
    assert outcome.stdout == b"a b c\n"


@BOTH
async def test_the_deadline_ends_a_job_that_goes_on(box: Sandbox, work: Path):
    code = "import time; print('started', flush=True); time.sleep(1000)"
    outcome = await box.run(python(work, code, limits(wall_s=0.6)))
    assert (outcome.status, outcome.exit_code, outcome.stdout) == ("timeout", None, b"started\n")
    assert 0.6 <= outcome.seconds < 3


@BOTH
async def test_cpu_time_counts_over_all_processes_of_a_job(box: Sandbox, work: Path):
    outcome = await box.run(python(work, "import os\nos.fork(); os.fork()\nwhile True: pass", limits(cpu_s=1)))
    assert outcome.status == "cpu"


@BOTH
async def test_a_flood_of_output_is_cut_and_costs_us_next_to_nothing(box: Sandbox, work: Path):
    before, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    outcome = await box.run(python(work, "while True: print('x' * 100_000)", limits(wall_s=1.5)))
    assert (outcome.status, outcome.truncated, len(outcome.stdout)) == ("timeout", True, 20_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000
    assert time.process_time() - cpu < 0.4


@BOTH
async def test_the_relay_carries_64_requests_at_once_and_streams(box: Sandbox, work: Path, gateway: Path):
    code = """
        import os, threading, urllib.request
        from concurrent.futures import ThreadPoolExecutor
        url, meet = os.environ["OPENAI_BASE_URL"], threading.Barrier(64)
        def call(number):
            body = bytes([number]) * (1_000_000 if number < 4 else 2_000)
            meet.wait()
            return urllib.request.urlopen(url, data=body).read() == body
        with ThreadPoolExecutor(64) as pool:
            print(all(pool.map(call, range(64))))
        with urllib.request.urlopen(url) as stream:
            print(sum(1 for line in stream))
    """
    env = {"OPENAI_BASE_URL": "http://127.0.0.1:8080/v1"}
    outcome = await box.run(python(work, code, limits(processes=80, open_files=256), socket=gateway, env=env))
    assert (outcome.status, outcome.stdout) == ("ok", b"True\n10\n"), outcome


@contextlib.contextmanager
def serving(path: Path, answer: Callable[[socket.socket], object] | None) -> Iterator[None]:
    """A gateway that does `answer` with each connection and closes it; None: nobody listens any more."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if answer:
                answer(self.request)

    with UnixServer(str(path), Answer) as server:
        if answer is None:
            server.server_close()
            yield
            return
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield
        server.shutdown()
        thread.join()


def replying(replies: bytes) -> Callable[[socket.socket], object]:
    return lambda connection: (connection.recv(65536), connection.sendall(replies))


def read_to_the_end(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


# An agent that swallows whatever its model call ends with.
SWALLOWING = """
    import os, urllib.request
    for _ in range(2):
        try: print(urllib.request.urlopen(os.environ["OPENAI_BASE_URL"], data=b"{}").status)
        except OSError: pass
"""


@BOTH
@pytest.mark.parametrize(
    ("replies", "lost"),
    [
        (None, 2),
        (b"", 2),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\n", 2),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", 0),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", 0),
        (b"HTTP/1.1 200 OK\r\n\r\n", 0),
    ],
    ids=["not there", "no reply", "500", "502", "404", "200"],
)
async def test_requests_that_the_gateway_lost_are_counted_outside_the_job(
    box: Sandbox, work: Path, tmp_path: Path, replies: bytes | None, lost: int
):
    with serving(path := tmp_path / "gateway.sock", None if replies is None else replying(replies)):
        env = {"OPENAI_BASE_URL": "http://127.0.0.1:8080/v1"}
        outcome = await box.run(python(work, SWALLOWING, socket=path, env=env))
    assert (outcome.status, outcome.lost_connections) == ("ok", lost), outcome


@BOTH
async def test_what_is_lost_before_the_deadline_is_counted_too(box: Sandbox, work: Path, tmp_path: Path):
    with serving(path := tmp_path / "gateway.sock", None):
        code = textwrap.dedent(SWALLOWING) + "import time; time.sleep(1000)"
        env = {"OPENAI_BASE_URL": "http://127.0.0.1:8080/v1"}
        outcome = await box.run(python(work, code, limits(wall_s=1.5), socket=path, env=env))
    assert (outcome.status, outcome.lost_connections) == ("timeout", 2)


@BOTH
async def test_a_request_that_the_job_gave_up_or_never_made_is_not_lost(box: Sandbox, work: Path, tmp_path: Path):
    code = """
        import os, socket, struct
        port = int(os.environ["URL"].rpartition(":")[2])
        for words in b"", b"POST / HTTP/1.1", b"bytes":
            for linger in (0, 0), (1, 0):
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(words)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", *linger))
    """
    with serving(path := tmp_path / "gateway.sock", read_to_the_end):
        outcome = await box.run(python(work, code, socket=path, env={"URL": "http://127.0.0.1:8080"}))
    assert (outcome.status, outcome.lost_connections) == ("ok", 0), outcome


@BOTH
async def test_a_daemon_ends_with_its_job(box: Sandbox, work: Path, bell: socket.socket):
    running = asyncio.create_task(box.run(daemon(work, bell, box, "")))
    with await rung(bell) as connection:
        assert (await running).status == "ok"
        connection.settimeout(0)
        assert connection.recv(1) == b""


@BOTH
async def test_a_daemon_ends_at_the_deadline(box: Sandbox, work: Path, bell: socket.socket):
    running = asyncio.create_task(box.run(daemon(work, bell, box, "time.sleep(1000)", wall_s=2.0)))
    with await rung(bell) as connection:
        assert (await running).status == "timeout"
        connection.settimeout(0)
        assert connection.recv(1) == b""


@BOTH
async def test_cancelling_ends_the_whole_tree(box: Sandbox, work: Path, bell: socket.socket):
    running = asyncio.create_task(box.run(daemon(work, bell, box, "time.sleep(1000)")))
    with await rung(bell) as connection:
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        connection.settimeout(0)
        assert connection.recv(1) == b""


@BOTH
async def test_a_start_that_is_cancelled_at_any_moment_ends_and_leaves_no_process(box: Sandbox, work: Path):
    others = set((this := psutil.Process()).children(recursive=True))
    for late in range(40):
        running = asyncio.create_task(box.run(python(work, "pass")))
        await asyncio.sleep(late / 4000)
        running.cancel()
        async with asyncio.timeout(20):
            with pytest.raises(asyncio.CancelledError):
                await running
        assert set(this.children(recursive=True)) <= others


@BOTH
async def test_killing_the_platform_leaves_no_process(box: Sandbox, work: Path, bell: socket.socket):
    process = await platform(box, daemon(work, bell, box, "time.sleep(1000)"), "asyncio.run(box.run(job))")
    with await rung(bell) as connection:
        process.kill()
        assert await asyncio.to_thread(connection.recv, 1) == b""
    await process.wait()


@BOTH
async def test_a_platform_killed_at_any_moment_of_a_start_leaves_no_process(box: Sandbox, work: Path):
    code = """
for late in range(60):
    if not (forked := os.fork()):
        threading.Timer(late / 4000, os.kill, (os.getpid(), signal.SIGKILL)).start()
        asyncio.run(box.run(job))
    os.waitpid(forked, 0)
"""
    with adopting() as children:
        process = await platform(box, python(work, "import time; time.sleep(1000)"), code)
        assert await process.wait() == 0
        await asyncio.to_thread(assert_none_left, children)


async def test_a_job_that_stops_or_kills_its_boxs_first_process_does_not_outlive_the_platform(
    work: Path, bell: socket.socket
):
    tail = "import signal; os.kill(1, signal.SIGSTOP); os.kill(1, signal.SIGKILL); time.sleep(1000)"
    process = await platform(box := Bubblewrap(), daemon(work, bell, box, tail), "asyncio.run(box.run(job))")
    with await rung(bell) as connection:
        process.kill()
        assert await asyncio.to_thread(connection.recv, 1) == b""
    await process.wait()


@BOTH
async def test_orphans_do_not_pile_up(box: Sandbox, work: Path):
    code = """
        import os
        for _ in range(60):
            if not os.fork():
                if not os.fork(): os._exit(0)
                os._exit(0)
            os.wait()
        print("done")
    """
    outcome = await box.run(python(work, code, limits(processes=8)))
    assert (outcome.status, outcome.stdout) == ("ok", b"done\n")


@BOTH
async def test_a_path_that_is_not_there_is_named_before_anything_runs(box: Sandbox, work: Path):
    with pytest.raises(FileNotFoundError, match="no-data"):
        await box.run(python(work, "", reads={"/data": work / "no-data"}))


# --- what a hostile job finds in the box -----------------------------------------------------------------------------


async def report(work: Path, code: str, box: Sandbox | None = None, **more: object) -> str:
    """What a job that must run to its end had to say."""
    outcome = await (box or Bubblewrap()).run(python(work, code, **more))  # type: ignore[arg-type]
    assert outcome.status == "ok", outcome
    return outcome.stdout.decode()


async def test_no_file_of_the_host_can_be_read(work: Path, tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "canary-4711").write_text("answer")
    places = [home / "canary-4711", *map(Path, (sia_events.shared.__file__, pytest.__file__, __file__, "/etc/passwd"))]
    code = f"""
        import os, sys
        for place in {[str(place) for place in places]} + ["/proc/1/root" + {str(home)!r}]:
            if os.path.exists(place): print("there:", place)
        for folder, folders, files in os.walk("/"):
            if folder == "/proc": folders.clear()
            if "canary-4711" in files or "sia_events" in folders: print("found in", folder)
        try: import sia_events; print("imported")
        except ImportError: pass
    """
    box = Bubblewrap(hidden=(home,))
    assert await report(work, code, box, limits=limits(cpu_s=60, wall_s=60)) == ""


async def test_a_hidden_folder_inside_the_runtime_is_empty_and_cannot_be_filled(work: Path):
    hidden = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix})) / "json"
    code = f"""
        import os
        print(os.listdir({str(hidden)!r}))
        try: open({str(hidden)!r} + "/__init__.py", "w")
        except OSError: print("shut")
    """
    assert await report(work, code, Bubblewrap(hidden=(hidden,))) == "[]\nshut\n"


def test_masks_are_the_outermost_hidden_folders_that_can_be_seen(tmp_path: Path):
    for name in ("runtime/venv/lib", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    hidden = [tmp_path / name for name in ("runtime/venv/lib", "runtime/venv", "elsewhere", "not-there")]
    assert masks([tmp_path / "runtime"], hidden) == [tmp_path / "runtime/venv"]


async def test_of_the_hosts_data_folders_only_the_time_zones_show(work: Path):
    # Debian keeps the corpora that the answers of a task may be made of in /usr/share, and NLTK in all of these.
    code = """
        import os, zoneinfo
        print([name for name in os.listdir("/usr/share") if name != "zoneinfo"])
        print(set(os.listdir("/usr")) & {"local", "src", "include", "games", "doc"})
        for folder, folders, files in os.walk("/"):
            if folder == "/proc": folders.clear()
            if {"data.noun", "index.sense"} & set(files): print("a corpus in", folder)
            if "nltk_data" in folders and os.listdir(folder + "/nltk_data"): print("corpora in", folder)
        assert os.system("ls / > /tmp/listing && sort /tmp/listing | grep -q work") == 0
    """
    assert await report(work, code, limits=limits(cpu_s=60, wall_s=60)) == "[]\nset()\n"


async def test_a_kernel_worker_sees_its_packages_but_no_hidden_folder(tmp_path: Path):
    hidden = Path(pytest.__file__).parent
    program, scratch = tmp_path / "program/worker.py", tmp_path / "home/scratch"
    program.parent.mkdir()
    scratch.mkdir(parents=True)
    (tmp_path / "home/answers").write_text("canary")
    program.write_text(
        f"import os, numpy; open('mine', 'w').close(); print(os.listdir({str(hidden)!r}), os.listdir('..'))"
    )
    command = kernel_box(binary(), (sys.executable, str(program)), scratch, (hidden, tmp_path / "home"))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert (await process.communicate())[0] == b"[] ['scratch']\n"
    assert (scratch / "mine").exists()


async def test_nothing_but_the_work_folder_and_scratch_can_be_written(work: Path):
    code = """
        import os
        for folder in "/", "/usr", "/harness", "/run", "/run/bin", "/dev", "/etc", os.path.dirname(os.__file__):
            try: open(folder + "/planted", "w"); print("wrote in", folder)
            except OSError: pass
        sysctls = "/proc/sys/kernel/core_pattern", "/proc/sys/vm/panic_on_oom"
        for file in "/harness/target_agent.py", "/run/relay.py", os.__file__, *sysctls:
            try: os.close(os.open(file, os.O_WRONLY)); print("opened", file)
            except OSError: pass
        for folder in "/work", "/tmp", "/dev/shm":
            open(folder + "/mine", "w").write("ok")
    """
    assert await report(work, code) == ""


async def test_no_network_is_reached(work: Path):
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        udp.bind(("127.0.0.1", 0))
        abstract.bind(f"\0sia-{os.getpid()}")
        abstract.listen()
        for listener in (tcp, udp, abstract):
            listener.setblocking(False)
        code = f"""
            import socket
            def attempt(name, action):
                try: action(); print("reached", name)
                except OSError: pass
            attempt("tcp", lambda: socket.create_connection(("127.0.0.1", {tcp.getsockname()[1]}), 1))
            attempt("metadata", lambda: socket.create_connection(("169.254.169.254", 80), 1))
            attempt("ipv6", lambda: socket.create_connection(("2606:4700::1111", 53), 1))
            attempt("dns", lambda: socket.getaddrinfo("example.org", 80))
            attempt("udp out", lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 9)))
            attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect("\\0sia-{os.getpid()}"))
            try: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", {udp.getsockname()!r})
            except OSError: pass
        """
        assert await report(work, code) == ""
        for receive in (tcp.accept, lambda: udp.recv(1), abstract.accept):
            with pytest.raises(BlockingIOError):
                receive()


async def test_the_platforms_environment_arguments_and_files_do_not_show(work: Path, tmp_path: Path):
    # The environment of a running process as procfs shows it is the one it was started with.
    secret = tmp_path / "secret"
    secret.write_text("canary-in-file")
    job = python(
        work,
        """
        import os
        for pid in filter(str.isdigit, os.listdir("/proc")):
            for name in "environ", "cmdline":
                try: print(open(f"/proc/{pid}/{name}").read())
                except PermissionError: print(pid, "is shut")
            if pid == str(os.getpid()):
                for fd in map(int, os.listdir(f"/proc/{pid}/fd")):
                    try: print("descriptor", fd, os.readlink(f"/proc/{pid}/fd/{fd}"))
                    except OSError: pass
        """,
    )
    platform = f"""
import asyncio, os
from pathlib import PosixPath
from sia_events.infra.sandbox import Bubblewrap
from sia_events.shared.ports import Job, Limits
os.set_inheritable(os.open({str(secret)!r}, os.O_RDONLY), True)
print(asyncio.run(Bubblewrap().run({job!r})).stdout.decode())
"""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", platform, "canary-in-argv"),
        env={**os.environ, "KEY": "canary-in-env"},
        stdout=asyncio.subprocess.PIPE,
    )
    seen = (await process.communicate())[0].decode()
    assert "target_agent.py" in seen
    assert "canary" not in seen
    assert str(tmp_path) not in seen
    assert sysconfig.get_path("purelib") not in seen
    assert {line.split()[1] for line in seen.splitlines() if line.startswith("descriptor")} <= {"0", "1", "2"}


async def test_no_other_process_is_seen_or_hit(work: Path):
    victim = await asyncio.create_subprocess_exec("sleep", "1000")
    code = f"""
        import os, socket
        print(len([pid for pid in os.listdir("/proc") if pid.isdigit()]), socket.gethostname())
        try: os.kill({victim.pid}, 9)
        except OSError: pass
    """
    try:
        assert await report(work, code) == "2 box\n"
        assert victim.returncode is None
    finally:
        victim.kill()
        await victim.wait()


async def test_no_namespace_mount_or_capability_can_be_had(work: Path):
    code = """
        import ctypes
        libc = ctypes.CDLL(None)
        newuser, newnet, newns = 0x10000000, 0x40000000, 0x00020000
        print([libc.unshare(flag) for flag in (newuser, newnet, newns, newuser | newns)])
        print(libc.mount(b"none", b"/work", b"tmpfs", 0, None), libc.mount(None, b"/proc", None, 0x20, None))
        status = dict(line.split(":") for line in open("/proc/self/status") if "\\t" in line)
        print({status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd")}, status["NoNewPrivs"].strip())
    """
    assert await report(work, code) == "[-1, -1, -1, -1]\n-1 -1\n{'0000000000000000'} 1\n"


@MEANS
async def test_a_fork_bomb_ends_the_job(box: Sandbox, work: Path):
    code = """
        import os, time
        for _ in range(200):
            try:
                if os.fork() == 0: time.sleep(1000)
            except OSError: pass
        time.sleep(1000)
    """
    outcome = await box.run(python(work, code))
    assert outcome.status == "processes"
    assert outcome.seconds < 5


@MEANS
async def test_a_memory_bomb_ends_the_job_even_spread_over_processes(box: Sandbox, work: Path):
    code = """
        import os, time
        os.fork(); os.fork()
        held = []
        for _ in range(60): held.append(b"x" * 1_000_000); time.sleep(0.002)
        time.sleep(1000)
    """
    outcome = await box.run(python(work, code))
    assert outcome.status == "memory"
    assert outcome.seconds < 8


@pytest.mark.parametrize(
    "bomb",
    [
        "with open('big', 'wb') as file:\n    for _ in range(100): file.write(bytes(1 << 20)); file.flush()",
        "for n in range(100): open(str(n), 'wb').write(bytes(1 << 20)); time.sleep(0.02)",
        "for n in range(10_000): open(str(n), 'w')",
        "held = [open(str(n), 'wb', 0) for n in range(20)]\nfor f in held: os.unlink(f.name); f.write(bytes(1 << 20))",
        "os.mkdir('d'); [open('d/' + str(n), 'wb').write(bytes(1 << 20)) for n in range(12)]; os.chmod('d', 0)",
        "for _ in range(20): os.mkdir('d' * 250); os.chdir('d' * 250)",
    ],
    ids=["one file", "many files", "empty files", "deleted files", "shut folder", "folder out of reach"],
)
async def test_a_disk_bomb_ends_the_job(work: Path, bomb: str):
    outcome = await Bubblewrap().run(python(work, f"import os, time\n{bomb}\ntime.sleep(1000)"))
    assert outcome.status in ("disk", "crash") and outcome.seconds < 8
    assert outcome.status == "disk" or b"File too large" in outcome.stderr
    held = sum(file.stat().st_size for file in files(work) if file.is_file())
    # Watching every 50 ms lets a fast writer pass the limit of 8 MiB, but not by much.
    assert held < 100 << 20


async def test_scratch_in_memory_has_a_size(work: Path):
    code = """
        for place in "/tmp/x", "/dev/shm/x":
            try:
                for number in range(12): open(place + str(number), "wb").write(bytes(1 << 20))
                print("no end of", place)
            except OSError: pass
    """
    assert await report(work, code) == ""


async def test_open_files_are_limited_and_no_core_is_dumped(work: Path):
    code = """
        import resource
        print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE))
        try: held = [open("/dev/null") for _ in range(100)]
        except OSError: print("shut")
    """
    assert await report(work, code) == "(64, 64) (0, 0)\nshut\n"


async def test_what_is_left_in_the_work_folder_cannot_lead_or_hang_or_become_its_reader(work: Path):
    code = """
        import os, socket
        os.symlink("/etc/shadow", "answers.jsonl"); os.symlink("/", "root"); os.mkfifo("pipe")
        socket.socket(socket.AF_UNIX).bind("sock")
        open("program", "w").write("x"); os.chmod("program", 0o6777)
        os.makedirs("shut/inner"); open("shut/inner/kept", "w"); os.chmod("shut/inner/kept", 0); os.chmod("shut", 0o500)
        for _ in range(100): os.mkdir("d"); os.chdir("d")
    """
    await report(work, code)
    left = [str(path.relative_to(work)) for path in files(work) if path.name != "d"]
    assert left == ["program", "shut", "shut/inner", "shut/inner/kept"]
    assert stat.S_IMODE((work / "program").stat().st_mode) == 0o777
    assert (work / "shut/inner/kept").read_text() == ""
    shutil.rmtree(work)


async def test_a_box_that_cannot_be_built_is_not_the_jobs_crash(work: Path):
    with pytest.raises(SandboxUnavailable, match="bubblewrap cannot build a box here: bwrap:"):
        await Bubblewrap().run(python(work, "", reads={"/usr/bin/not-there/data": work}))


async def test_no_control_group_is_left(work: Path):
    await Bubblewrap().run(python(work, "pass"))
    # Whoever removes them is waited for here, and by nobody else.
    await asyncio.get_running_loop().shutdown_default_executor()
    for parent in find_controllers().values():
        assert not list(parent.glob(f"sia-{os.getpid()}-*"))


def test_groups_of_the_dead_are_swept_and_those_of_others_left_alone(tmp_path: Path):
    names = {"sia-999999999-0", f"sia-{os.getpid()}-0", "sia-run-x", "sia-999999999-x", "sia-²-0"}
    for name in names:
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names - {"sia-999999999-0"}


def test_every_limit_says_how_it_is_held():
    assert set(limits_applied()) == set(vars(SMALL))
