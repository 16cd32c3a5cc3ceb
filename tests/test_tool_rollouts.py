"""An agent that calls a tool, on a server like vLLM: two calls make one rollout, of the model's own tokens alone."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_house import SECRET, Clock, serving
from lessons import logprobs, spec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tiny import make_model

from sia_events.infra.memory import MemoryBlobs, MemoryBus
from sia_events.infra.models import LocalModels
from sia_events.infra.providers.account import Account, Slots
from sia_events.infra.vllm import VllmModels
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.door import gateway
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.ledger import Unlimited
from sia_events.model_gateway.token import TokenDoor
from sia_events.shared.calls import ModelCall, decode_call
from sia_events.shared.ports import Chat, ModelFailed
from sia_events.shared.providers import Provider
from sia_events.trainer.learn import learn
from sia_events.trainer.rollouts import Sample, Source, gather, to_lines

MODEL = "vllm/tiny"
ASKED, TOLD = (1, 20, 30, 2), (33, 34, 35)
"""The token ids of the question, and of what the tool says."""
CALLING = (7, 8)
TOOL: Any = {"type": "function", "function": {"name": "weigh", "parameters": {"type": "object", "properties": {}}}}
REWARDS = {"i1#0": 1.0, "i1#1": 0.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@dataclass
class Server:
    """vLLM's chat completions, as far as a rollout reads them: calls the tool once, then says the next of `answers`."""

    tiny: Path
    answers: Iterator[tuple[int, ...]]
    asked: list[Mapping[str, Any]] = field(default_factory=list)

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        prompt, said, message = ASKED, CALLING, called()
        if body["messages"][-1]["role"] == "tool":
            prompt, said = (*ASKED, *CALLING, *TOLD), next(self.answers)
            message = {"role": "assistant", "content": "it is heavy"}
        told = logprobs(self.tiny, None, {"prompt_ids": prompt, "completion_ids": said})
        tokens = [{"token": str(token), "logprob": value} for token, value in zip(said, told, strict=True)]
        finish = "tool_calls" if "tool_calls" in message else "stop"
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(said)}
        head = {"id": "c", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": finish, "token_ids": said}
            whole = {**head, "object": "chat.completion", "prompt_token_ids": prompt, "usage": usage}
            return JSONResponse({**whole, "choices": [{**choice, "logprobs": {"content": tokens}}]})

        async def parts() -> AsyncIterator[str]:
            def part(delta: Mapping[str, Any], more: Mapping[str, Any], **beside: Any) -> str:
                choice = {"index": 0, "delta": delta, "finish_reason": None, **more}
                whole = {**head, "object": "chat.completion.chunk", "choices": [choice], **beside}
                return f"data: {json.dumps(whole)}\n\n"

            yield part({"role": "assistant", "content": ""}, {}, prompt_token_ids=prompt)
            deltas = [message, *({} for _ in said[1:])]
            for delta, token, about in zip(deltas, said, tokens, strict=True):
                yield part(delta, {"token_ids": [token], "logprobs": {"content": [about]}})
            yield part({}, {"finish_reason": finish})
            yield f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")


def called() -> dict[str, Any]:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weigh", "arguments": "{}"}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@asynccontextmanager
async def attempt(server: Server, blobs: Path) -> AsyncIterator[tuple[openai.AsyncOpenAI, MemoryBus]]:
    """What an attempt at train has of the gateway before the server, and where its calls are recorded."""
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(
            serving(Starlette(routes=[Route("/v1/chat/completions", server.answer, methods=["POST"])]))
        )
        row = Provider(kind="vllm", base_url=f"{url}/v1")
        models = VllmModels(Account("vllm", row, "", Slots(4)), MemoryBlobs(), blobs)
        stack.push_async_callback(models.aclose)
        bus = MemoryBus()
        journal = Journal(bus)
        stack.push_async_callback(journal.close)
        calls = Calls(journal, lambda model: models, Clock(), Unlimited(), 20.0)
        door = await stack.enter_async_context(serving(gateway(calls, SECRET, Clock())))
        claims = {"run": "r1", "attempt": "g0a.train.g1", "start": "s", "version": "g0a", "model": MODEL}
        token = TokenDoor(Path(), SECRET).token(
            {**claims, "adapter": None, "sample": True, "seed": 1, "expires": 2**40}
        )
        client = openai.AsyncOpenAI(base_url=f"{door}/v1", api_key=token, max_retries=0)
        stack.push_async_callback(client.close)
        yield client, bus


async def answered(client: openai.AsyncOpenAI, item: str, streamed: bool) -> str | None:
    """The agent: asks, calls the tool that the model wants, and tells the model what it said."""
    messages: list[Any] = [{"role": "user", "content": f"how heavy is it? {item}"}]
    given: dict[str, Any] = {"model": MODEL, "tools": [TOOL], "max_tokens": 8, "metadata": {"item": item}}
    first = await _message(client, streamed, messages=messages, **given)
    (call,) = first["tool_calls"]
    assert call["function"]["name"] == "weigh"
    messages += [first, {"role": "tool", "tool_call_id": call["id"], "content": "12 kg"}]
    return (await _message(client, streamed, messages=messages, **given))["content"]


async def _message(client: openai.AsyncOpenAI, streamed: bool, **asked: Any) -> dict[str, Any]:
    if not streamed:
        whole = await client.chat.completions.create(**asked)
        return whole.choices[0].message.model_dump(exclude_none=True)
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    async for part in await client.chat.completions.create(**asked, stream=True):
        for choice in part.choices:
            message["content"] += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                message.setdefault("tool_calls", []).append(call.model_dump(exclude_none=True, exclude={"index"}))
    return message


async def rollouts(tiny: Path, scratch: Path, streamed: bool) -> tuple[Server, list[ModelCall], list[Sample]]:
    server = Server(tiny, iter([(4, 5), (3,)]))
    async with attempt(server, scratch) as (client, bus):
        for item in REWARDS:
            assert await answered(client, item, streamed) == "it is heavy"
        envelopes = await bus.traces("r1", "model_call", "g0a.train.g1")
    calls = [decode_call(line) for envelope in envelopes for line in envelope.lines]
    found, left_out = gather([Source("g0a.train.g1", calls, REWARDS)])
    assert not left_out
    return server, calls, found


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_two_calls_with_a_tool_between_them_are_one_sample_of_two_steps(
    tiny: Path, tmp_path: Path, streamed: bool
) -> None:
    server, _, found = await rollouts(tiny, tmp_path, streamed)
    assert [(one.item, one.reward) for one in found] == [("i1#0", 1.0), ("i1#1", 0.0)]
    for sample, said in zip(found, [(4, 5), (3,)], strict=True):
        first, second = sample.steps
        assert (first.prompt_ids, first.completion_ids) == (ASKED, CALLING)
        assert (second.prompt_ids, second.completion_ids) == ((*ASKED, *CALLING, *TOLD), said)
        assert [len(step.logprobs or ()) for step in sample.steps] == [len(CALLING), len(said)]
    roles = [[message["role"] for message in body["messages"]] for body in server.asked]
    assert roles == [["user"], ["user", "assistant", "tool"]] * 2
    assert all(body["tools"] == [TOOL] and body["return_token_ids"] for body in server.asked)
    assert server.asked[1]["messages"][2]["tool_call_id"] == server.asked[1]["messages"][1]["tool_calls"][0]["id"]


async def test_the_learner_takes_a_step_towards_the_answers_that_a_tool_led_to(tiny: Path, tmp_path: Path) -> None:
    _, _, found = await rollouts(tiny, tmp_path, streamed=False)
    lines = [json.loads(line) for line in to_lines(found).splitlines()]
    first, last = learn(spec(tiny, tmp_path / "learning", lines, epochs=1))
    assert (first["step"], last["stopped"], last["counts"]["samples"]) == (1, "end", 2)
    told = {tuple(text["completion_ids"]): (text["prompt_ids"], text["logprobs"]) for text in last["probe"]}
    assert set(told) == {CALLING, (4, 5), (3,)}, "nothing that the tool said is the model's"
    for said, better in (((4, 5), True), ((3,), False)):
        prompt, after = told[said]
        assert (sum(after) > sum(logprobs(tiny, None, {"prompt_ids": prompt, "completion_ids": said}))) is better


async def test_a_model_that_takes_no_tools_says_which_do(tmp_path: Path) -> None:
    models = LocalModels(MemoryBlobs(), tmp_path / "adapters", tmp_path / "nobody")
    with pytest.raises(ModelFailed, match=r"local/m, .* nothing was asked.* vllm/NAME .*--enable-auto-tool") as failed:
        await models.chat(Chat("local/m", None, [{"role": "user", "content": "hello"}], tools=[TOOL]))
    assert (failed.value.status, failed.value.kind) == (400, "unsupported")
    await models.aclose()
