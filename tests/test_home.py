"""A home's scratch folders and sockets: what was left behind is removed, and what somebody works in is not."""

import asyncio
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from sia_events.home import at_work, door_socket, hold, socket_place
from sia_events.shared.settings import Settings


async def test_scratch_folders_go_with_the_next_holder_but_not_from_under_services_at_work(tmp_path: Path):
    settings, live = Settings(home=tmp_path), tmp_path / "tmp/attempt-live"
    live.mkdir(parents=True)
    with at_work(settings), at_work(settings):
        async with hold(settings, "rebuild"):
            assert live.exists()
    async with hold(settings, "run r1"):
        assert not live.exists()


async def test_a_scratch_folder_goes_however_deep_a_killed_job_had_nested_it(tmp_path: Path):
    left = tmp_path / "tmp/attempt-left"
    left.mkdir(parents=True)
    nested = "i=0; while [ $i -lt 1500 ]; do mkdir d && cd d || exit 1; i=$((i+1)); done"
    await asyncio.to_thread(subprocess.run, ["sh", "-c", nested], cwd=left, check=True)
    async with hold(Settings(home=tmp_path), "run r1"):
        assert not left.exists()


async def test_the_sockets_of_a_home_go_at_its_end_or_once_the_home_is_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, killed, still = (Settings(home=tmp_path / name) for name in ("first", "killed", "still"))
    async with hold(first, "run r1"):
        door_socket(first)
    assert not socket_place(first).exists()
    for each in (killed, still):
        async with hold(each, "run r1"):
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(door_socket(each)))
        assert socket_place(each).exists(), "whoever has a socket in it may still run"
    shutil.rmtree(killed.home)
    async with hold(first, "run r2"):
        assert not socket_place(killed).exists() and socket_place(still).exists()


async def test_sockets_that_somebody_answers_on_stay_though_their_home_is_out_of_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, away = Settings(home=tmp_path / "first"), Settings(home=tmp_path / "away")
    with socket.socket(socket.AF_UNIX) as listening:
        async with hold(away, "run r1"):
            listening.bind(str(door_socket(away)))
        listening.listen()
        away.home.rename(tmp_path / "elsewhere")
        async with hold(first, "run r2"):
            assert socket_place(away).exists()
    async with hold(first, "run r3"):
        assert not socket_place(away).exists()
