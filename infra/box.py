"""What the inside of a box is made of, as bubblewrap's options: runtime, masks, scratch, and what the job names."""

import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from sia_events.shared.ports import Job, Limits

RELAY = Path(__file__).with_name("relay.py")
PYTHON = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
PREFIX = Path(sys.base_prefix).resolve()
PROGRAMS, LIBRARIES = ("bin", "sbin", "libexec"), ("lib", "lib32", "lib64", "libx32")
RUNTIME = (
    *(f"{top}/{name}" for top in ("", "/usr") for name in (*PROGRAMS, *LIBRARIES)),
    *("/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/alternatives"),
)
PYTHON_INSIDE, RELAY_INSIDE, SOCKET_INSIDE = "/run/bin/python", "/run/relay.py", "/run/gateway.sock"


def box(hidden: Sequence[Path], limits: Limits) -> Iterator[str]:
    """bubblewrap's options for the empty box: namespaces, runtime, masks and scratch; read-only but for the scratch.

    Not --die-with-parent: it may kill bubblewrap before it has told its child to go on, and that one then waits for
    ever. The relay ends with whoever started the box, and as the first process inside it takes all others along; no
    other can stop or kill it (pid_namespaces(7)).
    """
    yield from ("--unshare-user", "--unshare-all", "--disable-userns", "--cap-drop", "ALL", "--as-pid-1")
    yield from ("--new-session", "--hostname", "box", "--uid", "1000", "--gid", "1000")
    for path in RUNTIME:
        if os.path.islink(path):
            yield from ("--symlink", os.readlink(path), path)
    bound = runtime()
    for path in bound:
        yield from ("--ro-bind", str(path), str(path))
    for path in masks(bound, [*hidden, *own_folders()]):
        yield from ("--size", "4096", "--tmpfs", str(path), "--remount-ro", str(path))
    # Read-only /proc, because to host root its sysctls are writable, capabilities or not: core_pattern is a way out.
    yield from ("--proc", "/proc", "--remount-ro", "/proc")
    scratch = str(limits.file_mb << 20)
    yield from ("--dev", "/dev", "--size", scratch, "--tmpfs", "/dev/shm", "--remount-ro", "/dev")
    yield from ("--size", scratch, "--tmpfs", "/tmp")
    for name in ("python", "python3"):
        yield from ("--symlink", str(PYTHON), f"/run/bin/{name}")
    yield from ("--ro-bind", str(RELAY), RELAY_INSIDE)


def contents(job: Job) -> Iterator[str]:
    """bubblewrap's options for what one job finds in its box."""
    for inside, path in job.reads.items():
        yield from ("--ro-bind", str(path.resolve()), inside)
    if job.socket:
        yield from ("--ro-bind", str(job.socket.resolve()), SOCKET_INSIDE)
    yield from ("--bind", str(job.work.resolve()), "/work", "--chdir", "/work", "--remount-ro", "/")
    for name, value in environment(job, "/run/bin").items():
        yield from ("--setenv", name, value)


@cache
def runtime() -> tuple[Path, ...]:
    """The host's programs and libraries and this interpreter's, outermost folders only.

    Not all of /usr nor all of the interpreter's prefix: their data folders may hold what a task's answers were made
    of, such as Debian's /usr/share/wordnet.
    """
    found = [Path(path) for path in RUNTIME if os.path.exists(path) and not os.path.islink(path)]
    for path in (PYTHON.parent, *(PREFIX / name for name in LIBRARIES)):
        if path.is_dir() and not any(path.resolve().is_relative_to(folder) for folder in found):
            found.append(path)
    return tuple(found)


def masks(bound: Sequence[Path], hidden: Sequence[Path]) -> list[Path]:
    """Those of the `hidden` folders that can be seen through the `bound` ones, the outermost of each nest."""
    folders = {path.resolve() for path in hidden if path.is_dir()}
    seen = {path for path in folders if any(path.is_relative_to(folder) for folder in bound)}
    return sorted(path for path in seen if not seen.intersection(path.parents))


@cache
def own_folders() -> tuple[Path, ...]:
    """Where this package and its environment live: it carries private data, and a job gets the bare interpreter.

    So do the places beside libraries where NLTK looks for corpora (nltk.data, "Data path").
    """
    found = [RELAY.parents[1], *(Path(prefix) / "lib/nltk_data" for prefix in ("/usr", PREFIX))]
    if sys.prefix != sys.base_prefix:
        found.append(Path(sys.prefix))
    for variables in ({}, {"base": sys.base_prefix, "platbase": sys.base_prefix}):
        found += [Path(sysconfig.get_path(name, vars=variables)) for name in ("purelib", "platlib")]
    return tuple(found)


def environment(job: Job, programs: str) -> dict[str, str]:
    return {"PATH": f"{programs}:/usr/bin:/bin", "HOME": "/work", "LANG": "C.UTF-8", **job.env}


def kernel_box(bwrap: str, argv: Sequence[str], scratch: Path, hidden: Sequence[Path] = ()) -> list[str]:
    """A command line that has `bwrap` run a kernel worker: this environment's packages to read, `scratch` to write.

    Unlike a job of the sandbox it sees the installed packages, since a kernel needs torch; this package, which
    carries private data and kernels of its own, is masked but for the worker's program, and so are the `hidden` folders
    but for `scratch`.
    """
    program = next(Path(word) for word in argv if word.endswith(".py"))
    bound = [*(Path(path) for path in RUNTIME if os.path.islink(path)), *runtime(), Path(sys.prefix)]
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    options += ["--tmpfs", "/tmp"]
    for path in bound:
        options += ["--ro-bind", str(path), str(path)]
    for path in masks(bound, [*hidden, RELAY.parents[1]]):
        options += ["--tmpfs", str(path)]
    options += ["--ro-bind", str(program), str(program), "--proc", "/proc", "--remount-ro", "/proc"]
    options += ["--dev", "/dev", "--bind", str(scratch), str(scratch), "--chdir", str(scratch)]
    return [bwrap, *options, "--", *argv]
