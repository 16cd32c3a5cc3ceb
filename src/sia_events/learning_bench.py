"""What is measured of learning, each in a process of its own: a step on one batch, and rollouts, ours and others'.

Run as `python -m sia_events.learning_bench WHAT FOLDER`; FOLDER holds the model (`model`) and, but for `sample`, which
makes it, the batch. Prints one JSON line.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROMPTS, SAMPLES, TOKENS, STEPS = 4, 4, 8, 2
DEFINITIONS = (
    "a large heavy mammal that lives in rivers",
    "the tall woody part that carries leaves",
    "a sweet baked dish with fruit in it",
    "the joint between the foot and the leg",
)
QUESTION = "What kind of thing is defined here: animal, plant, food, body, artifact, person, location or event?"
RANK, LR = 16, 5e-4


def sample(folder: Path) -> dict[str, Any]:
    """Our rollouts, batched: PROMPTS times SAMPLES completions, kept as the batch that the steps are taken on."""
    from sia_events.local_model import network
    from sia_events.local_model.chat import Chat
    from sia_events.local_model.policy import Policy, TextRequest
    from sia_events.trainer.rollouts import Sample, Step, to_lines

    chat = Chat(folder / "model")
    policy = Policy(network.load(folder / "model"), end_token=-1)
    prompts = [chat.prompt([{"role": "user", "content": f"{QUESTION}\n\nDefinition: {text}"}]) for text in DEFINITIONS]
    asked = [
        TextRequest(None, prompt, TOKENS, 1.0, 1.0, seed=at, stopped=lambda tokens: False)
        for at, prompt in enumerate([prompt for prompt in prompts for _ in range(SAMPLES)])
    ]
    with _measured() as told:
        drawn = policy.generate(asked)
    steps = [
        Step("completion", a.prompt, d.logprobs, completion_ids=d.tokens) for a, d in zip(asked, drawn, strict=True)
    ]
    rollouts = [
        Sample(str(at // SAMPLES), f"{at // SAMPLES}#{at % SAMPLES}", float(at % 3 == 0), (step,))
        for at, step in enumerate(steps)
    ]
    (folder / "batch.jsonl").write_bytes(to_lines(rollouts))
    return told | {"rollouts": len(drawn)}


def one_by_one(folder: Path) -> dict[str, Any]:
    """The same number of tokens for some of the same prompts, by transformers' generate, one request at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    torch.manual_seed(0)
    prompts = [line["steps"][0]["prompt_ids"] for line in _batch(folder)][::SAMPLES]
    with _measured() as told, torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            model.generate(  # type: ignore[attr-defined]
                ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=TOKENS, min_new_tokens=TOKENS
            )
    return told | {"rollouts": len(prompts)}


def own(folder: Path, engine: str = "own") -> dict[str, Any]:
    """A step of GRPO by our learner."""
    from sia_events.shared.events import Learning
    from sia_events.trainer.batches import scenes_at_once
    from sia_events.trainer.groups import read
    from sia_events.trainer.learner import Learner
    from sia_events.trainer.opening import opened
    from sia_events.trainer.spec import Spec

    learning = Learning(lr=LR, rank=RANK, batch_prompts=PROMPTS, clip=0.2)
    paths = (str(folder / "model"), str(folder / "batch.jsonl"), str(folder / "adapter"))
    spec = Spec(*paths, algorithm="grpo", learning=learning, engine=engine)  # type: ignore[arg-type]
    groups, _ = read(folder / "batch.jsonl")
    learner = Learner(opened(spec)[0], spec, STEPS, scenes_at_once(groups))

    def step(number: int) -> float:
        loss = learner.gradients(groups, fresh=True).loss
        learner.take(number)
        return loss

    return _fastest(step)


def transformers(folder: Path) -> dict[str, Any]:
    """The same by our learner on transformers and peft."""
    return own(folder, "transformers")


def trl(folder: Path, recompute: bool = False) -> dict[str, Any]:
    """The same step by TRL's GRPOTrainer: its loss of the batch, backwards, and its optimiser's step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from sia_events.shared.events import Learning
    from sia_events.trainer.algorithms import ALGORITHMS

    lines = _batch(folder)
    config = GRPOConfig(
        str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        activation_checkpointing=recompute,
        per_device_train_batch_size=len(lines),
        num_generations=SAMPLES,
        max_completion_length=TOKENS,
        num_iterations=2,
        steps_per_generation=1,
        beta=0.0,
        epsilon=0.2,
        loss_type="grpo",
    )
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        lambda completions, **_: [0.0] * len(completions),
        config,
        Dataset.from_dict({"prompt": ["nothing"] * len(lines)}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    steps = [line["steps"][0] for line in lines]
    width = max(len(step["prompt_ids"]) for step in steps)
    weigh, rewards = ALGORITHMS["grpo"].weigh, [line["reward"] for line in lines]
    advantages = [
        advantage
        for at in range(0, len(rewards), SAMPLES)
        for advantage in weigh(rewards[at : at + SAMPLES], Learning()).advantages or [0.0] * SAMPLES
    ]
    batch = {
        "prompt_ids": torch.tensor([[0] * (width - len(s["prompt_ids"])) + s["prompt_ids"] for s in steps]),
        "prompt_mask": torch.tensor([[0] * (width - len(s["prompt_ids"])) + [1] * len(s["prompt_ids"]) for s in steps]),
        "completion_ids": torch.tensor([s["completion_ids"] for s in steps]),
        "completion_mask": torch.ones(len(steps), TOKENS, dtype=torch.long),
        "old_per_token_logps": torch.tensor([s["logprobs"] for s in steps]),
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": torch.tensor(len(steps) * TOKENS),
    }
    model = trainer.model
    assert model is not None
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)

    def step(_: int) -> float:
        optimiser.zero_grad()
        loss = trainer._compute_loss(model, batch)
        loss.backward()
        optimiser.step()
        return loss.item()

    return _fastest(step)


def trl_recompute(folder: Path) -> dict[str, Any]:
    """The same with activations computed anew, which is how TRL comes."""
    return trl(folder, recompute=True)


def _fastest(step: Callable[[int], float]) -> dict[str, Any]:
    """The cheapest of a few steps in CPU seconds, as other work on the machine only adds to it; and the first loss."""
    found, losses = [], []
    for number in range(1, STEPS + 1):
        with _measured() as told:
            losses.append(step(number))
        found.append(told)
    return min(found, key=lambda told: told["cpu_seconds"]) | {"loss": losses[0], "peak_mb": _peak_mb()}


@contextmanager
def _measured() -> Iterator[dict[str, Any]]:
    told: dict[str, Any] = {}
    clock, cpu = time.monotonic(), time.process_time()
    yield told
    told["seconds"], told["cpu_seconds"] = time.monotonic() - clock, time.process_time() - cpu
    told["peak_mb"] = _peak_mb()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _batch(folder: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "batch.jsonl").read_text().splitlines()]


WHAT = {made.__name__: made for made in (sample, one_by_one, own, transformers, trl, trl_recompute)}

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    print(json.dumps(WHAT[sys.argv[1]](Path(sys.argv[2]))))
