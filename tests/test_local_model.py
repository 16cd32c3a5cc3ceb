"""The embedded model: its arithmetic against the reference library, its distributions, its adapters, its server."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCABULARY, make_model, stirred

from sia_events.infra.memory import MemoryBlobs
from sia_events.infra.models import LocalModels
from sia_events.local_model import adapter, network, weights
from sia_events.local_model import policy as policy_module
from sia_events.local_model import server as server_module
from sia_events.local_model.policy import ChoiceRequest, Policy, TextRequest, common_length, even, families
from sia_events.shared.ports import Choice
from sia_events.shared.tree import read_tree, store_tree

CHOICES = ((3,), (4,), (5, 6, 7), (5, 8))
PROMPTS = [(1, 2, 9, 9, 10), (1, 2, 9, 11), (1, 2, 9, 12, 13, 14, 15), (20, 21)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def policy(tiny: Path, end_token: int = 0) -> Policy:
    return Policy(network.load(tiny), end_token)


def choice(
    prompt: tuple[int, ...], temperature: float = 0.0, seed: int = 0, bias: Any = None, model: str | None = None
) -> ChoiceRequest:
    return ChoiceRequest(model, prompt, CHOICES, bias, temperature, seed)


def text(
    prompt: tuple[int, ...], seed: int = 0, temperature: float = 1.0, top_p: float = 1.0, tokens: int = 6
) -> TextRequest:
    return TextRequest(None, prompt, tokens, temperature, top_p, seed, lambda _: False)


def full_pass(net: network.Network, tokens: tuple[int, ...], lora: adapter.Adapter | None = None) -> Any:
    """Log-probs after every token, in one pass with nothing shared or padded: the plain reference."""
    hidden, _ = net.extend(net.empty(), [tokens], lora)
    return torch.log_softmax(net.logits(hidden[0]), dim=-1)


def test_the_network_computes_what_the_reference_library_does(tiny: Path) -> None:
    transformers = importlib.import_module("transformers")
    tokens = (1, 2, 9, 9, 10, 30, 31)
    reference = transformers.LlamaForCausalLM.from_pretrained(tiny)
    with torch.inference_mode():
        expected = torch.log_softmax(reference(torch.tensor([tokens])).logits[0], dim=-1)
    assert torch.allclose(full_pass(network.load(tiny), tokens), expected, atol=1e-4)


def test_an_adapter_written_here_is_read_alike_by_peft_and_by_us(tiny: Path, tmp_path: Path) -> None:
    peft, transformers = importlib.import_module("peft"), importlib.import_module("transformers")
    net, folder = network.load(tiny), weights.opened(tiny)
    made = stirred(net, seed=1)
    adapter.write(made, tmp_path / "a", "tiny", folder.digest)
    again = adapter.read(tmp_path / "a", net.modules, "tiny", folder.digest)
    reference = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(tiny), tmp_path / "a")
    tokens = (1, 2, 9, 9, 10)
    with torch.inference_mode():
        expected = torch.log_softmax(reference(torch.tensor([tokens])).logits[0], dim=-1)
    assert torch.allclose(full_pass(net, tokens, again), expected, atol=1e-4)
    assert not torch.allclose(full_pass(net, tokens), expected, atol=1e-1)


def test_choices_score_as_in_a_plain_pass_whatever_is_shared_and_padded(tiny: Path) -> None:
    model = policy(tiny)
    net = network.load(tiny)
    for _ in range(2):
        replies = model.choose([choice(prompt) for prompt in PROMPTS])
        model._scores.clear()  # the second round computes again, on prefixes kept from the first
        for prompt, reply in zip(PROMPTS, replies, strict=True):
            for continuation, raw in zip(CHOICES, reply.raw, strict=True):
                after = full_pass(net, prompt + continuation)
                expected = sum(float(after[len(prompt) - 1 + at, token]) for at, token in enumerate(continuation))
                assert raw == pytest.approx(expected, abs=1e-4)


class Watched:
    """A network that notes how many key-value slots each pass holds, and what it adds: (rows, the longest)."""

    def __init__(self, net: network.Network) -> None:
        self.net, self.slots, self.added = net, list[int](), list[tuple[int, int]]()

    def extend(self, state: network.State, rows: Any, lora: Any) -> Any:
        hidden, state = self.net.extend(state, rows, lora)
        self.slots.append(state.valid.numel())
        self.added.append((len(rows), max(map(len, rows))))
        return hidden, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)


def test_many_long_choices_behind_long_prompts_hold_no_more_than_a_pass_may(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "SLOTS", 600)
    monkeypatch.setattr(policy_module, "SLOTS", 600)
    choices = tuple((3 + at % 30, 3 + at // 30, *([5] * (at % 3))) for at in range(77))
    prompts = [(*([2] * 30), 3 + at, *([4] * 10)) for at in range(30)]
    requests = [ChoiceRequest(None, prompt, choices, None, 0.0, 0) for prompt in prompts]
    watched = Watched(network.load(tiny))
    replies = Policy(watched, 0).choose(requests)  # type: ignore[arg-type]
    assert max(watched.slots) <= 600
    monkeypatch.setattr(network, "SLOTS", 10**9)
    whole = policy(tiny).choose(requests)
    assert all(a.raw == pytest.approx(b.raw, abs=1e-4) for a, b in zip(replies, whole, strict=True))


def test_samples_of_several_prompts_read_each_prompt_once_and_go_on_in_step(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "PASS_COST", 0)
    watched = Watched(network.load(tiny))
    asked = [text(prompt, seed=at) for prompt in PROMPTS for at in range(8)]
    replies = Policy(watched, end_token=VOCABULARY).generate(asked)  # type: ignore[arg-type]
    steps = [rows for rows, width in watched.added if rows == len(asked)]
    read = sum(rows * width for rows, width in watched.added if rows != len(asked))
    assert len(steps) == 5 and read <= sum(map(len, PROMPTS))
    alone = [policy(tiny, end_token=VOCABULARY).generate([one])[0] for one in asked]
    assert [reply.tokens for reply in replies] == [reply.tokens for reply in alone]
    assert all(a.logprobs == pytest.approx(b.logprobs, abs=1e-4) for a, b in zip(replies, alone, strict=True))


def test_a_start_that_long_and_short_prompts_share_is_read_before_they_are_read_apart(tiny: Path) -> None:
    start, watched = tuple(range(2, 35)) * 6, Watched(network.load(tiny))
    short, long = [(*start, 30)], [(*start, *([at] * 150)) for at in (3, 4)]
    Policy(watched, 0).generate([text(prompt, tokens=1) for prompt in (*short, *long)])  # type: ignore[arg-type]
    assert watched.added == [(1, len(start)), (1, 1), (2, 150)]


def test_texts_of_many_long_prompts_hold_no_more_than_a_pass_may(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_module, "SLOTS", 300)
    watched = Watched(network.load(tiny))
    asked = [text((*([2] * (at % 40)), 3 + at % 30), seed=at, tokens=20) for at in range(60)]
    replies = Policy(watched, end_token=VOCABULARY).generate(asked)  # type: ignore[arg-type]
    assert max(watched.slots) <= 300 and max(rows for rows, _ in watched.added) > 4
    assert all(len(reply.tokens) == 20 for reply in replies)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=9))
def test_rows_are_cut_into_passes_where_that_is_cheapest(lengths: list[int]) -> None:
    lengths = sorted(lengths)

    def cost(runs: list[list[int]]) -> int:
        return sum(len(run) * lengths[run[-1]] + policy_module.PASS_COST for run in runs)

    places = list(range(len(lengths)))
    ways = [
        [places[begin:end] for begin, end in pairwise((0, *cuts, len(places)))]
        for count in range(len(places))
        for cuts in combinations(places[1:], count)
    ]
    found = even(places, lengths)
    assert [place for run in found for place in run] == places and cost(found) == min(map(cost, ways))


def test_choice_logprobs_are_normalised_with_bias_and_temperature(tiny: Path) -> None:
    bias = (0.5, -1.0, 2.0, 0.0)
    reply = policy(tiny).choose([choice(PROMPTS[0], temperature=0.7, bias=bias)])[0]
    scaled = [(raw + b) / 0.7 for raw, b in zip(reply.raw, bias, strict=True)]
    total = math.log(sum(math.exp(s) for s in scaled))
    assert reply.logprobs == pytest.approx([s - total for s in scaled])
    assert sum(map(math.exp, reply.logprobs)) == pytest.approx(1)


def test_at_temperature_zero_the_likeliest_choice_is_taken(tiny: Path) -> None:
    plain, pushed = policy(tiny).choose([choice(PROMPTS[0]), choice(PROMPTS[0], bias=(0, 50, 0, 0))])
    assert plain.index == max(range(4), key=lambda i: plain.raw[i])
    assert pushed.index == 1


def test_choices_are_drawn_as_often_as_their_logprobs_say(tiny: Path) -> None:
    replies = policy(tiny).choose([choice(PROMPTS[1], temperature=2.0, seed=seed) for seed in range(4000)])
    seen = Counter(reply.index for reply in replies)
    for index, logprob in enumerate(replies[0].logprobs):
        share = math.exp(logprob)
        assert abs(seen[index] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000) + 1e-3


def test_a_seed_gives_the_same_reply_alone_and_in_company(tiny: Path) -> None:
    asked = [text(prompt, seed=11 + at) for at, prompt in enumerate(PROMPTS)]
    together = policy(tiny).generate(asked)
    alone = [policy(tiny).generate([one])[0] for one in reversed(asked)][::-1]
    assert [reply.tokens for reply in together] == [reply.tokens for reply in alone]
    other = policy(tiny).generate([text(PROMPTS[0], seed=99, tokens=12)])
    assert other[0].tokens[:6] != together[0].tokens


def test_text_logprobs_are_those_of_the_distribution_that_was_sampled(tiny: Path) -> None:
    net = network.load(tiny)
    sampled = policy(tiny).generate([text(PROMPTS[0], seed=5, temperature=0.6)])[0]
    hidden, _ = net.extend(net.empty(), [PROMPTS[0] + sampled.tokens], None)
    after = torch.log_softmax(net.logits(hidden[0]) / 0.6, dim=-1)
    expected = [float(after[len(PROMPTS[0]) - 1 + at, token]) for at, token in enumerate(sampled.tokens)]
    assert sampled.logprobs == pytest.approx(expected, abs=1e-4)


def test_top_p_leaves_only_the_likeliest_tokens_and_says_so_in_the_logprobs(tiny: Path) -> None:
    replies = policy(tiny).generate([text(PROMPTS[0], seed=seed, top_p=1e-6, tokens=3) for seed in range(5)])
    greedy = policy(tiny).generate([text(PROMPTS[0], temperature=0.0, tokens=3)])[0]
    assert {reply.tokens for reply in replies} == {greedy.tokens}
    assert all(reply.logprobs == (0.0, 0.0, 0.0) for reply in replies)


def test_generation_ends_at_the_end_token_at_a_stop_and_at_the_limit(tiny: Path) -> None:
    greedy = policy(tiny).generate([text(PROMPTS[0], temperature=0.0, tokens=5)])[0]
    assert (len(greedy.tokens), greedy.finish) == (5, "length")
    ended = policy(tiny, end_token=greedy.tokens[0]).generate([text(PROMPTS[0], temperature=0.0, tokens=5)])[0]
    assert (ended.tokens, ended.finish) == (greedy.tokens[:1], "stop")
    stop = TextRequest(None, PROMPTS[0], 5, 0.0, 1.0, 0, lambda tokens: len(tokens) == 2)
    assert policy(tiny).generate([stop])[0].tokens == greedy.tokens[:2]


def test_a_forgotten_adapter_leaves_nothing_behind_for_the_next_of_its_name(tiny: Path) -> None:
    model, net = policy(tiny), network.load(tiny)
    raws = []
    for seed in (1, 2):
        model.adapters["v"] = stirred(net, seed)
        raws.append(model.choose([choice(PROMPTS[0], model="v"), choice(PROMPTS[0])]))
        model.forget("v")
    fresh = policy(tiny)
    fresh.adapters["v"] = stirred(net, 2)
    assert raws[0][0].raw != raws[1][0].raw
    assert raws[0][1].raw == raws[1][1].raw
    assert raws[1][0].raw == pytest.approx(fresh.choose([choice(PROMPTS[0], model="v")])[0].raw, abs=1e-4)


def test_prompts_of_two_templates_run_apart_and_the_rest_together(tiny: Path) -> None:
    one, other = tuple(range(2, 39)) * 6, tuple(range(38, 1, -1)) * 6
    prompts = [(*stem, at) for at in range(8) for stem in (one, other)]
    batches = policy(tiny)._batches(None, prompts, room=1)
    assert sorted(map(len, batches)) == [8, 8]
    assert all(common_length([prompts[i] for i in batch]) >= len(one) for batch in batches)
    assert sorted(i for batch in batches for i in batch) == list(range(16))


def test_a_long_template_that_sorts_behind_the_rest_is_computed_once(tiny: Path) -> None:
    stem = tuple(range(2, 22))
    short = [(*stem, 1, 30 + at) for at in range(6)]
    long = [(*stem, 9, *range(2, 39), *range(2, 39), *range(2, 39), 30 + at) for at in range(3)]
    assert families([*short, *long]) == [[6, 7, 8], [0, 1, 2, 3, 4, 5]]
    assert families([*short, long[0]]) == [[*range(7)]], "a lone one computes the rest of its prompt in either pass"
    assert families([*short, long[0]], [long[0][:-1]]) == [[6], [*range(6)]], "but that is there already"
    assert families([*short, *short]) == [[0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]]


def test_what_serves_and_what_learns_multiply_alike(tiny: Path) -> None:
    net = network.load(tiny)
    for rows in (1, 3, 4, 5, 40):
        hidden = torch.randn(rows, net.weight("model.embed_tokens").shape[1], generator=torch.manual_seed(rows))
        learned = net.logits(hidden)
        with torch.inference_mode():
            assert torch.allclose(net.logits(hidden), learned, atol=1e-5)


def damage(folder: Path, **config: Any) -> None:
    path = folder / adapter.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def poison(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / adapter.WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / adapter.WEIGHTS)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda folder: damage(folder, base_model_name_or_path="other"), "belongs to 'other'"),
        (lambda folder: damage(folder, revision="0" * 64), "trained on other weights"),
        (lambda folder: damage(folder, peft_type="IA3"), "peft_type is 'IA3'"),
        (lambda folder: damage(folder, use_dora=True), "use_dora"),
        (lambda folder: damage(folder, r=5), r"rank 5 on this layer needs"),
        (poison, "not finite"),
        (lambda folder: (folder / adapter.WEIGHTS).write_bytes(b"\x80\x04pickle"), "no adapter folder"),
        (lambda folder: (folder / adapter.WEIGHTS).rename(folder / "adapter_model.bin"), "no adapter folder"),
        (lambda folder: (folder / adapter.CONFIG).write_text("[1]"), "no adapter folder"),
    ],
)
def test_a_folder_that_is_no_adapter_of_this_model_is_refused(
    tiny: Path, tmp_path: Path, break_it: Any, says: str
) -> None:
    net, digest = network.load(tiny), weights.opened(tiny).digest
    adapter.write(stirred(net, 1), tmp_path / "a", "tiny", digest)
    break_it(tmp_path / "a")
    with pytest.raises(adapter.AdapterRefused, match=says):
        adapter.read(tmp_path / "a", net.modules, "tiny", digest)


def test_a_damaged_model_folder_is_named_with_its_mend(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "m")
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(weights.ModelNotReady) as refused:
        weights.opened(copy)
    assert refused.value.fix.startswith(f"rm -r {copy}")


def test_a_model_folder_is_made_once_by_those_who_race_for_it(tmp_path: Path) -> None:
    made: list[str] = []

    def fill(draft: Path) -> None:
        made.append((draft / "part").name)
        (draft / "part").write_text("whole")

    (tmp_path / ".m.draft").mkdir()
    (tmp_path / ".m.draft" / "left by one that died").touch()
    with ThreadPoolExecutor(8) as racers:
        list(racers.map(lambda _: weights.install(tmp_path / "m", fill), range(8)))
    assert made == ["part"]
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["part"]


def test_a_model_folder_that_failed_to_be_made_is_not_there(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        (draft / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        weights.install(tmp_path / "m", fail)
    assert not (tmp_path / "m").exists()


# From here on the real model.

BASE = weights.MODEL
MENTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def home(pytestconfig: pytest.Config) -> Path:
    """Where the converted model is kept between test runs: converting it takes half a minute."""
    assert pytestconfig.cache
    return pytestconfig.cache.mkdir("model-home")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("socket") / "s"


@pytest.fixture(scope="module")
def server(home: Path, address: Path) -> Iterator[httpx.Client]:
    child = start(home, "--socket", str(address))
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(address)), base_url="http://model", timeout=120) as client:
        yield client
    assert child.stdin
    child.stdin.close()
    assert child.wait(10) == 1


def start(home: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "sia_events.local_model.server",
        "--home",
        str(home),
        "--die-with-parent",
        *options,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert child.stdout
    assert json.loads(child.stdout.readline())["ready"]
    return child


@pytest.mark.model
def test_the_model_answers_a_chat(server: httpx.Client) -> None:
    reply = server.post(
        "/v1/chat/completions", json={"model": BASE, "messages": MENTION, "temperature": 0, "max_tokens": 20}
    ).json()
    said = reply["choices"][0]
    assert said["message"]["content"] == "The capital of France is Paris."
    assert said["finish_reason"] == "stop"
    assert len(said["token_ids"]) == len(said["logprobs"]["content"]) == reply["usage"]["completion_tokens"]
    assert len(reply["prompt_token_ids"]) == reply["usage"]["prompt_tokens"]


@pytest.mark.model
def test_a_last_assistant_message_is_continued_and_a_stop_is_left_out(server: httpx.Client) -> None:
    body = {
        "model": BASE,
        "messages": [*MENTION, {"role": "assistant", "content": "The capital of France is"}],
        "temperature": 0,
        "stop": ["."],
        "max_tokens": 20,
    }
    said = server.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert said["message"]["content"] == " Paris"
    assert said["finish_reason"] == "stop"


@pytest.mark.model
def test_a_choice_is_drawn_again_alike_by_its_seed_among_sixty_at_once(server: httpx.Client) -> None:
    body = {
        "model": BASE,
        "messages": [*MENTION, {"role": "assistant", "content": "It is"}],
        "choices": [" Paris", " London", " New York"],
        "temperature": 3,
    }

    def ask(seed: int) -> dict[str, Any]:
        return server.post("/v1/choice", json=body | {"seed": seed}).json()

    with ThreadPoolExecutor(60) as crowd:
        first = list(crowd.map(ask, range(60)))
        again = list(crowd.map(ask, reversed(range(60))))[::-1]
    assert [reply["index"] for reply in first] == [reply["index"] for reply in again]
    assert len({reply["index"] for reply in first}) > 1
    assert all(reply["choice"] == body["choices"][reply["index"]] for reply in first)


@pytest.mark.model
def test_an_adapter_is_served_by_name_beside_the_base(server: httpx.Client, home: Path, tmp_path: Path) -> None:
    folder = weights.prepare(home)
    net = network.load(folder.path)
    body = {"messages": MENTION, "choices": ["Paris", "London"], "temperature": 0}
    plain = server.post("/v1/choice", json=body | {"model": BASE}).json()["raw"]
    for name, made in (("same", adapter.fresh(net.modules, 4, 8, 0)), ("other", stirred(net, 0))):
        adapter.write(made, tmp_path / name, folder.model, folder.digest)
        for _ in range(2):
            assert (
                server.post(
                    "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(tmp_path / name)}
                ).status_code
                == 200
            )
    assert {card["id"] for card in server.get("/v1/models").json()["data"]} == {BASE, "same", "other"}
    assert server.post("/v1/choice", json=body | {"model": "same"}).json()["raw"] == pytest.approx(plain, abs=1e-4)
    assert server.post("/v1/choice", json=body | {"model": "other"}).json()["raw"] != pytest.approx(plain, abs=1e-1)
    taken = server.post("/v1/load_lora_adapter", json={"lora_name": "same", "lora_path": str(tmp_path / "other")})
    assert (taken.status_code, "taken" in taken.json()["error"]["message"]) == (400, True)
    for name in ("same", "other"):
        assert server.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
    assert server.post("/v1/choice", json=body | {"model": "same"}).status_code == 404


@pytest.mark.model
async def test_of_too_many_adapters_the_one_not_asked_for_longest_is_dropped(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "KEPT_ADAPTERS", 2)
    folder = weights.prepare(home)
    api = server_module.Api(folder)
    adapter.write(adapter.fresh(api._network.modules, 1, 1, 0), tmp_path / "a", folder.model, folder.digest)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api.app()), base_url="http://model") as client:

        async def choose(name: str) -> int:
            body = {"model": name, "messages": MENTION, "choices": ["Paris", "London"]}
            return (await client.post("/v1/choice", json=body)).status_code

        async def load(name: str) -> None:
            body = {"lora_name": name, "lora_path": str(tmp_path / "a")}
            assert (await client.post("/v1/load_lora_adapter", json=body)).status_code == 200

        await load("one")
        await load("two")
        assert await choose("one") == 200
        await load("three")
        assert [await choose(name) for name in ("one", "two", "three")] == [200, 404, 200]
        await load("two")
        assert await choose("two") == 200
        assert len(api._engine._policy.adapters) == 2


@pytest.mark.model
async def test_an_adapter_is_laid_down_from_its_blobs_whatever_a_folder_of_its_name_holds(
    server: httpx.Client, address: Path, home: Path, tmp_path: Path
) -> None:
    folder = weights.prepare(home)
    net = network.load(folder.path)
    adapter.write(stirred(net, 3), tmp_path / "good", folder.model, folder.digest)
    adapter.write(stirred(net, 4), tmp_path / "other", folder.model, folder.digest)
    blobs = MemoryBlobs()
    digest = await store_tree(blobs, read_tree(tmp_path / "good"))
    shutil.copytree(tmp_path / "other", tmp_path / "adapters" / digest)
    models = LocalModels(blobs, tmp_path / "adapters", address)
    try:
        reply = await models.choose(Choice(f"local/{BASE}", digest, MENTION, ["Paris", "London"]))
    finally:
        await models.aclose()
    listed = server.get("/v1/models").json()["data"]  # noqa: ASYNC212 - nothing else is to go on meanwhile
    good = server_module._digest(tmp_path / "good")
    assert [card["sha256"] for card in listed if card["id"] == digest] == [good] and len(reply["raw"]) == 2
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == [digest], "nothing is left lying about"


@pytest.mark.model
@pytest.mark.parametrize(
    ("path", "change", "status", "says"),
    [
        ("choice", {"model": "nobody"}, 404, "Served: smollm2"),
        ("choice", {"choices": []}, 400, r"\$.choices"),
        ("choice", {"choices": [" a", ""]}, 400, r"\$.choices"),
        ("choice", {"bias": [1.0]}, 400, "bias has 1 numbers for 2 choices"),
        ("choice", {"temperature": -1}, 400, r"\$.temperature"),
        ("choice", {"messages": []}, 400, r"\$.messages"),
        ("choice", {"messages": [{"role": "tool", "content": "x"}]}, 400, "role 'tool'"),
        ("choice", {"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "Shorten the prompt"),
        (
            "choice",
            {"messages": [{"role": "user", "content": "word " * 1500}], "choices": [" a choice of words"] * 512},
            400,
            "512 choices of up to 4 tokens .* fewer choices",
        ),
        ("chat/completions", {"max_tokens": 4096}, 400, "lower max_tokens"),
        ("chat/completions", {"stream": True}, 400, "Streaming"),
        ("chat/completions", {"n": 2}, 400, r"\$.n"),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "/nowhere"}, 400, "no adapter folder"),
        ("unload_lora_adapter", {"lora_name": "x"}, 404, "not served"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(
    server: httpx.Client, path: str, change: dict[str, Any], status: int, says: str
) -> None:
    body = {"model": BASE, "messages": MENTION, "choices": [" a", " b"]} | change
    reply = server.post(f"/v1/{path}", json=body)
    assert reply.status_code == status
    assert re.search(says, reply.json()["error"]["message"])
