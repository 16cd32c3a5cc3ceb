"""GRPO, RLOO and DPO against TRL's own trainers: on one batch that TRL sampled, loss and gradient agree to 1e-4."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from sia_events.shared.events import Learning
from sia_events.trainer.algorithms import ALGORITHMS
from sia_events.trainer.losses import Actions, per_sample, preference, surrogate

if find_spec("trl") is None:
    pytest.skip("the extra trl", allow_module_level=True)

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

WORDS, SAMPLES, LENGTH, KL, CLIP = 24, 4, 6, 0.05, 0.2
PROMPTS = ("w5 w6 w7", "w8 w9")
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "activation_checkpointing": False,
    "per_device_train_batch_size": SAMPLES * len(PROMPTS),
    "beta": KL,
}
SAMPLING: dict[str, Any] = {
    **COMMON,
    "num_generations": SAMPLES,
    "max_completion_length": LENGTH,
    "num_iterations": 2,
    "steps_per_generation": 1,
    "epsilon": CLIP,
}
Trainer = GRPOTrainer | RLOOTrainer | DPOTrainer


def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1, "<s>": 2} | {f"w{at}": at for at in range(3, WORDS)}
    made = Tokenizer(WordLevel(words, unk_token="<s>"))
    made.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def moved(trainer: Trainer, seed: int) -> None:
    """Move the adapter off where it is: from base to the sampler, from the sampler to the policy that learns."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter(trainer):
            parameter += torch.randn(parameter.shape, generator=draw) * 0.03


def adapter(trainer: Trainer) -> list[Tensor]:
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def logprobs(trainer: Trainer, ids: Tensor, mask: Tensor) -> Tensor:
    """Of every token after the first [rows, length - 1], straight from the logits."""
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def agree(trainer: Trainer, theirs: Tensor, ours: Tensor) -> None:
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-6)
    parameters = adapter(trainer)
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in (theirs, ours)]
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-4 * gradients[0].abs().max()


class Sampled:
    """A batch that a trainer of TRL sampled and weighed itself, and the same as our actions.

    The sampler's adapter is off the base model, and the learner's off the sampler's, so that no ratio is 1.
    """

    def __init__(self, build: Callable[[Callable[..., list[float]]], GRPOTrainer | RLOOTrainer]) -> None:
        self.rewards: list[float] = []
        trainer = self.trainer = build(self._reward)
        moved(trainer, seed=1)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        torch.manual_seed(3)
        self.batch = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS for _ in range(SAMPLES)])
        with torch.no_grad():
            then = self._completions()
            with trainer.model.disable_adapter():
                base = self._completions()
        moved(trainer, seed=2)
        self.kept = self.batch["completion_mask"].bool()
        rows, length = self.kept.shape
        self.actions = Actions(
            now=self._completions().flatten(),
            then=then.flatten(),
            base=base.flatten(),
            advantage=torch.zeros(rows * length),
            sample=torch.arange(rows).repeat_interleave(length),
            samples=rows,
            kept=self.kept.flatten(),
        )

    def _reward(self, completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
        self.rewards = [sum(ids) % 7 / 7 for ids in completion_ids]
        return self.rewards

    def _completions(self) -> Tensor:
        ids = torch.cat([self.batch["prompt_ids"], self.batch["completion_ids"]], 1)
        mask = torch.cat([self.batch["prompt_mask"], self.batch["completion_mask"]], 1)
        return logprobs(self.trainer, ids, mask)[:, -self.batch["completion_ids"].shape[1] :]

    def weighed(self, name: str, rewards: Sequence[float], learning: Learning) -> Actions:
        """Our actions with the algorithm's advantages; these must be TRL's."""
        found: list[float] = []
        for at in range(0, len(rewards), SAMPLES):
            advantages = ALGORITHMS[name].weigh(rewards[at : at + SAMPLES], learning).advantages
            assert advantages is not None
            found += advantages
        ours = torch.tensor(found)
        assert torch.allclose(ours, self.batch["advantages"], rtol=1e-4, atol=1e-5)
        self.actions.advantage.copy_(ours[self.actions.sample])
        return self.actions

    def loss(self) -> Tensor:
        return self.trainer._compute_loss(self.trainer.model, self.batch)


@pytest.mark.parametrize(
    ("theirs", "reduction", "times"), [("grpo", "sample", 1), ("dapo", "token", 1), ("dr_grpo", "constant", LENGTH)]
)
def test_grpo_agrees_in_every_reduction(
    theirs: str, reduction: Literal["sample", "token", "constant"], times: int, tmp_path: Path
) -> None:
    def build(reward: Callable[..., list[float]]) -> GRPOTrainer:
        config = GRPOConfig(str(tmp_path), loss_type=theirs, **SAMPLING)
        rows = Dataset.from_dict({"prompt": list(PROMPTS)})
        return GRPOTrainer(network(), reward, config, rows, processing_class=tokenizer(), peft_config=lora())

    sampled = Sampled(build)
    learning = Learning(clip=CLIP, kl=KL, reduction=reduction)
    ours, figures = surrogate(sampled.weighed("grpo", sampled.rewards, learning), learning)
    assert sampled.kept.sum() < sampled.kept.numel() and figures["clip_fraction"] > 0 and figures["kl_base"] > 0
    # Theirs divides Dr. GRPO's sum by the longest completion too.
    agree(sampled.trainer, sampled.loss() * times, ours)


def test_rloo_agrees_with_the_distance_taken_off_the_reward(tmp_path: Path) -> None:
    def build(reward: Callable[..., list[float]]) -> RLOOTrainer:
        rows = Dataset.from_dict({"prompt": list(PROMPTS)})
        config = RLOOConfig(str(tmp_path), **SAMPLING)
        return RLOOTrainer(network(), reward, config, rows, processing_class=tokenizer(), peft_config=lora())

    sampled, algorithm = Sampled(build), ALGORITHMS["rloo"]
    learning = Learning(clip=CLIP, kl=KL)
    then, base = sampled.actions.then, sampled.actions.base
    assert then is not None and base is not None
    distance = per_sample(then - base, sampled.actions)
    rewards = (torch.tensor(sampled.rewards) - KL * distance).tolist()
    actions = sampled.weighed("rloo", rewards, learning)
    ours, figures = surrogate(actions, learning, algorithm.reduction, kl_in_loss=not algorithm.kl_in_reward)
    assert figures["clip_fraction"] > 0
    agree(sampled.trainer, sampled.loss(), ours)


def test_dpo_agrees(tmp_path: Path) -> None:
    rows = Dataset.from_dict(
        {
            "prompt": ["w5 w6 w7", "w8 w9"],
            "chosen": [" w10 w11 w12", " w13"],
            "rejected": [" w14", " w15 w16 w17 w18"],
        }
    )
    config = DPOConfig(str(tmp_path), **{**COMMON, "beta": 0.3})
    trainer = DPOTrainer(network(), args=config, train_dataset=rows, processing_class=tokenizer(), peft_config=lora())
    moved(trainer, seed=1)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    kept = batch["completion_mask"][:, 1:].bool()

    def sums() -> tuple[Tensor, ...]:
        return (logprobs(trainer, batch["input_ids"], batch["attention_mask"]) * kept).sum(1).chunk(2)

    with torch.no_grad(), trainer.model.disable_adapter():
        base = sums()
    ours, _ = preference(*sums(), *base, 0.3)
    agree(trainer, trainer._compute_loss(trainer.model, batch, False), ours)
