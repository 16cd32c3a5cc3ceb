"""Packages that a harness or an evaluator asks for beside the bare interpreter: a folder a list, for all runs."""

import hashlib
import sys
from pathlib import Path

PACKAGES = "/packages"
# Isolated mode reads no PYTHONPATH, so the folder is put behind the standard library's by hand.
STARTER = """\
import runpy, sys
sys.path.append(sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class PackagesMissing(Exception):
    """What a requirements.txt asks for is not laid down on this machine; the message says how to do it."""


def listed(requirements: bytes) -> tuple[str, ...]:
    """The requirements, one a line, sorted, without comments."""
    lines = (line.partition("#")[0].strip() for line in requirements.decode(errors="replace").splitlines())
    return tuple(sorted({line for line in lines if line}))


def folder(home: Path, requirements: bytes) -> Path:
    """Where packages for that list are, or would be, kept: by the list and the interpreter's version."""
    text = "\n".join((f"python {sys.version_info[0]}.{sys.version_info[1]}", *listed(requirements)))
    return home / "environments" / hashlib.sha256(text.encode()).hexdigest()[:16]


def environment(home: Path, requirements: bytes | None) -> Path | None:
    """The folder to bind at /packages, or None when nothing is asked for. Raises PackagesMissing."""
    if requirements is None or not listed(requirements):
        return None
    found = folder(home, requirements)
    if not found.is_dir():
        raise PackagesMissing(
            f"requirements.txt asks for {', '.join(listed(requirements))}, which is not laid down in {found}. "
            f"Do it once: {sys.executable} -m pip install --target {found} --only-binary :all: "
            f"{' '.join(listed(requirements))}"
        )
    return found


def script(program: str, packages: Path | None) -> tuple[str, ...]:
    """The argv that starts `program` isolated, with the packages bound at /packages if there are any."""
    if packages is None:
        return ("python", "-I", program)
    return ("python", "-I", "-c", STARTER, PACKAGES, program)
