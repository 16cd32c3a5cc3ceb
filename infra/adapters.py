"""LoRA adapters on an engine: laid down from blobs, loaded under their digest, unloaded when there are too many."""

import asyncio
import re
import secrets
import shutil
from asyncio import sleep
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from sia_events.shared.ports import Blobs, ModelFailed
from sia_events.shared.tree import load_tree, write_tree

Ask = Callable[[str, Mapping[str, Any] | None], Awaitable[Mapping[str, Any]]]
"""(path, body; None: a GET) -> the JSON reply. Raises ModelFailed."""
T = TypeVar("T")

IDLE_S = 900.0
"""Seconds for which an adapter stays loaded that nobody asks for."""
OURS, PLACE = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}")
"""Names that we give, to adapters and to their folders: whatever is called otherwise is somebody else's, and stays."""


class Adapters:
    """The adapters of one engine, which speaks vLLM's API for them.

    A name is a digest, so every version has one of its own: what an engine keeps by name, it never keeps for other
    weights. What nobody has asked for in IDLE_S, a version that was refused say, is unloaded. `kept` is for an engine
    that reads the files again whenever it likes, as vLLM does: so many adapters stay loaded at most, those asked for
    last, and the files of one that was unloaded stay until the next is loaded. With None the engine bounds itself and
    has read the files when it says that they are loaded. `folder` is nobody else's: what a process that was killed has
    left there goes when the next adapter is laid down.
    """

    def __init__(self, ask: Ask, blobs: Blobs, folder: Path, kept: int | None = None) -> None:
        self._ask = ask
        self._blobs = blobs
        self._folder = folder.absolute()
        self._kept = kept
        self._used: OrderedDict[str, float] = OrderedDict()
        self._loading = asyncio.Lock()
        self._unloading: asyncio.Task[None] | None = None

    async def served(self, adapter: str | None, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` returns. Where the engine does not know the adapter, it is loaded, and `call` made once more."""
        if adapter is None:
            return await call()
        self._use(adapter)
        try:
            return await call()
        except ModelFailed as failed:
            if failed.status != 404:
                raise
        finally:
            self._use(adapter)
        # It is new, it was unloaded, or the engine was started again.
        await self._load(adapter)
        return await call()

    async def aclose(self) -> None:
        """Unload nothing any more; what is loaded stays so."""
        if self._unloading:
            self._unloading.cancel()
            await asyncio.gather(self._unloading, return_exceptions=True)

    def _use(self, adapter: str) -> None:
        self._used[adapter] = monotonic()
        self._used.move_to_end(adapter)
        if self._unloading is None or self._unloading.done():
            self._unloading = asyncio.create_task(self._unload_unused())

    async def _unload_unused(self) -> None:
        """Each in its time, until none is left."""
        while self._used:
            name, used = next(iter(self._used.items()))
            if (rest := used + IDLE_S - monotonic()) > 0:
                await sleep(rest)
                continue
            # Not in the midst of a load, which counts what is there.
            async with self._loading:
                if self._used.get(name) == used:
                    del self._used[name]
                    # An engine that was started again has it no more, and of one that is away nothing is wanted.
                    with suppress(ModelFailed):
                        await self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    async def _load(self, adapter: str) -> None:
        async with self._loading:
            cards = (await self._ask("/v1/models", None))["data"]
            served = {card["id"]: card.get("root") for card in cards}
            if adapter in served:
                return
            self._sweep({Path(root).name for root in served.values() if root and self._kept is not None})
            files = await load_tree(self._blobs, adapter)
            place = self._folder / f"{adapter[:16]}-{secrets.token_hex(4)}"
            try:
                # Laid down anew each time from blobs that are checked: a copy that is kept may rot.
                write_tree(files, place)
                await self._ask("/v1/load_lora_adapter", {"lora_name": adapter, "lora_path": str(place)})
            except ModelFailed as failed:
                told = _refused(adapter, failed)
                if told is not failed:
                    shutil.rmtree(place)
                # Else they stay until the next is loaded: who was too late with an answer may have taken it yet.
                raise told from failed
            if self._kept is None:
                shutil.rmtree(place)
            else:
                await self._tidy([name for name in served if OURS.fullmatch(name)] + [adapter], self._kept)

    async def _tidy(self, loaded: list[str], kept: int) -> None:
        """Unload what was asked for longest ago; what a gateway before us loaded, first."""
        order = list(self._used)
        loaded.sort(key=lambda name: order.index(name) if name in self._used else -1)
        for name in loaded[: max(0, len(loaded) - kept)]:
            await self._ask("/v1/unload_lora_adapter", {"lora_name": name})
            self._used.pop(name, None)

    def _sweep(self, needed: set[str]) -> None:
        """Remove the files of what is not loaded any more, whole or begun by a process that was killed at it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for place in self._folder.iterdir():
            if PLACE.fullmatch(place.name) and place.name not in needed:
                shutil.rmtree(place)


def _refused(adapter: str, failed: ModelFailed) -> ModelFailed:
    """An adapter that is not taken is the run's trouble and not the request's; an engine that is away, nobody's yet."""
    if failed.kind in ("unavailable", "timeout", "rate_limited") and failed.status != 500:
        return failed
    said = f"adapter {adapter[:12]} was refused: {failed}"
    if failed.status == 404:
        said = (
            f"the engine loads no adapters ({failed}): start vLLM with --enable-lora and "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, on loopback only, since nobody is asked for a key there"
        )
    return ModelFailed(404, said, "unknown_model")
