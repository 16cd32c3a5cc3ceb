"""Where adapters lie for an engine, and what becomes of files that a killed process has left there."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sia_events.infra import adapters as laid_down
from sia_events.infra.adapters import IDLE_S, Adapters
from sia_events.infra.memory import MemoryBlobs
from sia_events.shared.ports import ModelFailed
from sia_events.shared.tree import store_tree


class Lora:
    """An engine's routes for adapters. It reads the files as it loads them, and `dies` with its gateway at that."""

    def __init__(self, dies: bool = False) -> None:
        self.dies = dies
        self.loaded: dict[str, str] = {}

    async def ask(self, path: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
        if path == "/v1/models":
            return {"data": [{"id": name, "root": root} for name, root in self.loaded.items()]}
        assert body
        if path == "/v1/unload_lora_adapter":
            if body["lora_name"] not in self.loaded:
                raise ModelFailed(404, "no such adapter", "unknown_model")
            del self.loaded[body["lora_name"]]
            return {}
        assert (Path(body["lora_path"]) / "adapter_model.safetensors").read_bytes() == b"factors"
        if self.dies:
            raise SystemExit("killed")
        self.loaded[body["lora_name"]] = body["lora_path"]
        return {}

    async def use(self, adapters: Adapters, adapter: str) -> None:
        async def call() -> None:
            if adapter not in self.loaded:
                raise ModelFailed(404, "no such model", "unknown_model")

        await adapters.served(adapter, call)


async def an_adapter(blobs: MemoryBlobs, name: str) -> str:
    return await store_tree(blobs, {"adapter_model.safetensors": b"factors", "name": name.encode()})


def places(folder: Path) -> set[str]:
    return {place.name for place in folder.iterdir()}


@pytest.mark.parametrize(("kept", "stays"), [(None, 0), (8, 1)])
async def test_what_a_process_left_that_was_killed_in_the_midst_of_loading_goes_with_the_next_adapter(
    tmp_path: Path, kept: int | None, stays: int
):
    blobs, folder = MemoryBlobs(), tmp_path / "adapters"
    first, second = await an_adapter(blobs, "one"), await an_adapter(blobs, "two")
    dying = Lora(dies=True)
    with pytest.raises(SystemExit):
        await dying.use(Adapters(dying.ask, blobs, folder, kept), first)
    left = places(folder)
    begun = folder / f"{first[:16]}-00000000"
    begun.mkdir()
    (folder / "somebody else's").mkdir()

    engine = Lora()
    await engine.use(Adapters(engine.ask, blobs, folder, kept), second)
    assert len(left) == 1 and not left & places(folder) and not begun.exists()
    assert len(places(folder) - {"somebody else's"}) == stays and "somebody else's" in places(folder)


async def test_the_files_of_what_a_gateway_before_has_loaded_stay_where_the_engine_reads_them_again(tmp_path: Path):
    blobs, engine = MemoryBlobs(), Lora()
    first, second = await an_adapter(blobs, "one"), await an_adapter(blobs, "two")
    for adapter in (first, second):
        await engine.use(Adapters(engine.ask, blobs, tmp_path, kept=8), adapter)
    assert places(tmp_path) == {Path(root).name for root in engine.loaded.values()} and len(engine.loaded) == 2


async def test_the_files_of_what_was_loaded_too_late_to_say_so_stay_and_those_of_what_was_refused_go(tmp_path: Path):
    class Late(Lora):
        """Its answer to a load does not come: the first time it was loaded all the same, the second it was not."""

        async def ask(self, path: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
            if path == "/v1/load_lora_adapter":
                if not self.loaded:
                    await super().ask(path, body)
                raise ModelFailed(504, "no answer", "timeout")
            return await super().ask(path, body)

    blobs, late = MemoryBlobs(), Late()
    adapters = Adapters(late.ask, blobs, tmp_path, kept=8)
    first, second = await an_adapter(blobs, "one"), await an_adapter(blobs, "two")
    for adapter in (first, second, second):
        with pytest.raises(ModelFailed):
            await late.use(adapters, adapter)
    await late.use(adapters, first)
    assert Path(late.loaded[first]).name in places(tmp_path) and len(places(tmp_path)) == 2


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waiting: list[tuple[float, asyncio.Future[None]]] = []

    async def sleep(self, seconds: float) -> None:
        until = asyncio.get_running_loop().create_future()
        self.waiting.append((self.now + seconds, until))
        await until

    async def passes(self, seconds: float) -> None:
        """Whoever is woken by it works until it waits again: nothing here takes longer than some turns of the loop."""
        self.now += seconds
        due = [until for at, until in self.waiting if at <= self.now]
        self.waiting = [(at, until) for at, until in self.waiting if at > self.now]
        for until in due:
            until.set_result(None)
        for _ in range(20):
            await asyncio.sleep(0)


async def test_what_nobody_has_asked_for_in_a_while_is_unloaded_and_loaded_again_for_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    time = Time()
    monkeypatch.setattr(laid_down, "monotonic", lambda: time.now)
    monkeypatch.setattr(laid_down, "sleep", time.sleep)
    blobs, engine = MemoryBlobs(), Lora()
    adapters = Adapters(engine.ask, blobs, tmp_path, kept=8)
    refused, incumbent, another = [await an_adapter(blobs, name) for name in ("refused", "incumbent", "another")]

    await engine.use(adapters, refused)
    await time.passes(IDLE_S - 1)
    await engine.use(adapters, incumbent)
    assert set(engine.loaded) == {refused, incumbent}
    await time.passes(1)
    assert set(engine.loaded) == {incumbent}, "though nothing is asked of the engine"
    await engine.use(adapters, refused)
    await time.passes(IDLE_S - 2)
    await engine.use(adapters, incumbent)
    await time.passes(IDLE_S - 1)
    assert set(engine.loaded) == {incumbent}, "who was asked for again is not unused"
    await time.passes(1)
    assert not engine.loaded and not time.waiting

    await engine.use(adapters, another)
    engine.loaded.clear()
    await time.passes(IDLE_S)
    await engine.use(adapters, another)
    assert set(engine.loaded) == {another}, "that an engine was started again is no failure"
    await adapters.aclose()
    await time.passes(IDLE_S)
    assert set(engine.loaded) == {another}, "what is closed asks nothing any more"
