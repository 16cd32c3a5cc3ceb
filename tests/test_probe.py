"""The probe of a new adapter: the real model server, a real gateway before it, and adapters that did not get there."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tiny import stirred
from tiny_served import MODEL, make_home, served
from writing import serving

from sia_events.infra.memory import MemoryBlobs, MemoryBus, SystemTime
from sia_events.infra.models import LocalModels
from sia_events.infra.sandbox import UnsafeProcess
from sia_events.local_model import adapter, network, weights
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.budget import Ledger
from sia_events.model_gateway.door import gateway
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.token import TokenDoor
from sia_events.shared.calls import ModelCall, decode_call
from sia_events.shared.events import Budget, RunSettings, RunStarted, Weights
from sia_events.shared.ports import BudgetSpent, Ports, ProviderAway
from sia_events.shared.record import opening
from sia_events.shared.tree import read_tree, store_tree
from sia_events.trainer.probe import AdapterNotServed, Text, probe

SECRET = "a secret of the tests"
TEXTS: tuple[Text, ...] = (((1, 2, 3, 4), (5, 6, 7)), ((9, 8, 7), (12,)), ((1, 2, 3, 30), (20, 21, 22, 23)))


@dataclass(frozen=True)
class Server:
    folder: weights.ModelFolder
    address: Path

    def adapter(self, seed: int | None, place: Path) -> Path:
        """The folder of an adapter: one that changes the model, or, without a seed, one that changes nothing yet."""
        net = network.load(self.folder.path)
        made = adapter.fresh(net.modules, 4, 8, 0) if seed is None else stirred(net, seed)
        adapter.write(made, place, self.folder.model, self.folder.digest)
        return place

    def learned(self, seed: int | None) -> list[list[float]]:
        """What the learner's own pass tells of the texts."""
        net = network.load(self.folder.path)
        made = None if seed is None else stirred(net, seed)
        told = []
        with torch.inference_mode():
            for prompt, completion in TEXTS:
                ((scores,),) = network.continuation_logprobs(net, made, net.empty(), [prompt], [[completion]])
                told.append(scores.tolist())
        return told

    def post(self, path: str, **body: Any) -> None:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.address)), base_url="http://model") as http:
            assert http.post(path, json=body).status_code == 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    folder = weights.opened(make_home(home))
    with served(home, "--socket", str(home / "s")):
        yield Server(folder, home / "s")


@dataclass(frozen=True)
class Trainer:
    """Who has learned an adapter: its ports, and the gateway's journal."""

    server: Server
    ports: Ports
    scratch: Path

    async def stored(self, seed: int) -> Weights:
        folder = self.server.adapter(seed, self.scratch / f"a{seed}")
        return Weights(model=MODEL, adapter=await store_tree(self.ports.blobs, read_tree(folder)))

    async def recorded(self) -> list[ModelCall]:
        envelopes = await self.ports.bus.traces("r1", "model_call", "trainer.g1")
        return [decode_call(line) for envelope in envelopes for line in envelope.lines]


@pytest.fixture
async def trainer(server: Server, tmp_path: Path) -> AsyncIterator[Trainer]:
    async with training(server, tmp_path, 20.0) as found:
        yield found


@asynccontextmanager
async def training(server: Server, tmp_path: Path, patience: float) -> AsyncIterator[Trainer]:
    async with AsyncExitStack() as stack:
        bus, blobs, door = MemoryBus(), MemoryBlobs(), TokenDoor(tmp_path / "g", SECRET)
        settings = RunSettings(budget=Budget(calls=100))
        await bus.append("r1", opening("r1", [RunStarted(settings=settings, code="test")]))
        models = LocalModels(blobs, tmp_path / "adapters", server.address)
        stack.push_async_callback(models.aclose)
        journal, ledger = Journal(bus), Ledger(bus, SystemTime(), lambda model, usage: 0.0)
        stack.push_async_callback(journal.close)
        calls = Calls(journal, lambda model: models, SystemTime(), ledger, patience)
        await stack.enter_async_context(serving(gateway(calls, SECRET, SystemTime()), door.socket))
        yield Trainer(server, Ports(bus, blobs, UnsafeProcess(), SystemTime(), door, tmp_path), tmp_path)


BASE = Weights(model=MODEL)


async def test_an_adapter_that_is_served_is_proved_to_be_by_calls_on_the_record(trainer: Trainer) -> None:
    learned = await trainer.stored(1)
    found = await probe(trainer.ports, "r1", "g1", learned, BASE, TEXTS, trainer.server.learned(1))
    assert (found.texts, found.tokens) == (3, 8)
    assert found.apart < 1e-3 < 0.1 < found.moved
    calls = await trainer.recorded()
    assert [(call.role, call.kind, call.adapter) for call in calls] == [
        *[("trainer", "logprobs", learned.adapter)] * 3,
        *[("trainer", "logprobs", None)] * 3,
    ]
    # All texts are on their way at once.
    lengths = sorted(len(prompt) + len(said) for prompt, said in TEXTS)
    assert sorted(call.prompt_tokens for call in calls[:3]) == lengths


async def test_an_adapter_that_learned_from_another_is_compared_with_that(trainer: Trainer) -> None:
    before, learned = await trainer.stored(2), await trainer.stored(3)
    found = await probe(trainer.ports, "r1", "g1", learned, before, TEXTS, trainer.server.learned(3))
    apart = [
        abs(a - b)
        for one, two in zip(trainer.server.learned(3), trainer.server.learned(2), strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    assert found.moved == pytest.approx(max(apart), abs=1e-3)


async def test_an_adapter_whose_name_serves_what_it_started_from_fails_loudly_until_it_is_served(
    trainer: Trainer,
) -> None:
    learned = await trainer.stored(4)
    nothing = trainer.server.adapter(None, trainer.scratch / "nothing")
    trainer.server.post("/v1/load_lora_adapter", lora_name=learned.adapter, lora_path=str(nothing))
    with pytest.raises(AdapterNotServed, match="what it started from is served in its place"):
        await probe(trainer.ports, "r1", "g1", learned, BASE, TEXTS, trainer.server.learned(4))
    trainer.server.post("/v1/unload_lora_adapter", lora_name=learned.adapter)
    found = await probe(trainer.ports, "r1", "g1", learned, BASE, TEXTS, trainer.server.learned(4))
    assert found.apart < 1e-3, "it was asked anew, and not answered from the journal"


async def test_an_adapter_whose_name_serves_another_one_fails_loudly(trainer: Trainer) -> None:
    learned = await trainer.stored(5)
    other = trainer.server.adapter(6, trainer.scratch / "other")
    trainer.server.post("/v1/load_lora_adapter", lora_name=learned.adapter, lora_path=str(other))
    with pytest.raises(AdapterNotServed, match="other weights are served under its name"):
        await probe(trainer.ports, "r1", "g1", learned, BASE, TEXTS, trainer.server.learned(5))


async def test_an_adapter_that_moved_less_than_the_tolerance_is_still_told_from_none(trainer: Trainer) -> None:
    learned = await trainer.stored(7)
    nothing = trainer.server.adapter(None, trainer.scratch / "nothing")
    trainer.server.post("/v1/load_lora_adapter", lora_name=learned.adapter, lora_path=str(nothing))
    little = [[score + 5e-4 for score in scores] for scores in trainer.server.learned(None)]
    with pytest.raises(AdapterNotServed, match="what it started from"):
        await probe(trainer.ports, "r1", "g1", learned, BASE, TEXTS, little)


async def test_an_adapter_that_the_server_refuses_did_not_reach_it(trainer: Trainer) -> None:
    folder = trainer.server.adapter(8, trainer.scratch / "broken")
    (folder / adapter.CONFIG).write_text("{}")
    broken = Weights(model=MODEL, adapter=await store_tree(trainer.ports.blobs, read_tree(folder)))
    with pytest.raises(AdapterNotServed, match="refused"):
        await probe(trainer.ports, "r1", "g1", broken, BASE, TEXTS, trainer.server.learned(8))


@pytest.mark.parametrize(("status", "kind"), [(500, AdapterNotServed), (503, ProviderAway), (200, AdapterNotServed)])
async def test_a_reply_that_is_no_json_is_told_as_it_came(status: int, kind: type[Exception], tmp_path: Path) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"upstream fell over"})

    door = TokenDoor(tmp_path / "g", SECRET)
    async with serving(broken, door.socket):
        ports = Ports(MemoryBus(), MemoryBlobs(), UnsafeProcess(), SystemTime(), door, tmp_path)
        with pytest.raises(kind, match=rf"{MODEL} .* \({status}\): upstream fell over"):
            await probe(ports, "r1", "g1", BASE, BASE, TEXTS, [[0.0] * 3, [0.0], [0.0] * 4])


@pytest.mark.parametrize("own", [[[0.0] * 3], [[0.0] * 3, [0.0], [0.0] * 3], [[0.0] * 3, [float("nan")], [0.0] * 4]])
async def test_a_learner_that_does_not_tell_of_every_token_proves_nothing(trainer: Trainer, own: Sequence[Any]) -> None:
    with pytest.raises(AdapterNotServed):
        await probe(trainer.ports, "r1", "g1", BASE, BASE, TEXTS, own)


async def test_a_probe_waits_for_its_budget_as_every_call_does(trainer: Trainer) -> None:
    for _ in range(16):
        await probe(trainer.ports, "r1", "g1", BASE, BASE, TEXTS, trainer.server.learned(None))
    with pytest.raises(BudgetSpent, match="100 calls"):
        await probe(trainer.ports, "r1", "g1", BASE, BASE, TEXTS, trainer.server.learned(None))


async def test_log_probs_of_given_tokens_are_not_for_agents(trainer: Trainer) -> None:
    expires = (trainer.ports.clock.now() + timedelta(minutes=1)).timestamp()
    claims = {"run": "r1", "attempt": "g0a.dev", "start": "s", "version": "g0a", "model": MODEL, "adapter": None}
    token = trainer.ports.door.token({**claims, "sample": False, "seed": 0, "expires": expires})
    transport = httpx.AsyncHTTPTransport(uds=str(trainer.ports.door.socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        body = {"prompt_token_ids": [1], "completion_token_ids": [2]}
        reply = await http.post("/v1/logprobs", json=body, headers={"Authorization": f"Bearer {token}"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (403, "permission_error")


async def test_a_server_that_is_away_is_no_fault_of_the_adapter(server: Server, tmp_path: Path) -> None:
    async with training(replace(server, address=tmp_path / "nobody"), tmp_path, 0.1) as trainer:
        with pytest.raises(ProviderAway, match="the model server does not answer"):
            await probe(trainer.ports, "r1", "g1", BASE, BASE, TEXTS, server.learned(None))


START, OTHER = "what it started from is served", "other weights are served"


@pytest.mark.parametrize(
    ("learned", "served", "told"),
    [
        ([0.2], [0.0], START),
        ([0.2], [0.01], START),
        ([0.2], [-0.2], OTHER),
        ([0.1], [-0.1], OTHER),
        ([0.2], [0.6], OTHER),
        ([0.02], [0.0], START),
        ([0.2], [0.15], None),
        ([0.02], [0.06], None),
        ([0.0], [0.0], None),
        ([0.0], [-0.05], None),
        ([0.15, 0.0] * 20, [0.01, 0.02] * 20, None),
        ([0.3, 0.0] * 20, [0.01, 0.02] * 20, START),
        ([0.01] * 40, [0.4, *[-0.03, 0.04] * 19, 0.0], None),
        ([0.01] * 40, [1.2, *[-0.03, 0.04] * 19, 0.0], OTHER),
    ],
)
async def test_on_a_server_that_rounds_what_it_serves_is_told_by_all_tokens_together(
    monkeypatch: pytest.MonkeyPatch, learned: list[float], served: list[float], told: str | None
) -> None:
    scores = iter([[[-1.0 + by for by in served]], [[-1.0] * len(served)]])

    async def scored(*_: Any) -> Any:
        return next(scores)

    monkeypatch.setattr("sia_events.trainer.probe._scored", scored)
    base = Weights(model="vllm/m")
    adapted, text = base.model_copy(update={"adapter": "a" * 64}), ((1,), tuple(range(len(served))))
    ports: Any = None
    asked = probe(ports, "r1", "g1", adapted, base, [text], [[-1.0 + by for by in learned]])
    if told is None:
        assert (await asked).moved == pytest.approx(max(map(abs, served)), abs=1e-6)
    else:
        with pytest.raises(AdapterNotServed, match=told):
            await asked
