"""The processes of `sia bench gateway`: a provider that answers at once, and a gateway with that provider behind it.

Each prints one JSON line when it is ready, and ends when its stdin closes.
"""

import argparse
import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sia_events import app
from sia_events.home import hold
from sia_events.model_gateway.anthropic_stream import events
from sia_events.model_gateway.wire import named_frame
from sia_events.overheads import AGENT
from sia_events.shared.events import Budget, RunSettings, RunStarted
from sia_events.shared.providers import Provider
from sia_events.shared.record import opening
from sia_events.shared.settings import Settings

NAME = "loopback"
OPEN, RACE, LIMIT = "open", "race", 50
"""Runs that the gateway knows: one without limits, one that may make LIMIT calls."""


def provider_app() -> Starlette:
    """OpenAI's chat completions and Anthropic's messages, streamed or whole. GET /asked tells how many were asked for.

    The reply is the word ok. Who writes agents gets AGENT with a new comment: as our backend `direct` wants it, and
    where tools are offered, as calls that write files.
    """
    asked = count()
    made = [0]

    def number() -> int:
        made[0] = next(asked) + 1
        return made[0]

    async def complete(request: Request) -> Response:
        body, n = await request.json(), number()
        writes = str(body["messages"][-1]["content"]).startswith(("# Write a first agent", "# Change the harness"))
        text = json.dumps({"files": {"target_agent.py": f"{AGENT}# {n}\n"}, "note": "a comment"}) if writes else "ok"
        head = {"id": f"chatcmpl-{n}", "created": 1_700_000_000, "model": body.get("model")}
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        if body.get("stream"):
            return StreamingResponse(_chunks(head, text, usage), media_type="text/event-stream")
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if files := _files(body, n, request.url.port):
            written = [{"path": name, "content": text} for name, text in files.items()]
            calls = [{"name": "write_file", "arguments": json.dumps(file)} for file in written]
            message["tool_calls"] = [{"id": f"{n}.{i}", "type": "function", "function": c} for i, c in enumerate(calls)]
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if files else "stop"}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    async def message(request: Request) -> Response:
        body, n = await request.json(), number()
        files = _files(body, n, request.url.port)
        written = [{"file_path": name, "content": text} for name, text in files.items()]
        uses = [{"type": "tool_use", "id": f"{n}.{i}", "name": "Write", "input": w} for i, w in enumerate(written)]
        head = {"id": f"msg-{n}", "type": "message", "role": "assistant", "model": body["model"]}
        usage = {"input_tokens": 10, "output_tokens": 2}
        content = uses or [{"type": "text", "text": "ok"}]
        reply = {**head, "content": content, "stop_reason": "tool_use" if uses else "end_turn", "usage": usage}
        if not body.get("stream"):
            return JSONResponse(reply)
        return StreamingResponse(map(named_frame, events(reply)), media_type="text/event-stream")

    async def told(request: Request) -> Response:
        return JSONResponse(made[0])

    return Starlette(
        routes=[
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/v1/messages", message, methods=["POST"]),
            Route("/asked", told),
        ]
    )


def _files(body: Mapping[str, Any], number: int, port: int | None) -> Mapping[str, str]:
    """What the agents of sia-agent have to write, all of it each time; none when it is written, or no tool is there.

    Its agent asks this provider itself: it has no gateway.
    """
    if not body.get("tools") or any(word in json.dumps(body["messages"]) for word in ('"tool"', '"tool_result"')):
        return {}
    agent = f"{AGENT.replace('8080', str(port))}# {number}\n"
    return {"target_agent.py": agent, "improvement.md": "a comment\n", "summary.txt": "a comment\n"}


def settings_for(home: Path, provider: str) -> Settings:
    """Settings under which NAME/… is asked at that URL."""
    row = Provider(kind="openai", base_url=f"{provider}/v1", concurrency=64)
    return Settings(home=home, providers={**Settings(home=home).providers, NAME: row})


async def _chunks(head: dict[str, Any], text: str, usage: dict[str, int]) -> AsyncIterator[str]:
    def frame(delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

    yield frame({"role": "assistant", "content": text})
    yield frame({}, "stop")
    yield f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


async def _provide() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    # asyncio sets this only where it made the socket itself; without it every second reply waits 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(provider_app(), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    _ready(url=f"http://127.0.0.1:{listening.getsockname()[1]}")
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving


async def _gate(home: Path, provider: str, core: int | None) -> None:
    """The gateway alone on its core; the bus, which puts calls on disk, has none of its own."""
    settings = settings_for(home, provider)
    async with hold(settings, "bench"), app.stores(settings) as bare:
        if core is not None:
            os.sched_setaffinity(0, {core})
        node = app.as_asked(app.with_services(bare, ["model_gateway"]), "bubblewrap", local_model=False)
        for run, budget in ((OPEN, Budget()), (RACE, Budget(calls=LIMIT))):
            started = RunStarted(settings=RunSettings(budget=budget), code="bench")
            await node.bus.append(run, opening(run, [started]))
        async with node.answering(None):
            _ready(pid=os.getpid())
            await node.guard(asyncio.to_thread(sys.stdin.read))


def _ready(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, help="run the gateway of this home; left out, the provider")
    parser.add_argument("--provider", default="", help="the provider's URL")
    parser.add_argument("--core", type=int, help="the core that the gateway may use")
    asked = parser.parse_args()
    asyncio.run(_gate(asked.home, asked.provider, asked.core) if asked.home else _provide())


if __name__ == "__main__":
    main()
