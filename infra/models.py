"""The local model as a `Models` port: an HTTP client of the model server, which holds adapters by name."""

from collections.abc import AsyncIterator, Awaitable, Mapping
from pathlib import Path
from typing import Any

from sia_events.infra import scoring
from sia_events.infra.adapters import Adapters
from sia_events.infra.engine_http import EngineHttp
from sia_events.shared.chunks import chunks
from sia_events.shared.ports import Blobs, Chat, Choice, ModelFailed, Text
from sia_events.shared.providers import split_model

TIMEOUT_S = 300.0


class LocalModels:
    """Calls the server on the unix socket `socket`. An adapter is loaded under its digest when it is first named."""

    def __init__(self, blobs: Blobs, adapters: Path, socket: Path) -> None:
        self._http = EngineHttp("the model server", "http://model", TIMEOUT_S, socket=socket)
        self._adapters = Adapters(self._http.ask, blobs, adapters)

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        if call.tools or (call.response_format or {"type": "text"}).get("type") != "text":
            said = (
                f"{call.model}, the embedded model, takes no tools and no response format; nothing was asked. A hosted "
                "provider's model does and, where weights are to be learned too, vllm/NAME on a server of yours (for "
                "tools: started with --enable-auto-tool-choice and --tool-call-parser)"
            )
            raise ModelFailed(400, said, "unsupported")
        sampling = {"temperature": call.temperature, "top_p": call.top_p}
        body = {
            "model": _name(call),
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
            "model": _name(call),
            "messages": list(call.messages),
            "choices": list(call.choices),
            "bias": None if call.bias is None else list(call.bias),
            "temperature": call.temperature,
            "seed": call.seed,
        }
        return await self._post("/v1/choice", body, call.adapter)

    async def logprobs(self, text: Text) -> tuple[float, ...]:
        def asked(body: Mapping[str, Any]) -> Awaitable[Mapping[str, Any]]:
            return self._post(scoring.PATH, body, text.adapter)

        (told,) = await scoring.scores(asked, _name(text), text.prompt, [text.completion])
        return told

    async def aclose(self) -> None:
        await self._adapters.aclose()
        await self._http.aclose()

    async def _post(self, path: str, body: Mapping[str, Any], adapter: str | None) -> Mapping[str, Any]:
        return await self._adapters.served(adapter, lambda: self._http.ask(path, body))


def _name(call: Chat | Choice | Text) -> str:
    return call.adapter or split_model(call.model)[1]
