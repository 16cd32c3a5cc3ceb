"""A room to write harnesses in: a real gateway on a socket, a scripted model behind it, and the in-memory stores."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from web import served

from sia_events.infra.memory import MemoryBlobs, MemoryBus, SystemTime
from sia_events.infra.sandbox import UnsafeProcess
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.door import gateway
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.ledger import Unlimited
from sia_events.model_gateway.token import TokenDoor
from sia_events.shared.chunks import chunks
from sia_events.shared.events import TaskRegistered
from sia_events.shared.ports import (
    Backend,
    Blobs,
    Brief,
    Chat,
    Choice,
    ModelFailed,
    Models,
    Ports,
    Sandbox,
    Text,
)
from sia_events.shared.registration import register
from sia_events.shared.task import find_task

SECRET = "a secret of the tests"
AGENT = b"print('an agent')\n"
BRIEF = Brief(
    run="r1",
    role="meta",
    key="meta.g0a",
    model="scripted/writer",
    prompt="Write a better agent.",
    files={"target_agent.py": AGENT, "notes.txt": b"plain\n"},
    data={"items.jsonl": b'{"id": "i1", "text": "a question"}\n'},
    turns=6,
)

Answer = Mapping[str, Any] | ModelFailed


def said(text: str | None, *calls: tuple[str, Any], finish: str = "", refusal: str | None = None) -> Answer:
    """A chat completion; each of `calls` is a tool's name and its arguments, an object or a text as it stands."""
    listed = [
        {
            "id": f"call_{n}",
            "type": "function",
            "function": {"name": name, "arguments": given if isinstance(given, str) else json.dumps(given)},
        }
        for n, (name, given) in enumerate(calls)
    ]
    message = {"role": "assistant", "content": text, "refusal": refusal, **({"tool_calls": listed} if listed else {})}
    choice = {"index": 0, "message": message, "finish_reason": finish or ("tool_calls" if listed else "stop")}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return {"id": "c", "object": "chat.completion", "model": "writer", "choices": [choice], "usage": usage}


def wrote(files: Mapping[str, str], note: str = "a note", **more: Any) -> Answer:
    """The reply that the backend `direct` asks for."""
    return said(json.dumps({"note": note, "files": files, **more}))


@dataclass
class Scripted:
    """The `Models` port: answers from a script, in its order, or by a function of the call; keeps what it was asked."""

    script: Sequence[Answer] | Callable[[Chat], Answer]
    asked: list[Chat] = field(default_factory=list)

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        self.asked.append(call)
        answer = self.script(call) if callable(self.script) else self.script[len(self.asked) - 1]
        if isinstance(answer, ModelFailed):
            raise answer
        return answer

    async def stream(self, call: Chat) -> AsyncIterator[Mapping[str, Any]]:
        for chunk in chunks(await self.chat(call)):
            yield chunk

    async def choose(self, call: Choice) -> Mapping[str, Any]:
        raise ModelFailed(400, "a scripted model has no choice call", "unsupported")

    async def logprobs(self, text: Text) -> tuple[float, ...]:
        raise ModelFailed(400, "a scripted model tells no log-probs", "unsupported")


@asynccontextmanager
async def serving(app: Any, path: Path) -> AsyncIterator[None]:
    """An ASGI application on a unix socket; who connects early waits in the socket's queue."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(64)
        async with served(app, listening, patience_s=1):
            yield


@asynccontextmanager
async def writing_room(
    home: Path,
    models: Models,
    backends: Mapping[str, Backend] | None = None,
    sandbox: Sandbox | None = None,
    like: Ports | None = None,
    blobs: Blobs | None = None,
) -> AsyncIterator[Ports]:
    """Ports for who writes harnesses. One `like` another is a later start on the same bus and blobs."""
    blobs = like.blobs if like else blobs or MemoryBlobs()
    bus = like.bus if like else MemoryBus(blobs, retry_delay=0.001)
    clock, door = SystemTime(), TokenDoor(home / f"{id(models):x}", SECRET)
    journal = Journal(bus)
    calls = Calls(journal, lambda _: models, clock, Unlimited(), patience=120.0)
    async with serving(gateway(calls, SECRET, clock), door.socket):
        yield Ports(bus, blobs, sandbox or UnsafeProcess(), clock, door, home, backends=backends or {})
        await journal.close()


@asynccontextmanager
async def gateway_that_says(
    home: Path,
    status: int,
    message: str,
    backends: Mapping[str, Backend] | None = None,
    blobs: Blobs | None = None,
) -> AsyncIterator[Ports]:
    """Ports whose gateway answers every call alike, with an error in OpenAI's shape."""

    async def answer(request: Request) -> Response:
        return JSONResponse({"error": {"message": message, "type": "test", "code": status}}, status)

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])
    door, blobs = TokenDoor(home / "gateway.sock", SECRET), blobs or MemoryBlobs()
    async with serving(app, door.socket):
        yield Ports(MemoryBus(blobs), blobs, UnsafeProcess(), SystemTime(), door, home, backends=backends or {})


def registered_words() -> tuple[TaskRegistered, Blobs]:
    """The task `words`, registered, and the store that has its public data; made outside of any event loop."""
    blobs = MemoryBlobs()
    return asyncio.run(register(find_task("words"), blobs, MemoryBlobs(), 8)), blobs


def brief(**changes: Any) -> Brief:
    return replace(BRIEF, **changes)
