"""Which code this is, as every record tells of what wrote it."""

import hashlib
import json
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

ABOVE = Path(__file__).parent.parent
"""The installed package, or the checkout."""


@cache
def code() -> str:
    """ "sia-events VERSION+gCOMMIT" as installed from git; elsewhere the sources' digest stands for the commit."""
    package = distribution("sia-events")
    origin = json.loads(package.read_text("direct_url.json") or "{}")  # PEP 610
    commit = origin.get("vcs_info", {}).get("commit_id")
    return f"sia-events {package.version}+{f'g{commit[:12]}' if commit else _digest()[:12]}"


def _digest() -> str:
    """The same for the same sources, in a checkout and as installed."""
    total = hashlib.sha256()
    for name, file in sorted(_sources()):
        total.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _sources() -> Iterator[tuple[str, Path]]:
    """Every module by its place in the package."""
    declared = ABOVE / "pyproject.toml"
    folders = {"sia_events": "."}
    if declared.exists():
        folders = tomllib.loads(declared.read_text())["tool"]["setuptools"]["package-dir"]
    for package, folder in folders.items():
        for file in filter(Path.is_file, (ABOVE / folder).rglob("*.py")):  # an editor's lock is a link to nowhere
            yield f"{package.replace('.', '/')}/{file.relative_to(ABOVE / folder).as_posix()}", file
