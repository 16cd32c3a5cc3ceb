"""The two engines behind one seam: the same log-probs, the same first step, the same adapters on disk."""

from pathlib import Path

import pytest
import torch
from lessons import CHOICES, choice_lines, completion_lines, prompts, spec
from safetensors.torch import load_file, save_file
from tiny import WIDTH, make_model, stirred

from sia_events.errors import Unusable
from sia_events.local_model import adapter, network, weights
from sia_events.local_model.weights import MANIFEST, ModelNotReady
from sia_events.run_settings import merged
from sia_events.shared.events import RunSettings
from sia_events.trainer.engines import Engine, OwnEngine, TargetsRefused
from sia_events.trainer.groups import Scene
from sia_events.trainer.learn import learn
from sia_events.trainer.opening import model_folder, opened

pytest.importorskip("peft", reason="the extra `train` is not installed")
pytest.importorskip("transformers", reason="the extra `train` is not installed")

BOTH = ("own", "transformers")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def engines(tiny: Path, folder: Path, **options: object) -> list[Engine]:
    """Both, with one adapter that does change the model."""
    start = folder / "start"
    adapter.write(stirred(network.load(tiny), seed=3), start, "tiny", weights.opened(tiny).digest)
    return [opened(spec(tiny, folder, [], adapter_in=str(start), engine=name, **options))[0] for name in BOTH]


CHOOSING = [Scene(True, prompt, CHOICES, None, 1.0) for prompt in prompts(5, seed=1)]
WRITING = [Scene(False, prompt, ((7, 8, 9), (7, 8), (4,)), None, 0.7) for prompt in prompts(5, seed=2)]


@pytest.mark.parametrize("scenes", [CHOOSING, WRITING], ids=["choices", "text"])
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_both_engines_tell_the_same(
    tiny: Path, tmp_path: Path, scenes: list[Scene], adapted: bool, recompute: bool
) -> None:
    own, other = (
        engine.score(scenes, adapted, entropy=True, hidden=True)
        for engine in engines(tiny, tmp_path, recompute=recompute)
    )
    for mine, theirs in zip(own, other, strict=True):
        for one, two in zip(mine, theirs, strict=True):
            assert one.entropy is not None and two.entropy is not None
            assert one.hidden is not None and two.hidden is not None
            assert one.hidden.shape == (len(one.tokens), WIDTH)
            for name in ("tokens", "entropy", "hidden"):
                assert torch.allclose(getattr(one, name), getattr(two, name), atol=1e-4)


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo", "dpo"])
@pytest.mark.parametrize("lines", [choice_lines, completion_lines])
def test_both_engines_take_the_same_first_step(tiny: Path, tmp_path: Path, lines, algorithm: str) -> None:
    told, made = [], []
    for name in BOTH:
        options = {"algorithm": algorithm, "kl": 0.1, "epochs": 1, "batch_prompts": 8}
        first, *_ = learn(spec(tiny, tmp_path / name, lines(tiny, count=8), engine=name, **options))
        told.append({key: value for key, value in first.items() if key != "tokens_per_second"})
        made.append(adapter.read(tmp_path / name / "adapter", network.load(tiny).modules, "tiny", digest(tiny)))
    assert told[0] == pytest.approx(told[1], abs=1e-4)
    for name, (down, up) in made[0].factors.items():
        # Adam's first step goes by the sign of a gradient: where that is nothing but rounding, either will do.
        apart = (up - made[1].factors[name][1]).abs()
        assert (apart > 1e-4).float().mean() < 0.01
        assert torch.allclose(down, made[1].factors[name][0], atol=1e-3)


def digest(tiny: Path) -> str:
    return weights.opened(tiny).digest


def test_the_embedded_model_is_learned_by_the_network_that_serves_it_on_a_gpu_s_machine_too(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(opened(spec(tiny, tmp_path, []))[0], OwnEngine)


def test_a_folder_without_our_manifest_is_known_by_its_weights(tiny: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("config.json", "model.safetensors"):
        (plain / name).symlink_to(tiny / name)
    assert (model_folder(plain).model, model_folder(plain).digest) == ("plain", digest(tiny))
    (plain / "model.safetensors").unlink()
    with pytest.raises(ModelNotReady, match="no weights in safetensors"):
        model_folder(plain)
    assert (tiny / MANIFEST).exists()


def test_a_folder_whose_weights_are_bfloat16_is_learned_on_in_float32(tiny: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    rounded = {name: matrix.bfloat16() for name, matrix in load_file(tiny / "model.safetensors").items()}
    save_file(rounded, half / "model.safetensors", metadata={"format": "pt"})
    (half / "config.json").write_text((tiny / "config.json").read_text().replace('"float32"', '"bfloat16"'))
    *_, last = learn(spec(half, tmp_path, choice_lines(tiny, count=8), engine="own", epochs=1))
    assert last["stopped"] == "end" and last["probe"]


@pytest.mark.parametrize("name", BOTH)
def test_targets_that_no_layer_is_called_are_refused(tiny: Path, tmp_path: Path, name: str) -> None:
    lines = choice_lines(tiny, count=4)
    with pytest.raises(TargetsRefused, match="No layer's name ends in attention; tiny has down_proj, gate_proj"):
        list(learn(spec(tiny, tmp_path, lines, engine=name, targets=("attention",))))
    list(learn(spec(tiny, tmp_path, lines, engine=name, targets=("q_proj", "v_proj"), epochs=1)))
    made = adapter.read(tmp_path / "adapter", network.load(tiny).modules, "tiny", digest(tiny))
    assert {layer.rsplit(".", 1)[-1] for layer in made.factors} == {"q_proj", "v_proj"}


def held_for_the_backward_pass(engine: Engine) -> int:
    """Bytes of what a pass keeps."""
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.score(CHOOSING)
    return sum(kept)


@pytest.mark.parametrize("name", BOTH)
def test_recomputing_keeps_less_of_a_pass_and_learns_the_same(tiny: Path, tmp_path: Path, name: str) -> None:
    lines, kept, made = choice_lines(tiny, count=8), [], []
    for recompute in (None, False, True):
        settings = spec(tiny, tmp_path / str(recompute), lines, engine=name, recompute=recompute, epochs=1)
        kept.append(held_for_the_backward_pass(opened(settings)[0]))
        list(learn(settings))
        made.append(adapter.read(Path(settings.adapter_out), network.load(tiny).modules, "tiny", digest(tiny)))
    assert kept[0] == kept[1] > 3 * kept[2] > 0
    for name, pair in made[0].factors.items():
        for factor, other in zip(pair, made[2].factors[name], strict=True):
            assert torch.allclose(factor, other, atol=1e-6)


def test_layers_and_recomputing_are_settings_of_a_run() -> None:
    asked = {"learning.targets": ["q_proj", "v_proj"], "learning.recompute": True}
    learning = merged(RunSettings(), asked).learning
    assert (learning.targets, learning.recompute) == (("q_proj", "v_proj"), True)
    with pytest.raises(Unusable, match=r"learning\.targets: Input should be a valid array, not 'q_proj'"):
        merged(RunSettings(), {"learning.targets": "q_proj"})


@pytest.mark.parametrize("name", BOTH)
def test_bfloat16_learns_about_the_same(tiny: Path, tmp_path: Path, name: str) -> None:
    lines, first = choice_lines(tiny, count=8), []
    for dtype in ("float32", "bfloat16"):
        settings = spec(tiny, tmp_path / dtype, lines, engine=name, dtype=dtype, epochs=1)
        first.append(next(iter(learn(settings))))
    assert first[0]["entropy"] == pytest.approx(first[1]["entropy"], abs=0.02)
    assert first[0]["entropy"] != first[1]["entropy"]


def test_what_is_told_of_an_adapter_is_in_the_precision_that_it_is_served_in(tiny: Path, tmp_path: Path) -> None:
    own, _ = engines(tiny, tmp_path, dtype="bfloat16")
    net, made = network.load(tiny), stirred(network.load(tiny), seed=3)
    with torch.no_grad():
        ((scores,),) = network.continuation_logprobs(net, made, net.empty(), [(1, 20, 30)], [[(7, 8, 9)]])
        assert own.served((1, 20, 30), (7, 8, 9)) == pytest.approx(scores.tolist(), abs=1e-5)
