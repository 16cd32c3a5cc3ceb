"""What makes a tree of files a harness, said in words that whoever wrote it can act on. Pure."""

import warnings
from collections.abc import Mapping
from pathlib import PurePosixPath

ENTRY = "target_agent.py"
MAX_FILES = 200
MAX_FILE = 2_000_000
MAX_TREE = 8_000_000
MAX_PATH = 200


def problems(files: Mapping[str, bytes]) -> list[str]:
    """Why `files` cannot be a harness; empty when they can. Code is compiled and not run."""
    unnamed = {path: problem for path in sorted(files) if (problem := path_problem(path))}
    named = sorted(files.keys() - unnamed.keys())
    found = list(unnamed.values())
    if ENTRY not in files:
        found.append(f"{ENTRY} is missing; it is the program that is started")
    if len(files) > MAX_FILES:
        found.append(f"there are {len(files)} files, and up to {MAX_FILES} are taken")
    size = sum(map(len, files.values()))
    if size > MAX_TREE:
        found.append(f"the files have {size:,} bytes together, and up to {MAX_TREE:,} are taken")
    folders = {parent.as_posix() for path in named for parent in PurePosixPath(path).parents}
    found += [f"{path} is a file and a folder at once" for path in named if path in folders]
    return found + [problem for path in named if (problem := body_problem(path, files[path]))]


def without_caches(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files less what an interpreter left beside those that it ran: nobody wrote that."""
    return {path: body for path, body in files.items() if "__pycache__" not in path.split("/")}


def path_problem(path: str) -> str | None:
    """Why `path` cannot name a file of a harness."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        return f"{path!r} leads out of the harness; paths are relative and stay inside"
    if not path.isprintable() or "\\" in path or len(path.encode(errors="replace")) > MAX_PATH:
        return f"{path[:MAX_PATH]!a} is no name for a file; plain names of up to {MAX_PATH} bytes are taken"
    if path != pure.as_posix() or not pure.parts:
        return f"{path!r} is no plain path to a file; write it as {pure.as_posix()!r}"
    return None


def body_problem(path: str, body: bytes) -> str | None:
    """Why `body` cannot be the file at `path`."""
    if len(body) > MAX_FILE:
        return f"{path} has {len(body):,} bytes, and up to {MAX_FILE:,} are taken"
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
    return _broken(path, body) if path.endswith(".py") else None


def changed(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> tuple[str, ...]:
    """Paths that were added, removed or have another content, sorted."""
    return tuple(sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path)))


def _broken(path: str, body: bytes) -> str | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(body, path, "exec", dont_inherit=True)
    except SyntaxError as error:
        return f"{path} does not compile: line {error.lineno}: {error.msg}: {(error.text or '').strip()[:200]}"
    except (ValueError, OverflowError, RecursionError, MemoryError) as error:
        return f"{path} does not compile: {type(error).__name__}: {error}"
    return None
