"""The weights lever on a model of vLLM's: learned by transformers, loaded over its API, asked by the next attempt.

Its client on the embedded model's server, and, where SIA_TEST_VLLM names a python that has it, vLLM.
"""

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
from test_serving import VLLM, account, free_port, vllm_server
from test_trainer import housed
from tiny_served import make_home
from tiny_served import served as model_server

from sia_events.infra.memory import MemoryBlobs
from sia_events.infra.vllm import VllmModels
from sia_events.local_model import weights
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
from sia_events.trainer.opening import WEIGHTS, opened
from sia_events.trainer.service import trainer

HuggingFaceEngine = pytest.importorskip(
    "sia_events.trainer.hugging_face", reason="the extra `train` is not installed"
).HuggingFaceEngine


@dataclass(frozen=True)
class Served:
    """A server that speaks vLLM's API, and the home that has the folder of what it serves as the model `name`."""

    home: Path
    port: int
    name: str
    lr: float

    @property
    def weights(self) -> Weights:
        return Weights(model=f"vllm/{self.name}")

    @property
    def base(self) -> Path:
        return self.home / "models" / self.name


@dataclass(frozen=True)
class Asking:
    """The `Sandbox` port: an agent that asks the model about each item once, through the gateway's socket."""

    model: str

    async def run(self, job: Job) -> Outcome:
        assert job.socket
        key = {"authorization": f"Bearer {job.env['OPENAI_API_KEY']}"}
        transport = httpx.AsyncHTTPTransport(uds=str(job.socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=60, headers=key) as http:
            for line in (job.reads["/data"] / "items.jsonl").read_text().splitlines():
                item = json.loads(line)["id"]
                body = {"model": self.model, "messages": [{"role": "user", "content": "w1 w2 w3"}], "max_tokens": 4}
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


@pytest.fixture(scope="module", params=["vllm_client", pytest.param("vllm_server", marks=pytest.mark.model)])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place, port = tmp_path_factory.mktemp("home"), free_port()
    tiny = make_home(place)
    if request.param == "vllm_client":
        made = Served(place, port, "tiny", lr=2e-2)
        laid_down(tiny, made.base)
        with model_server(place, "--port", str(port)):
            yield made
        return
    if not VLLM:
        pytest.skip("SIA_TEST_VLLM names no python that has vLLM")
    made = Served(place, port, "smollm", lr=1e-3)
    laid_down(request.getfixturevalue("models") / weights.MODEL, made.base)
    with vllm_server(made.base, made.name, port, place / "vllm.log"):
        yield made


def laid_down(folder: Path, base: Path) -> None:
    """The model as somebody puts it there who has it from Hugging Face: no manifest, and no `head_dim`.

    Those folders often leave that out, and our own network needs it.
    """
    shutil.copytree(folder, base, ignore=shutil.ignore_patterns(weights.MANIFEST, WEIGHTS))
    (base / WEIGHTS).symlink_to(folder / WEIGHTS)
    config = json.loads((base / "config.json").read_text())
    del config["head_dim"]
    (base / "config.json").write_text(json.dumps(config))


@pytest.fixture
async def loop(served: Served, tmp_path: Path) -> AsyncIterator[Loop]:
    blobs = MemoryBlobs()
    models = VllmModels(account(served.port), blobs, tmp_path / "adapters")
    async with housed(served.home, tmp_path, blobs, models) as house:
        harness = await store_tree(blobs, {"target_agent.py": b""})
        first = proposed().model_copy(update={"harness": harness, "weights": served.weights})
        past = [await register(find_task("words"), blobs, MemoryBlobs(), 8), started(), first]
        yield Loop(replace(house.ports, sandbox=Asking(served.weights.model)), past, served.base)
    await models.aclose()


@pytest.mark.slow  # rollouts, an update and a probe, over a server that speaks vLLM's protocol
async def test_an_adapter_is_learned_beside_vllm_loaded_there_proved_and_asked_by_the_next_attempt(
    loop: Loop, served: Served, tmp_path: Path
) -> None:
    assert isinstance(opened(spec(loop.base, tmp_path / "s", []))[0], HuggingFaceEngine)
    rollouts = AttemptRequested(attempt="g0a.train.g1", version="g0a", split="train", items=4, samples=8, seed=0)
    logged = await loop.performs(target_runner, rollouts)
    calls = await loop.calls(logged)
    assert len(calls) == 32 and isinstance(logged, ExecutionLogged)
    rewards = {call.item: float(call.reply["choices"][0]["token_ids"][0] % 2) for call in calls if call.reply}
    asked = WeightUpdateRequested(
        generation=1,
        parent="g0a",
        algorithm="reinforce",
        trajectory=logged.trajectory,
        rewards=await loop.ports.blobs.put(msgspec.json.encode(rewards)),
        epochs=2,
        seed=0,
        learning=Learning(lr=served.lr, rank=4, batch_prompts=2),
    )
    told = await loop.performs(trainer, asked)
    assert isinstance(told, WeightsUpdated) and told.probe and told.weights.adapter, told
    assert told.weights.model == served.weights.model and told.rollouts == 32
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
        cards = (await http.get(f"http://127.0.0.1:{served.port}/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == [served.name, told.weights.adapter]
