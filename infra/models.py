"""The local model as a `Models` port: an HTTP client of the model server, which holds adapters by name."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from sia_events.infra.providers.failures import kind_of
from sia_events.shared.chunks import chunks
from sia_events.shared.ports import Blobs, Chat, Choice, ModelFailed
from sia_events.shared.tree import load_tree, write_tree


class LocalModels:
    """Calls the server on the unix socket `socket`. An adapter is loaded under its digest when it is first named.

    The server's own API is vLLM's, so a vLLM server answers here too, the choice call apart.
    """

    def __init__(self, blobs: Blobs, adapters: Path, socket: Path) -> None:
        self._blobs = blobs
        self._adapters = adapters
        transport = httpx.AsyncHTTPTransport(uds=str(socket), limits=httpx.Limits(max_connections=256))
        self._http = httpx.AsyncClient(transport=transport, base_url="http://model", timeout=300)
        self._loading = asyncio.Lock()

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        if call.tools or (call.response_format or {"type": "text"}).get("type") != "text":
            said = f"{call.model} takes no tools and no response format; nothing was asked"
            raise ModelFailed(400, said, "unsupported")
        sampling = {"temperature": call.temperature, "top_p": call.top_p}
        body = {
            "model": _name(call.model, call.adapter),
            "messages": list(call.messages),
            **{name: value for name, value in sampling.items() if value is not None},
            "max_tokens": call.max_tokens,
            "stop": list(call.stop) or None,
            "seed": call.seed,
            "logprobs": True,
        }
        return await self._post("/v1/chat/completions", body, call.adapter)

    async def stream(self, call: Chat) -> AsyncIterator[Mapping[str, Any]]:
        for chunk in chunks(await self.chat(call)):
            yield chunk

    async def choose(self, call: Choice) -> Mapping[str, Any]:
        body = {
            "model": _name(call.model, call.adapter),
            "messages": list(call.messages),
            "choices": list(call.choices),
            "bias": None if call.bias is None else list(call.bias),
            "temperature": call.temperature,
            "seed": call.seed,
        }
        return await self._post("/v1/choice", body, call.adapter)

    async def close(self) -> None:
        await self._http.aclose()

    async def _post(self, path: str, body: Mapping[str, Any], adapter: str | None) -> Mapping[str, Any]:
        response = await self._send(path, body)
        if response.status_code == 404 and adapter:
            # The server does not know the name: it is new, or the server was started again. Load it and ask once more.
            await self._load(adapter)
            response = await self._send(path, body)
        if response.status_code != 200:
            raise ModelFailed(response.status_code, response.text[:500], kind_of(response.status_code))
        return response.json()

    async def _send(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        try:
            return await self._http.post(path, json=body)
        except httpx.HTTPError as error:
            raise ModelFailed(503, f"the model server does not answer: {type(error).__name__}: {error}") from error

    async def _load(self, adapter: str) -> None:
        async with self._loading:
            listed = await self._send_get("/v1/models")
            if any(model["id"] == adapter for model in listed["data"]):
                return
            files = await load_tree(self._blobs, adapter)
            self._adapters.mkdir(parents=True, exist_ok=True)
            # Laid down anew from blobs that are checked, for as long as it is read: a copy that is kept may rot.
            with TemporaryDirectory(dir=self._adapters) as folder:
                write_tree(files, Path(folder))
                loaded = await self._send("/v1/load_lora_adapter", {"lora_name": adapter, "lora_path": folder})
            if loaded.status_code != 200:
                said = f"adapter {adapter[:12]} was refused: {loaded.text[:500]}"
                raise ModelFailed(loaded.status_code, said, kind_of(loaded.status_code))

    async def _send_get(self, path: str) -> Any:
        try:
            return (await self._http.get(path)).json()
        except httpx.HTTPError as error:
            raise ModelFailed(503, f"the model server does not answer: {type(error).__name__}: {error}") from error


def _name(model: str, adapter: str | None) -> str:
    return adapter or model.partition("/")[2]
