"""The weights lever on a model of vLLM's: learned by transformers, loaded over its API, asked by the next attempt."""

import json
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from given import recorded
from lessons import spec
from story import proposed, started
from test_serving import account, free_port
from test_trainer import housed
from tiny_served import make_home, served

from sia_events.infra.memory import MemoryBlobs
from sia_events.infra.vllm import VllmModels
from sia_events.shared.calls import ModelCall, decode_call
from sia_events.shared.events import (
    AttemptRequested,
    Event,
    ExecutionLogged,
    Learning,
    Weights,
    WeightsUpdated,
    WeightUpdateRequested,
)
from sia_events.shared.ports import Job, Outcome, Ports
from sia_events.shared.registration import register
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.task import find_task
from sia_events.shared.tree import load_tree, store_tree, write_tree
from sia_events.target_runner.service import target_runner
from sia_events.trainer.opening import opened
from sia_events.trainer.service import trainer

HuggingFaceEngine = pytest.importorskip(
    "sia_events.trainer.hugging_face", reason="the extra `train` is not installed"
).HuggingFaceEngine
BASE = Weights(model="vllm/tiny")


class Asking:
    """The `Sandbox` port: an agent that asks the model about each item once, through the gateway's socket."""

    async def run(self, job: Job) -> Outcome:
        assert job.socket
        key = {"authorization": f"Bearer {job.env['OPENAI_API_KEY']}"}
        transport = httpx.AsyncHTTPTransport(uds=str(job.socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=60, headers=key) as http:
            for line in (job.reads["/data"] / "items.jsonl").read_text().splitlines():
                item = json.loads(line)["id"]
                body = {"model": BASE.model, "messages": [{"role": "user", "content": "w1 w2 w3"}], "max_tokens": 4}
                reply = await http.post("/v1/chat/completions", json={**body, "metadata": {"item": item}})
                assert reply.status_code == 200, reply.text
        (job.work / "answers.jsonl").write_text("{}")
        return Outcome("ok", 0, b"", b"", False, 1.0)


@dataclass(frozen=True)
class Loop:
    """A run on the model, played record by record: the real runner and trainer, and the gateway before the server."""

    ports: Ports
    past: list[Event]
    base: Path

    async def performs(self, service: Any, event: Event) -> Event:
        records = recorded(*self.past, event)
        work = Work(replace(fold(records), name="r1"), records[-1], self.ports)
        (told,) = await service.performs[type(event)](work, event)
        self.past.extend((event, told))
        return told

    async def calls(self, logged: Event) -> list[ModelCall]:
        assert isinstance(logged, ExecutionLogged)
        return [decode_call(line) for line in (await self.ports.blobs.get(logged.trajectory)).splitlines()]

    def told_by_the_learner(self, folder: Path, adapter: Path, call: ModelCall) -> list[float]:
        """The reply's tokens as transformers computes them under the adapter."""
        assert call.reply
        engine, _ = opened(spec(self.base, folder, [], adapter_in=str(adapter)))
        return engine.served(call.reply["prompt_token_ids"], call.reply["choices"][0]["token_ids"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A home whose server speaks vLLM's API on a port, and where the base lies as somebody put it there."""
    place, port = tmp_path_factory.mktemp("home"), free_port()
    folder, base = make_home(place), place / "models" / "tiny"
    base.mkdir()
    shutil.copy(folder / "model.safetensors", base)
    config = json.loads((folder / "config.json").read_text())
    del config["head_dim"]  # which Hugging Face's folders often leave out, and our own network needs
    (base / "config.json").write_text(json.dumps(config))
    with served(place, "--port", str(port)):
        yield place, port


@pytest.fixture
async def loop(home: tuple[Path, int], tmp_path: Path) -> AsyncIterator[Loop]:
    place, port = home
    blobs = MemoryBlobs()
    models = VllmModels(account(port), blobs, tmp_path / "adapters")
    async with housed(place, tmp_path, blobs, models) as house:
        harness = await store_tree(blobs, {"target_agent.py": b""})
        first = proposed().model_copy(update={"harness": harness, "weights": BASE})
        past = [await register(find_task("words"), blobs, MemoryBlobs(), 8), started(), first]
        yield Loop(replace(house.ports, sandbox=Asking()), past, place / "models" / "tiny")
    await models.aclose()


async def test_an_adapter_is_learned_beside_vllm_loaded_there_proved_and_asked_by_the_next_attempt(
    loop: Loop, home: tuple[Path, int], tmp_path: Path
) -> None:
    assert isinstance(opened(spec(loop.base, tmp_path / "s", []))[0], HuggingFaceEngine)
    rollouts = AttemptRequested(attempt="g0a.train.g1", version="g0a", split="train", items=4, samples=8, seed=0)
    logged = await loop.performs(target_runner, rollouts)
    calls = await loop.calls(logged)
    assert len(calls) == 32 and isinstance(logged, ExecutionLogged)
    rewards = {call.item: float(call.reply["choices"][0]["token_ids"][0] < 20) for call in calls if call.reply}
    asked = WeightUpdateRequested(
        generation=1,
        parent="g0a",
        algorithm="reinforce",
        trajectory=logged.trajectory,
        rewards=await loop.ports.blobs.put(msgspec.json.encode(rewards)),
        epochs=2,
        seed=0,
        learning=Learning(lr=2e-2, rank=4, batch_prompts=2),
    )
    told = await loop.performs(trainer, asked)
    assert isinstance(told, WeightsUpdated) and told.probe and told.weights.adapter, told
    assert told.weights.model == BASE.model and told.rollouts == 32
    assert told.probe.apart < 1e-3 < 0.01 < told.probe.moved

    (owed,) = target_runner.decides[WeightsUpdated](fold(recorded(*loop.past)), told)
    calls = await loop.calls(await loop.performs(target_runner, owed))
    assert calls and {call.adapter for call in calls} == {told.weights.adapter}
    write_tree(await load_tree(loop.ports.blobs, told.weights.adapter), tmp_path / "adapter")
    for call in calls[:2]:
        assert call.reply
        drawn = [token["logprob"] for token in call.reply["choices"][0]["logprobs"]["content"]]
        assert drawn == pytest.approx(loop.told_by_the_learner(tmp_path / "t", tmp_path / "adapter", call), abs=1e-3)
    async with httpx.AsyncClient() as http:
        cards = (await http.get(f"http://127.0.0.1:{home[1]}/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == ["tiny", told.weights.adapter]
