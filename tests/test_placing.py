"""Where a model of Hugging Face is laid for learning, by how many GPUs there are. The GPUs are said to be there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import choice_lines, spec
from tiny import make_model

from sia_events.trainer.learn import learn
from sia_events.trainer.opening import opened

pytest.importorskip("peft", reason="the extra `train` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `train` is not installed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """With what models are loaded; they are then laid on the CPU, as accelerate lays all where no GPU has room."""
    told: list[dict[str, Any]] = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(path: Path, **options: Any) -> Any:
        told.append(options)
        return load(path, **options | {"device_map": "cpu"})

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return told


@pytest.mark.parametrize(
    ("gpus", "place", "dtype"),
    [(0, "cpu", torch.float32), (1, "cuda", torch.bfloat16), (2, "auto", torch.bfloat16)],
)
def test_of_several_gpus_each_holds_some_layers_in_bfloat16_and_of_one_it_holds_all(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loaded: list[dict[str, Any]],
    gpus: int,
    place: str,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    engine, _ = opened(spec(tiny, tmp_path, [], engine="transformers"))
    (options,) = loaded
    assert (options["device_map"], options["dtype"]) == (place, dtype)
    assert {factor.dtype for pair in engine.adapter.factors.values() for factor in pair} == {torch.float32}


def test_a_base_in_bfloat16_over_two_gpus_is_learned_on_by_one_process(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    *_, last = learn(spec(tiny, tmp_path, choice_lines(tiny, count=8), engine="transformers", epochs=1))
    assert last["stopped"] == "end" and len(loaded) == 1
