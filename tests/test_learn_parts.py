"""Groups of many calls: cut between their samples into parts that there is room for, they teach the same as whole."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import CHOICES, spec
from tiny import make_model, stirred
from torch import Tensor

from sia_events.local_model import adapter, network, weights
from sia_events.trainer.algorithms import ALGORITHMS
from sia_events.trainer.batches import Room, parts, room_for
from sia_events.trainer.engines import Engine, Scored
from sia_events.trainer.groups import RolloutGroup, Scene, read
from sia_events.trainer.holding import expected_reward
from sia_events.trainer.learn import learn
from sia_events.trainer.learner import Learner
from sia_events.trainer.opening import opened
from sia_events.trainer.spec import Spec

SAMPLES, CALLS, INFINITE = 8, 6, float("inf")
WIDE = Room(10**6, 10**9)
CUT = sorted(ALGORITHMS.keys() - {"dpo"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def attempts() -> list[dict[str, Any]]:
    """Eight attempts of six calls: all begin with the same prompts, and two of them say the same there."""
    draw = random.Random(3)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(10, 40) for _ in range(draw.randrange(least, most))]

    def wrote(prompt: list[int], said: list[int]) -> dict[str, Any]:
        told = [draw.uniform(-4.2, -3.2) for _ in said]
        return {"kind": "completion", "prompt_ids": prompt, "completion_ids": said, "logprobs": told}

    def chose(prompt: list[int]) -> dict[str, Any]:
        told = {"index": draw.randrange(3), "logprobs": [-1.3, -1.1, -0.9]}
        return {"kind": "choice", "prompt_ids": prompt, "choice_ids": CHOICES, **told}

    begin, same = tokens(8, 9), tokens(3, 4)
    return [
        {
            "group": "a",
            "item": f"a#{sample}",
            "reward": draw.random(),
            "steps": [
                wrote(begin, same if sample in (1, 5) else tokens(1, 6)),
                chose([*begin, 2]),
                *(wrote(tokens(6, 12), tokens(1, 6)) for _ in range(CALLS - 3)),
                chose(tokens(6, 12)),
            ],
        }
        for sample in range(SAMPLES)
    ]


class Narrow:
    """An engine that runs out of memory over more than so many scenes or tokens, and tells how many each pass had."""

    def __init__(self, engine: Engine, scenes: float = INFINITE, tokens: float = INFINITE) -> None:
        self._engine, self._scenes, self._tokens = engine, scenes, tokens
        self.passes: list[int] = []
        self.adapter, self.width, self.device = engine.adapter, engine.width, engine.device
        self.at_once, self.cost, self.served = engine.at_once, engine.cost, engine.served

    def score(
        self, scenes: Sequence[Scene], adapted: bool = True, entropy: bool = False, hidden: bool = False
    ) -> list[list[Scored]]:
        self.passes.append(len(scenes))
        if len(scenes) > self._scenes or self.cost(scenes) > self._tokens:
            raise torch.OutOfMemoryError("the engine is too small")
        return self._engine.score(scenes, adapted, entropy, hidden)


def told(tiny: Path, folder: Path, **options: Any) -> tuple[Spec, list[RolloutGroup]]:
    """A spec that goes on from an adapter, and its one group."""
    folder.mkdir(exist_ok=True)
    start = folder / "start"
    adapter.write(stirred(network.load(tiny), seed=3), start, "tiny", weights.opened(tiny).digest)
    options = {"max_ratio": 50.0, "kl": 0.1, "entropy": 0.01, "credit": "per-step", "clip": 0.2} | options
    given = spec(tiny, folder, attempts(), adapter_in=str(start), **options)
    return given, read(Path(given.rollouts))[0]


def step(
    given: Spec, groups: Sequence[RolloutGroup], room: Room, engine: Engine
) -> tuple[list[Tensor], dict[str, Any]]:
    """The adapter's gradients of one step, and what is told of it."""
    learner = Learner(engine, given, 4, room)
    line = learner.told(1, learner.gradients(groups, fresh=True), seconds=1.0)
    found = [factor.grad for _, pair in sorted(engine.adapter.factors.items()) for factor in pair]
    gradients = [gradient for gradient in found if gradient is not None]
    assert len(gradients) == len(found) and max(float(gradient.abs().max()) for gradient in gradients) > 1e-3
    return gradients, {name: value for name, value in line.items() if not name.startswith("tokens")}


def alike(one: Sequence[Tensor], other: Sequence[Tensor], near: float = 1e-6) -> bool:
    """As near, or where gradients are above 1 as near to that of the largest."""
    near *= max(1.0, *(float(gradient.abs().max()) for gradient in one))
    return all(torch.allclose(a, b, rtol=0, atol=near) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("algorithm", CUT)
def test_a_group_that_is_cut_between_its_samples_has_the_gradients_of_the_whole(
    tiny: Path, tmp_path: Path, algorithm: str
) -> None:
    given, groups = told(tiny, tmp_path, algorithm=algorithm)
    whole, narrow = Narrow(opened(given)[0]), Narrow(opened(given)[0], CALLS)
    uncut, line = step(given, groups, WIDE, whole)
    cut, cut_line = step(given, groups, Room(CALLS + 2, 10**9), narrow)
    assert max(whole.passes) == 1 + SAMPLES * (CALLS - 3)
    assert alike(cut, uncut)
    assert cut_line == pytest.approx(line, rel=1e-6, abs=1e-5)


def test_out_of_memory_halves_a_group_of_many_calls_too(tiny: Path, tmp_path: Path) -> None:
    given, groups = told(tiny, tmp_path, algorithm="grpo")
    whole, narrow = Narrow(opened(given)[0]), Narrow(opened(given)[0], 2 * CALLS)
    uncut, _ = step(given, groups, WIDE, whole)
    cut, _ = step(given, groups, Room(SAMPLES * CALLS // 2, 10**9), narrow)
    assert max(narrow.passes) > 2 * CALLS and alike(cut, uncut)


def in_calls(tiny: Path, folder: Path, **options: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """As `step` tells it, whole; it is made sure that cut into parts of one call it is the same."""
    given, groups = told(tiny, folder, **options)
    uncut, line = step(given, groups, WIDE, opened(given)[0])
    cut, cut_line = step(given, groups, Room(1, 1), Narrow(opened(given)[0], 1))
    assert alike(cut, uncut, near=3e-6)  # 48 parts, and as many roundings
    assert cut_line == pytest.approx(line, rel=1e-6, abs=1e-5)
    return uncut, line


@pytest.mark.parametrize("algorithm", [name for name in CUT if name != "rloo"])
def test_a_sample_that_is_cut_between_its_calls_has_the_gradients_of_the_whole(
    tiny: Path, tmp_path: Path, algorithm: str
) -> None:
    in_calls(tiny, tmp_path, algorithm=algorithm)


def test_a_sample_that_is_cut_between_its_calls_is_masked_as_a_whole(tiny: Path, tmp_path: Path) -> None:
    """By the mean over all of its calls, of which some are nearer to the policy and some farther from it."""
    free, line = in_calls(tiny, tmp_path / "free", algorithm="grpo")
    masked, masked_line = in_calls(tiny, tmp_path / "masked", algorithm="grpo", max_ratio=2.6)
    assert (line["masked"], masked_line["masked"]) == (0, 3) and not alike(free, masked)


def test_where_all_tokens_of_a_sample_have_one_ratio_it_is_not_cut(tiny: Path, tmp_path: Path) -> None:
    given, groups = told(tiny, tmp_path, algorithm="rloo")
    whole, small = Narrow(opened(given)[0]), Narrow(opened(given)[0])
    uncut, line = step(given, groups, WIDE, whole)
    cut, cut_line = step(given, groups, Room(1, 1), small)
    assert alike(cut, uncut) and cut_line == pytest.approx(line, rel=1e-6, abs=1e-5)


def texts(prompt: int, said: int) -> list[dict[str, Any]]:
    """Eight texts of so many tokens that follow one prompt."""
    draw = random.Random(1)
    begin = [draw.randrange(10, 40) for _ in range(prompt)]
    return [
        {
            "group": "a",
            "item": f"a#{sample}",
            "reward": float(sample),
            "steps": [
                {"kind": "completion", "prompt_ids": begin, "logprobs": [-3.7] * said}
                | {"completion_ids": [draw.randrange(10, 40) for _ in range(said)]}
            ],
        }
        for sample in range(SAMPLES)
    ]


def test_out_of_memory_halves_the_texts_of_one_prompt(tiny: Path, tmp_path: Path) -> None:
    given = spec(tiny, tmp_path, texts(prompt=40, said=20), max_ratio=50.0)
    groups = read(Path(given.rollouts))[0]
    whole, narrow = Narrow(opened(given)[0]), Narrow(opened(given)[0], tokens=40 + 20 * 2)
    room = Room(1, 40 + 20 * SAMPLES - 1)
    learned = [step(given, groups, room, engine)[0] for engine in (whole, narrow)]
    assert alike(*learned) and len(narrow.passes) == 1 + SAMPLES // 2


@pytest.mark.parametrize(
    ("algorithm", "calls", "asked", "recomputes"),
    [
        ("rloo", 4, None, None),
        ("rloo", 16, None, True),
        ("rloo", 16, False, False),
        ("dpo", 4, None, True),
        ("grpo", 16, None, None),
    ],
)
def test_a_pass_that_cannot_be_made_smaller_and_is_large_is_computed_anew(
    tiny: Path, tmp_path: Path, algorithm: str, calls: int, asked: bool | None, recomputes: bool | None
) -> None:
    lines = texts(prompt=500, said=1)
    for sample, line in enumerate(lines):
        (step,) = line["steps"]
        line["steps"] = [step | {"prompt_ids": [*step["prompt_ids"], sample, n]} for n in range(calls)]
    with pytest.raises(Opened) as found:
        list(learn(spec(tiny, tmp_path, lines, algorithm=algorithm, recompute=asked), told_spec))
    assert found.value.args[0].learning.recompute is recomputes


class Opened(Exception):
    """An engine was to be opened."""


def told_spec(given: Spec) -> tuple[Engine, weights.ModelFolder]:
    raise Opened(given)


def test_pairs_are_not_cut_apart(tiny: Path, tmp_path: Path) -> None:
    given, groups = told(tiny, tmp_path, algorithm="dpo")
    whole, small = Narrow(opened(given)[0]), Narrow(opened(given)[0])
    uncut, line = step(given, groups, WIDE, whole)
    cut, cut_line = step(given, groups, Room(1, 1), small)
    assert alike(cut, uncut) and cut_line == pytest.approx(line, rel=1e-6, abs=1e-5)


def test_the_reward_that_is_expected_of_a_group_does_not_depend_on_how_it_is_cut(tiny: Path, tmp_path: Path) -> None:
    given, groups = told(tiny, tmp_path)
    whole, narrow = Narrow(opened(given)[0]), Narrow(opened(given)[0], CALLS)
    cut = expected_reward(narrow, groups, Room(CALLS + 2, 10**9))
    assert cut == pytest.approx(expected_reward(whole, groups, WIDE), abs=1e-6)
    by_calls = expected_reward(Narrow(whole, 1), groups, Room(1, 1))
    assert by_calls == pytest.approx(cut, abs=1e-6)


@pytest.mark.parametrize(("name", "samples"), [("own", [8]), ("transformers", [3, 3, 2])])
def test_a_part_has_no_more_tokens_than_are_taken_at_once(
    tiny: Path, tmp_path: Path, name: str, samples: list[int]
) -> None:
    """transformers computes the prompt for every answer anew, our network once."""
    if name == "transformers":
        pytest.importorskip("peft", reason="the extra `train` is not installed")
    given = spec(tiny, tmp_path, texts(prompt=400, said=100), engine=name)
    engine, groups = opened(given)[0], read(Path(given.rollouts))[0]
    cut = [part for (part,) in parts(engine, groups, room_for(engine, groups))]
    assert [len(part.samples) for part in cut] == samples


def test_transformers_computes_as_many_tokens_as_it_says(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra `train` is not installed")
    from sia_events.trainer.hugging_face import HuggingFaceEngine

    given = spec(tiny, tmp_path, texts(prompt=30, said=10), engine="transformers")
    engine, (group,) = opened(given)[0], read(Path(given.rollouts))[0]
    assert isinstance(engine, HuggingFaceEngine)
    computed: list[int] = []
    engine.model.register_forward_pre_hook(
        lambda _, __, given: computed.append(given["input_ids"].numel()), with_kwargs=True
    )
    engine.score(group.scenes)
    assert computed == [engine.cost(group.scenes)] == [SAMPLES * 39]


def test_a_part_for_transformers_has_no_more_tokens_with_all_rows_as_long_as_the_longest(
    tiny: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="the extra `train` is not installed")
    lines = [
        {**line, "group": name} for name, prompt in (("a", 400), ("b", 40), ("c", 50)) for line in texts(prompt, 2)[:2]
    ]
    given = spec(tiny, tmp_path, lines, engine="transformers")
    engine, groups = opened(given)[0], read(Path(given.rollouts))[0]
    assert engine.cost([scene for group in groups for scene in group.scenes]) == 6 * 401
    room = Room(24, 1000)
    assert [[group.name for group in part] for part in parts(engine, groups, room)] == [["a"], ["b", "c"]]
