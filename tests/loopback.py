"""A scripted model provider on 127.0.0.1, in the wire formats of OpenAI, Anthropic and Google, streams included.

In a test:

    async with Loopback(lambda wire, body: Reply("hello")) as provider:
        ...  # clients get provider.openai, provider.anthropic or provider.google as their base URL
        assert provider.count == 1

As a process that outlives those who ask it: `python tests/loopback.py --port 8099 --log asked.jsonl --script echo`.
"""

import argparse
import asyncio
import importlib
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from loopback_wires import Reply, ToolCall, Wire, events, first_word, last_text, whole
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from web import served


@dataclass(frozen=True)
class Fault:
    """How the provider fails. `cut` ends a body too early and in good order, `dropped` breaks the connection in it.

    `unauthorised` gives back the key that it was sent, as a careless provider would. `refusal` is the model's own.
    """

    kind: Literal[
        "rate_limited",
        "broken",
        "overloaded",
        "unauthorised",
        "forbidden",
        "unknown_model",
        "bad_request",
        "hang",
        "garbage",
        "empty",
        "cut",
        "dropped",
        "refusal",
        "wrong_type",
    ]
    retry_after: str | None = None
    message: str = ""


@dataclass(frozen=True)
class Asked:
    """One request as it came. `body` of Google's wire has the model of its path added, as `model`."""

    wire: Wire
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    stream: bool


__all__ = ["Asked", "Fault", "Loopback", "Reply", "Script", "ToolCall", "Wire", "last_text"]

Script = Callable[[Wire, Mapping[str, Any]], Reply | Fault]

STATUS = {
    "rate_limited": (429, "rate_limit_error", "RESOURCE_EXHAUSTED"),
    "broken": (500, "api_error", "INTERNAL"),
    "overloaded": (529, "overloaded_error", "UNAVAILABLE"),
    "unauthorised": (401, "authentication_error", "UNAUTHENTICATED"),
    "forbidden": (403, "permission_error", "PERMISSION_DENIED"),
    "unknown_model": (404, "not_found_error", "NOT_FOUND"),
    "bad_request": (400, "invalid_request_error", "INVALID_ARGUMENT"),
}


class Loopback:
    """The provider: `with` or `async with` it. It serves in a thread of its own; `port` 0 is any free one.

    Every request is counted when it has been read, before the script answers, and, with `log`, appended to that file
    as one JSON line {wire, stream, body}.
    """

    def __init__(self, script: Script | None = None, port: int = 0, log: Path | None = None) -> None:
        self.script: Script = script or (lambda wire, body: Reply())
        self._socket = socket.create_server(("127.0.0.1", port))
        # asyncio sets this only where it made the socket itself; without it every second reply waits 40 ms.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port: int = self._socket.getsockname()[1]
        self._log = log
        self._asked: list[Asked] = []
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._released: asyncio.Event
        self._over: asyncio.Event
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def openai(self) -> str:
        return f"{self.url}/v1"

    @property
    def anthropic(self) -> str:
        return self.url

    @property
    def google(self) -> str:
        return self.url

    @property
    def requests(self) -> list[Asked]:
        with self._lock:
            return list(self._asked)

    @property
    def count(self) -> int:
        return len(self.requests)

    def release(self) -> None:
        """Let every held stream and hanging request go on, and those that come later too."""
        self._loop.call_soon_threadsafe(self._released.set)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._socket.close()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.__exit__)

    async def _serve(self) -> None:
        app = Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "POST"])])
        self._loop, self._released, self._over = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        async with served(app, self._socket, patience_s=1):
            self._ready.set()
            await self._over.wait()

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        if path.endswith("/models"):
            return JSONResponse({"object": "list", "data": [{"id": "scripted", "object": "model"}]})
        wire = _wire(path)
        if wire is None:
            return JSONResponse({"error": {"message": f"no such path: {path}", "type": "not_found_error"}}, 404)
        body: dict[str, Any] = await request.json()
        if path.endswith("/count_tokens"):
            return JSONResponse({"input_tokens": len(json.dumps(body)) // 4})
        if wire == "gemini":
            body["model"] = path.rpartition("/")[2].partition(":")[0]
        stream = bool(body.get("stream")) or path.endswith(":streamGenerateContent")
        self._note(Asked(wire, body, dict(request.headers), stream))
        answer = await asyncio.to_thread(self.script, wire, body)
        if isinstance(answer, Fault):
            if answer.kind == "hang":
                await self._released.wait()
                answer = Reply()
            elif answer.kind in ("cut", "dropped"):
                return self._broken(wire, body, stream, answer.kind)
            elif answer.kind == "refusal":
                answer = Reply("I cannot help with that.", refused=True)
            else:
                return _fault(wire, answer, request)
        if stream:
            return StreamingResponse(self._pace(wire, body, answer), media_type="text/event-stream")
        return JSONResponse(whole(wire, body, answer))

    def _note(self, asked: Asked) -> None:
        with self._lock:
            self._asked.append(asked)
            if self._log:
                line = json.dumps({"wire": asked.wire, "stream": asked.stream, "body": asked.body})
                with self._log.open("a") as file:
                    file.write(line + "\n")

    async def _pace(self, wire: Wire, body: Mapping[str, Any], reply: Reply) -> AsyncIterator[str]:
        for event in events(wire, body, reply):
            yield event
            if reply.held and not self._released.is_set() and first_word(reply) in event:
                await self._released.wait()

    def _broken(self, wire: Wire, body: Mapping[str, Any], stream: bool, kind: str) -> Response:
        if stream:
            parts = list(events(wire, body, Reply("this is cut in the middle")))
            parts = parts[: len(parts) // 2]
        else:
            text = json.dumps(whole(wire, body, Reply()))
            parts = [text[: len(text) // 2]]

        async def cut() -> AsyncIterator[str]:
            for part in parts:
                yield part
            if kind == "dropped":
                raise ConnectionAbortedError

        return StreamingResponse(cut(), media_type="text/event-stream" if stream else "application/json")


def _wire(path: str) -> Wire | None:
    endings: dict[str, Wire] = {
        "/chat/completions": "chat",
        "/responses": "responses",
        "/messages": "messages",
        "/messages/count_tokens": "messages",
        ":generateContent": "gemini",
        ":streamGenerateContent": "gemini",
    }
    return next((wire for ending, wire in endings.items() if path.endswith(ending)), None)


def _fault(wire: Wire, fault: Fault, request: Request) -> Response:
    if fault.kind == "garbage":
        return Response("{'not': json", media_type="application/json")
    if fault.kind == "empty":
        return Response(b"", media_type="application/json")
    if fault.kind == "wrong_type":
        return Response("<html>Bad gateway</html>", media_type="text/html")
    status, name, google = STATUS[fault.kind]
    headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
    message = fault.message or f"scripted: {fault.kind}"
    if fault.kind == "unauthorised":
        sent = request.headers
        key = sent.get("x-goog-api-key") or sent.get("x-api-key") or sent.get("authorization", "").split(" ")[-1]
        message = f"Incorrect API key provided: {key}"
    if wire == "messages":
        body = {"type": "error", "error": {"type": name, "message": message}}
    elif wire == "gemini":
        body = {"error": {"code": status, "message": message, "status": google}}
    else:
        body = {"error": {"message": message, "type": name, "code": fault.kind, "param": None}}
    return JSONResponse(body, status, headers)


def _ok(wire: Wire, body: Mapping[str, Any]) -> Reply:
    return Reply()


def _echo(wire: Wire, body: Mapping[str, Any]) -> Reply:
    return Reply(last_text(wire, body) or "ok")


SCRIPTS: Mapping[str, Script] = {"ok": _ok, "echo": _echo}


def named(name: str) -> Script:
    """A script of SCRIPTS, or `module:function` of a module beside this one."""
    if name in SCRIPTS:
        return SCRIPTS[name]
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path, help="append each request to this file, a JSON line each")
    parser.add_argument("--script", default="ok", help=f"{', '.join(SCRIPTS)}, or module:function")
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    with Loopback(named(asked.script), asked.port, asked.log) as provider:
        print(json.dumps({"url": provider.url}), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
