"""Which runs are refused before they begin because their weights could not be learned: rollouts are paid for first."""

import json
from pathlib import Path

import pytest
from command import sia

from sia_events.errors import Unusable
from sia_events.run_settings import merged
from sia_events.shared.events import LeverPolicy, RunSettings
from sia_events.shared.settings import Settings
from sia_events.starting import require_learnable

CONTROLS: tuple[LeverPolicy, ...] = ("weights", "alternate", "random")


def require(home: Path, model: str, lever: LeverPolicy, nats_url: str | None = None) -> None:
    require_learnable(Settings(home=home, nats_url=nats_url), RunSettings(target_model=model, lever=lever))


@pytest.mark.parametrize("lever", CONTROLS)
def test_a_control_that_pulls_the_weights_of_a_hosted_model_is_refused(tmp_path: Path, lever: LeverPolicy):
    with pytest.raises(Unusable, match=f"--lever {lever} would train ollama/m, whose weights are not ours.*written"):
        require(tmp_path, "ollama/m", lever)


@pytest.mark.parametrize(
    ("model", "lever"),
    [("ollama/m", "auto"), ("ollama/m", "harness"), ("vllm/m", "harness"), ("instant/first", "weights")],
)
def test_a_run_that_pays_for_no_rollouts_is_let_through(tmp_path: Path, model: str, lever: LeverPolicy):
    require(tmp_path, model, lever)


@pytest.mark.parametrize("lever", ["auto", *CONTROLS])
def test_a_model_of_vllm_needs_its_weights_here_before_the_run_begins(tmp_path: Path, lever: LeverPolicy):
    folder = tmp_path / "models" / "some" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(Unusable, match=f"its weights are not here. Put .* at {folder}; or take --lever harness"):
        require(tmp_path, "vllm/some/model", lever)
    require(tmp_path, "vllm/some/model", lever, nats_url="nats://elsewhere:4222")
    (folder / "model.safetensors").touch()
    require(tmp_path, "vllm/some/model", lever)


def test_credit_a_call_is_refused_for_an_algorithm_that_compares_whole_attempts():
    with pytest.raises(Unusable, match=r"learning\.credit=per-step: dpo compares whole attempts"):
        merged(RunSettings(), {"algorithm": "dpo", "learning.credit": "per-step"})
    assert merged(RunSettings(), {"algorithm": "ppo", "learning.credit": "per-step"}).algorithm == "ppo"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--target-model", "ollama/m", "--lever", "weights"), "whose weights are not ours"),
        (("--target-model", "ollama/m", "--lever", "weights", "--dry-run"), "whose weights are not ours"),
        (("--target-model", "vllm/m"), "its weights are not here"),
    ],
)
def test_what_could_not_be_learned_is_told_at_once_and_nothing_is_written(
    tmp_path: Path, task: Path, words: tuple[str, ...], told: str
):
    refused = sia(tmp_path, "run", task, *words)
    assert (refused.returncode, list(tmp_path.iterdir())) == (2, []) and told in refused.stderr, refused.stderr


def test_a_branch_is_held_to_the_same(tmp_path: Path, task: Path):
    small = ("--target-model", "instant/first", "--generations", "1", "--candidates", "1", "--lever", "harness")
    assert sia(tmp_path, "run", task, "--run", "r1", *small).returncode == 0
    refused = sia(
        tmp_path, "branch", "r1", "--at", "0", "--set", "target_model=ollama/m", "--set", "lever=random", "--run", "b1"
    )
    assert refused.returncode == 2 and "--lever random would train ollama/m" in refused.stderr
    assert [row["run"] for row in json.loads(sia(tmp_path, "runs", "--json").stdout)] == ["r1"]
