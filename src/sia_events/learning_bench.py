"""What is measured of learning, each in a process of its own: a step on one batch, and rollouts, ours and others'.

Run as `python -m sia_events.learning_bench WHAT FOLDER`; FOLDER holds the model (`model`) and the batch, which `sample
FOLDER PROMPTS SAMPLES TOKENS` makes. Prints one JSON line.
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

STEPS = 2
TRLS_PART = 8
"""Completions that TRL computes at once as it comes."""
DEFINITIONS = (
    "a large heavy mammal that lives in rivers",
    "the tall woody part that carries leaves",
    "a sweet baked dish with fruit in it",
    "the joint between the foot and the leg",
    "a tool with a blade for cutting wood",
    "somebody who mends shoes for others",
    "a narrow piece of land between two seas",
    "a contest that is run over a short distance",
)
QUESTION = "What kind of thing is defined here: animal, plant, food, body, artifact, person, location or event?"
RANK, LR = 16, 5e-4
STATUS = Path("/proc/self/status")


def sample(folder: Path, prompts: int, samples: int, tokens: int) -> dict[str, Any]:
    """Our rollouts, asked for at once of what the model server puts them to: they become the batch of the steps.

    Each is `tokens` long, at temperature 1 from all of the distribution.
    """
    from sia_events.local_model import network
    from sia_events.local_model.chat import Chat
    from sia_events.local_model.engine import Engine
    from sia_events.local_model.policy import Policy, TextRequest
    from sia_events.trainer.rollouts import Sample, Step, to_lines

    chat = Chat(folder / "model")
    engine = Engine(Policy(network.load(folder / "model"), end_token=-1))
    about = DEFINITIONS[:prompts]
    opened = [chat.prompt([{"role": "user", "content": f"{QUESTION}\n\nDefinition: {text}"}]) for text in about]
    asked = [
        TextRequest(None, prompt, tokens, 1.0, 1.0, seed=at, stopped=lambda tokens: False)
        for at, prompt in enumerate([prompt for prompt in opened for _ in range(samples)])
    ]
    with _measured() as told:
        drawn = [reply.result() for reply in [engine.generate(each) for each in asked]]
    steps = [
        Step("completion", a.prompt, d.logprobs, completion_ids=d.tokens) for a, d in zip(asked, drawn, strict=True)
    ]
    rollouts = [
        Sample(str(at // samples), f"{at // samples}#{at % samples}", float(at % 3 == 0), (step,))
        for at, step in enumerate(steps)
    ]
    (folder / "batch.jsonl").write_bytes(to_lines(rollouts))
    return told | {"rollouts": len(drawn)}


def one_by_one(folder: Path) -> dict[str, Any]:
    """One completion of each of these prompts, sampled as ours, by transformers' generate, a request at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    torch.manual_seed(0)
    steps = {line["group"]: line["steps"][0] for line in _batch(folder)}.values()
    tokens = len(next(iter(steps))["completion_ids"])
    alike = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    drawn = []
    with _measured() as told, torch.inference_mode():
        for step in steps:
            ids = torch.tensor([step["prompt_ids"]])
            mask = torch.ones_like(ids)
            drawn.append(
                model.generate(  # type: ignore[attr-defined]
                    ids, attention_mask=mask, **alike, min_new_tokens=tokens, max_new_tokens=tokens
                )
            )
    return told | {"rollouts": len(drawn)}


def own(folder: Path, engine: str = "own") -> dict[str, Any]:
    """A step of GRPO by our learner."""
    from sia_events.shared.events import Learning
    from sia_events.trainer.batches import room_for
    from sia_events.trainer.groups import read
    from sia_events.trainer.learner import Learner
    from sia_events.trainer.opening import opened
    from sia_events.trainer.spec import Spec

    learning = Learning(lr=LR, rank=RANK, batch_prompts=len(DEFINITIONS), clip=0.2)
    paths = (str(folder / "model"), str(folder / "batch.jsonl"), str(folder / "adapter"))
    spec = Spec(*paths, algorithm="grpo", learning=learning, engine=engine)  # type: ignore[arg-type]
    groups, _ = read(folder / "batch.jsonl")
    engine_on_it, _ = opened(spec)
    learner = Learner(engine_on_it, spec, STEPS, room_for(engine_on_it, groups))

    def step(number: int) -> float:
        loss = learner.gradients(groups, fresh=True).loss
        learner.take(number)
        return loss

    return _fastest(step)


def transformers(folder: Path) -> dict[str, Any]:
    """The same by our learner on transformers and peft."""
    return own(folder, "transformers")


def trl(folder: Path, recompute: bool = False) -> dict[str, Any]:
    """The same step by TRL's GRPOTrainer: its loss, backwards, of the batch's parts, and its optimiser's step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from sia_events.shared.events import Learning
    from sia_events.trainer.algorithms import ALGORITHMS

    lines = _batch(folder)
    samples = sum(line["group"] == lines[0]["group"] for line in lines)
    tokens = len(lines[0]["steps"][0]["completion_ids"])
    config = GRPOConfig(
        str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        activation_checkpointing=recompute,
        per_device_train_batch_size=len(lines),
        num_generations=samples,
        max_completion_length=tokens,
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
        for at in range(0, len(rewards), samples)
        for advantage in weigh(rewards[at : at + samples], Learning()).advantages or [0.0] * samples
    ]
    batch = {
        "prompt_ids": torch.tensor([[0] * (width - len(s["prompt_ids"])) + s["prompt_ids"] for s in steps]),
        "prompt_mask": torch.tensor([[0] * (width - len(s["prompt_ids"])) + [1] * len(s["prompt_ids"]) for s in steps]),
        "completion_ids": torch.tensor([s["completion_ids"] for s in steps]),
        "completion_mask": torch.ones(len(steps), tokens, dtype=torch.long),
        "old_per_token_logps": torch.tensor([s["logprobs"] for s in steps]),
        "advantages": torch.tensor(advantages),
    }
    shares = [
        {name: rows[at : at + TRLS_PART] for name, rows in batch.items()} for at in range(0, len(steps), TRLS_PART)
    ]
    model = trainer.model
    assert model is not None
    model.train()
    trainer.current_gradient_accumulation_steps = len(shares)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)

    def step(_: int) -> float:
        optimiser.zero_grad()
        total = 0.0
        for share in shares:
            loss = trainer._compute_loss(model, {**share, "num_items_in_batch": torch.tensor(len(steps) * tokens)})
            loss.backward()
            total += loss.item()
        optimiser.step()
        return total

    return _fastest(step)


def trl_recompute(folder: Path) -> dict[str, Any]:
    """The same with activations computed anew, which is how TRL comes."""
    return trl(folder, recompute=True)


def _fastest(step: Callable[[int], float]) -> dict[str, Any]:
    """The cheapest of a few steps in CPU seconds, as other work on the machine only adds to it; and the first loss.

    `peak_mb` is the process's, imports and loading included; `step_mb` what the steps had at most beyond what there was
    before the first, None where the system does not tell.
    """
    loaded, before = _peak_mb(), _peak_anew()
    found, losses = [], []
    for number in range(1, STEPS + 1):
        with _measured() as told:
            losses.append(step(number))
        found.append(told)
    peak = _peak_mb()
    own = None if before is None else peak - before
    cheapest = min(found, key=lambda told: told["cpu_seconds"])
    return cheapest | {"loss": losses[0], "peak_mb": max(loaded, peak), "step_mb": own}


@contextmanager
def _measured() -> Iterator[dict[str, Any]]:
    told: dict[str, Any] = {}
    clock, cpu = time.monotonic(), time.process_time()
    yield told
    told["seconds"], told["cpu_seconds"] = time.monotonic() - clock, time.process_time() - cpu
    told["peak_mb"] = _peak_mb()


def _peak_mb() -> float:
    """The most memory this process had at once, in MiB."""
    if STATUS.exists():
        # Linux lets a child begin with its parent's peak in `ru_maxrss`.
        return _status_mb("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _peak_anew() -> float | None:
    """Have the peak counted from here on; returns the MiB there are now, None where the system does neither."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_mb("VmRSS")


def _status_mb(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 2**10


def _batch(folder: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "batch.jsonl").read_text().splitlines()]


WHAT: dict[str, Callable[..., dict[str, Any]]] = {
    made.__name__: made for made in (sample, one_by_one, own, transformers, trl, trl_recompute)
}

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    print(json.dumps(WHAT[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))))
