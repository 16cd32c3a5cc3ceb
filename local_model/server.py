"""The model server: chat completions, choice calls and adapters over HTTP, in the forms of OpenAI and vLLM.

Run as `python -m sia_events.local_model.server --home DIR --socket PATH` (or `--host`, `--port`). Prints one JSON line
on stdout once it listens. POST /v1/choice is ours: it draws one of several continuations and tells the distribution.
POST /v1/completions tells the log-probs of next tokens and writes none.
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import secrets
import socket
import stat
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from sia_events.local_model import adapter, network, parent, weights
from sia_events.local_model.chat import Chat
from sia_events.local_model.engine import Engine, EngineBusy
from sia_events.local_model.policy import ChoiceRequest, Policy, TextRequest
from sia_events.local_model.requests import (
    ChatBody,
    ChoiceBody,
    LoadBody,
    Message,
    Part,
    TextBody,
    TokenizeBody,
    UnloadBody,
)

CONTEXT = 4096
"""Tokens of prompt and reply together. The model could take 8192; this bounds the memory of a batch."""
LEAST_TEMPERATURE = 1e-9
"""Below it, but for 0, log-probabilities divided by it are no numbers, and nothing could be drawn from them."""
CHOICE_TOKENS = 524_288
"""Choices times tokens of prompt and choice: every choice of several tokens reads the whole prompt once more."""
KEPT_ADAPTERS = 32


class Refused(Exception):
    """A request that cannot be served: HTTP `status`, and OpenAI's error `code`."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status, self.code = status, code


Body = TypeVar("Body", bound=msgspec.Struct)


@dataclass(frozen=True)
class Served:
    """An adapter that is served: the digest of its files, and the folder that they were read from."""

    digest: str
    root: str


class Api:
    """The HTTP face of one engine. `adapters` maps each served name to what it was loaded from, last used last."""

    def __init__(self, folder: weights.ModelFolder) -> None:
        self._folder = folder
        self._chat = Chat(folder.path)
        self._network = network.load(folder.path)
        self._engine = Engine(Policy(self._network, self._chat.end_token))
        self._adapters: OrderedDict[str, Served] = OrderedDict()
        self._started, self._numbers = time.time_ns(), itertools.count(1)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                _post("/v1/chat/completions", ChatBody, self.complete),
                _post("/v1/choice", ChoiceBody, self.choose),
                _post("/v1/completions", TextBody, self.score),
                _post("/tokenize", TokenizeBody, self.tokenize),
                _post("/v1/load_lora_adapter", LoadBody, self.load),
                _post("/v1/unload_lora_adapter", UnloadBody, self.unload),
                Route("/v1/models", self.models),
                Route("/health", self.health),
            ]
        )

    async def complete(self, body: ChatBody) -> dict[str, Any]:
        if body.stream or body.tools:
            raise Refused("Streaming and tools are not served. Send the request without `stream` and `tools`.")
        prompt = self._prompt(body.messages)
        wanted = body.max_completion_tokens or body.max_tokens or 256
        self._check_length(len(prompt), wanted)
        stops = [body.stop] if isinstance(body.stop, str) else [stop for stop in body.stop or [] if stop]
        request = TextRequest(
            adapter=self._adapter(body.model),
            prompt=prompt,
            max_tokens=wanted,
            temperature=_temperature(body.temperature),
            top_p=body.top_p,
            seed=_seed(body.seed),
            stopped=lambda tokens: bool(stops) and _cut(self._chat.text(tokens), stops) is not None,
        )
        sampled = await asyncio.wrap_future(self._engine.generate(request))
        text = self._chat.text(sampled.tokens)
        content = [
            {"token": piece, "bytes": list(piece.encode()), "logprob": _told(logprob), "top_logprobs": []}
            for piece, logprob in zip(map(self._chat.token, sampled.tokens), sampled.logprobs, strict=True)
        ]
        cut = _cut(text, stops)
        return {
            "id": self._id("chatcmpl"),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.model,
            "prompt_token_ids": prompt,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text if cut is None else text[:cut]},
                    "finish_reason": sampled.finish,
                    "token_ids": sampled.tokens,
                    "logprobs": {"content": content} if body.logprobs else None,
                }
            ],
            "usage": _usage(len(prompt), len(sampled.tokens)),
        }

    def _id(self, kind: str) -> str:
        """A name that no other reply has; unlike a random one it packs well, and every call is kept."""
        return f"{kind}-{self._started:x}-{next(self._numbers)}"

    async def choose(self, body: ChoiceBody) -> dict[str, Any]:
        if body.bias is not None and len(body.bias) != len(body.choices):
            raise Refused(
                f"bias has {len(body.bias)} numbers for {len(body.choices)} choices; send one a choice, or null."
            )
        prompt = self._prompt(body.messages)
        choices = tuple(self._chat.tokens(choice) for choice in body.choices)
        longest = max(map(len, choices))
        self._check_length(len(prompt), longest)
        if longest > 1 and len(choices) * (len(prompt) + longest) > CHOICE_TOKENS:
            raise Refused(
                f"{len(choices)} choices of up to {longest} tokens behind a prompt of {len(prompt)} are too much for "
                f"one call: number times length may be {CHOICE_TOKENS:,}. Shorten the prompt or send fewer choices.",
                code="context_length_exceeded",
            )
        bias = None if body.bias is None else tuple(body.bias)
        temperature, seed = _temperature(body.temperature), _seed(body.seed)
        request = ChoiceRequest(self._adapter(body.model), prompt, choices, bias, temperature, seed)
        chosen = await asyncio.wrap_future(self._engine.choose(request))
        return {
            "id": self._id("choice"),
            "object": "choice",
            "created": int(time.time()),
            "model": body.model,
            "choice": body.choices[chosen.index],
            "index": chosen.index,
            "logprobs": [_told(value) for value in chosen.logprobs],
            "raw": [_told(value) for value in chosen.raw],
            "prompt_token_ids": prompt,
            "choice_token_ids": choices,
            "usage": _usage(len(prompt), len(choices[chosen.index])),
        }

    async def score(self, body: TextBody) -> dict[str, Any]:
        """How likely each of the tokens asked about is as the next one; nothing is written."""
        prompts = [tuple(prompt) for prompt in body.prompt]
        for prompt in prompts:
            self._check_length(len(prompt), 1)
        if (most := max(map(max, (*prompts, body.logprob_token_ids)))) >= self._network.vocabulary:
            raise Refused(f"The model knows tokens up to {self._network.vocabulary - 1}; {most} was sent.")
        name, wanted = self._adapter(body.model), tuple((token,) for token in body.logprob_token_ids)
        asked = [ChoiceRequest(name, prompt, wanted, None, 0.0, 0) for prompt in prompts]
        told = await asyncio.gather(*(asyncio.wrap_future(self._engine.choose(request)) for request in asked))
        return {
            "id": self._id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "choices": [
                {
                    "index": at,
                    "text": "",
                    "finish_reason": "length",
                    "logprobs": {
                        "top_logprobs": [
                            {f"token_id:{t}": _told(p) for t, p in zip(body.logprob_token_ids, each.raw, strict=True)}
                        ]
                    },
                }
                for at, each in enumerate(told)
            ],
            "usage": _usage(sum(map(len, prompts)), 0),
        }

    async def tokenize(self, body: TokenizeBody) -> dict[str, Any]:
        """Token ids of a text, or of a conversation as the model reads it."""
        tokens = self._chat.tokens(body.prompt) if body.prompt is not None else self._prompt(body.messages or [])
        return {"tokens": tokens, "count": len(tokens), "max_model_len": CONTEXT}

    async def load(self, body: LoadBody) -> dict[str, Any]:
        """Serve an adapter folder under a new name. The same files under the same name again change nothing.

        Of more than KEPT_ADAPTERS the one that was not asked for longest is served no more.
        """
        folder = Path(body.lora_path)
        try:
            loaded = await asyncio.to_thread(
                adapter.read, folder, self._network.modules, self._folder.model, self._folder.digest
            )
            digest = await asyncio.to_thread(_digest, folder)
        except adapter.AdapterRefused as error:
            raise Refused(f"{error} Nothing was loaded.") from error
        held = self._adapters.get(body.lora_name)
        if body.lora_name == self._folder.model or (held and held.digest != digest):
            raise Refused(f"The name {body.lora_name} is taken by other weights. Give each version a name of its own.")
        if held is None:
            added = {body.lora_name: loaded}
            await asyncio.wrap_future(self._engine.call(lambda policy: policy.adapters.update(added)))
            self._adapters[body.lora_name] = Served(digest, body.lora_path)
            while len(self._adapters) > KEPT_ADAPTERS:
                await self._drop(next(iter(self._adapters)))
        return {"lora_name": body.lora_name, "sha256": digest}

    async def unload(self, body: UnloadBody) -> dict[str, Any]:
        if body.lora_name not in self._adapters:
            raise self._unknown(body.lora_name)
        await self._drop(body.lora_name)
        return {"lora_name": body.lora_name}

    async def models(self, _: Request) -> JSONResponse:
        common = {"object": "model", "owned_by": "local", "max_model_len": CONTEXT}
        base = {"id": self._folder.model, "sha256": self._folder.digest, "parent": None}
        adapters = [
            {"id": name, "sha256": held.digest, "root": held.root, "parent": self._folder.model}
            for name, held in self._adapters.items()
        ]
        return JSONResponse({"object": "list", "data": [common | card for card in (base, *adapters)]})

    async def health(self, _: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "model": self._folder.model, "pid": os.getpid()})

    async def _drop(self, name: str) -> None:
        # From here on the name is refused; what was asked under it before is answered first.
        del self._adapters[name]
        await asyncio.wrap_future(self._engine.call(lambda policy: policy.forget(name)))

    def _adapter(self, model: str) -> str | None:
        if model == self._folder.model:
            return None
        if model not in self._adapters:
            raise self._unknown(model)
        self._adapters.move_to_end(model)
        return model

    def _unknown(self, model: str) -> Refused:
        served = ", ".join([self._folder.model, *self._adapters])
        return Refused(f"The model {model} is not served here. Served: {served}.", 404, "model_not_found")

    def _prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        plain = []
        for message in messages:
            if message.role not in ("system", "user", "assistant"):
                raise Refused(f"The role {message.role!r} is not served; use system, user or assistant.")
            parts = message.content if isinstance(message.content, list) else [Part(message.content)]
            plain.append({"role": message.role, "content": "".join(part.text for part in parts)})
        return self._chat.prompt(plain)

    def _check_length(self, prompt: int, reply: int) -> None:
        if prompt + reply > CONTEXT:
            raise Refused(
                f"A prompt of {prompt} tokens and a reply of up to {reply} pass the {CONTEXT} tokens served. "
                "Shorten the prompt or lower max_tokens.",
                code="context_length_exceeded",
            )


def _post(path: str, kind: type[Body], answer: Callable[[Body], Awaitable[dict[str, Any]]]) -> Route:
    async def endpoint(request: Request) -> JSONResponse:
        try:
            return JSONResponse(await answer(msgspec.json.decode(await request.body(), type=kind)))
        except msgspec.DecodeError as error:
            return _error(f"The body is not as {path} takes it: {error}.", 400, "invalid_request")
        except Refused as error:
            return _error(str(error), error.status, error.code)
        except EngineBusy as error:
            return _error(str(error), 503, "busy")

    return Route(path, endpoint, methods=["POST"])


def _error(message: str, status: int, code: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


def _told(logprob: float) -> float:
    """A log-probability in the eight digits that a float32 has: the rest is noise that every record would keep."""
    return float(f"{logprob:.8g}")


def _temperature(asked: float) -> float:
    if 0 < asked < LEAST_TEMPERATURE:
        raise Refused(f"temperature {asked:g} is too small; send 0, or {LEAST_TEMPERATURE:g} at least.")
    return asked


def _seed(given: int | None) -> int:
    return secrets.randbits(63) if given is None else given


def _cut(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of `stops` begins in `text`."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def _usage(prompt: int, reply: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / adapter.CONFIG).read_bytes() + (folder / adapter.WEIGHTS).read_bytes()).hexdigest()


def _listen(options: argparse.Namespace) -> socket.socket:
    """A bound socket. A file left by a server that is gone is replaced; anything else at the path is an error."""
    if not options.socket:
        listener = socket.create_server((options.host, options.port))
    else:
        path = Path(options.socket)
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
    listener.listen(1024)
    return listener


def _address(listener: socket.socket) -> dict[str, str | int]:
    name = listener.getsockname()
    return {"socket": name} if isinstance(name, str) else {"host": name[0], "port": name[1]}


def main() -> None:
    # Whoever started us reads one ready line on stdout: talk goes elsewhere.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    options = argparse.ArgumentParser(prog="python -m sia_events.local_model.server", description=__doc__)
    options.add_argument("--home", type=Path, required=True, help="SIA_HOME; the converted model lies in its models/")
    options.add_argument("--socket", help="listen on this unix socket instead of a port")
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=0, help="0 takes a free one, told in the ready line")
    options.add_argument("--threads", type=int, help="compute threads; default OMP_NUM_THREADS")
    options.add_argument("--die-with-parent", action="store_true", help="end when stdin closes")
    given = options.parse_args()
    if given.die_with_parent:
        parent.end_with_parent()
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        folder = weights.prepare(given.home)
        api = Api(folder)
        listener = _listen(given)
    except (weights.ModelNotReady, OSError) as error:
        sys.exit(f"model server: {error}")
    ready = {"ready": True, "model": folder.model, "sha256": folder.digest, "pid": os.getpid()} | _address(listener)
    print(json.dumps(ready), flush=True)
    uvicorn.Server(uvicorn.Config(api.app(), log_level="warning", timeout_keep_alive=75)).run(sockets=[listener])


if __name__ == "__main__":
    main()
