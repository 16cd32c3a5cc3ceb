"""Rollouts that the tiny model can learn from, and what it makes of them."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from sia_events.local_model import adapter, network, weights
from sia_events.local_model.policy import ChoiceRequest, Policy
from sia_events.shared.events import Learning
from sia_events.trainer.spec import Spec

CHOICES = ((3,), (4,), (5, 6))
"""The right choice is told by the prompt's second token: 20, 21 or 22."""


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [(1, 20 + at % 3, *(draw.randrange(30, 40) for _ in range(draw.randrange(2, 6))), 2) for at in range(count)]


def policy(tiny: Path, made: adapter.Adapter | None = None) -> tuple[Policy, str | None]:
    model = Policy(network.load(tiny), end_token=0)
    if made is None:
        return model, None
    model.adapters["it"] = made
    return model, "it"


def trained(tiny: Path, folder: Path) -> adapter.Adapter:
    return adapter.read(folder, network.load(tiny).modules, "tiny", weights.opened(tiny).digest)


def levelled(tiny: Path) -> tuple[float, ...]:
    """The bias under which the base finds every choice about as likely: what is never sampled is never learned."""
    model, _ = policy(tiny)
    replies = model.choose([ChoiceRequest(None, prompt, CHOICES, None, 0.0, 0) for prompt in prompts(30, seed=5)])
    return tuple(-sum(scores) / 30 for scores in zip(*(reply.raw for reply in replies), strict=True))


def accuracy(tiny: Path, made: adapter.Adapter | None = None) -> float:
    model, name = policy(tiny, made)
    held, bias = prompts(60, seed=999), levelled(tiny)
    replies = model.choose([ChoiceRequest(name, prompt, CHOICES, bias, 0.0, 0) for prompt in held])
    return sum(reply.index == prompt[1] - 20 for reply, prompt in zip(replies, held, strict=True)) / len(held)


def choice_lines(
    tiny: Path, made: adapter.Adapter | None = None, count: int = 48, seed: int = 0
) -> list[dict[str, Any]]:
    """Eight logged choices a prompt, rewarded when right."""
    model, name = policy(tiny, made)
    bias = levelled(tiny)
    asked = [prompt for prompt in prompts(count, seed) for _ in range(8)]
    replies = model.choose([ChoiceRequest(name, prompt, CHOICES, bias, 1.0, at) for at, prompt in enumerate(asked)])
    return [
        {
            "group": str(prompt),
            "item": f"{prompt}#{at % 8}",
            "reward": float(reply.index == prompt[1] - 20),
            "steps": [
                {
                    "kind": "choice",
                    "prompt_ids": prompt,
                    "choice_ids": CHOICES,
                    "bias": bias,
                    "index": reply.index,
                    "logprobs": reply.logprobs,
                }
            ],
        }
        for at, (prompt, reply) in enumerate(zip(asked, replies, strict=True))
    ]


def completion_lines(tiny: Path, count: int = 48) -> list[dict[str, Any]]:
    """The same actions logged as text of the model's own: every token with its full-vocabulary log-prob."""
    lines = []
    for line in choice_lines(tiny, count=count):
        (step,) = line["steps"]
        written = CHOICES[step["index"]]
        said = {"prompt_ids": step["prompt_ids"], "completion_ids": written}
        lines.append(line | {"steps": [{"kind": "completion", **said, "logprobs": logprobs(tiny, None, said)}]})
    return lines


def logprobs(tiny: Path, made: adapter.Adapter | None, step: dict[str, Any]) -> list[float]:
    """Of the tokens of a completion."""
    net = network.load(tiny)
    with torch.inference_mode():
        return network.continuation_logprobs(net, made, net.empty(), [step["prompt_ids"]], [[step["completion_ids"]]])[
            0
        ][0].tolist()


def spec(tiny: Path, folder: Path, lines: list[dict[str, Any]], **options: Any) -> Spec:
    folder.mkdir(exist_ok=True)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"lr": 2e-2, "rank": 4, "batch_prompts": 12, "epochs": 6, "micro_prompts": 5} | options
    learning = Learning(**{name: settings.pop(name) for name in list(settings) if name in Learning.model_fields})
    paths = (str(tiny), str(folder / "rollouts.jsonl"), str(folder / "adapter"))
    return Spec(*paths, learning=learning, **settings)


def shifted(lines: list[dict[str, Any]], by: float) -> list[dict[str, Any]]:
    """The same text, as if a policy had made it that found every token `by` nats likelier or less likely by turns."""
    moved = []
    for at, line in enumerate(lines):
        (step,) = line["steps"]
        step = step | {"logprobs": [value + by * (-1) ** at for value in step["logprobs"]]}
        moved.append(line | {"steps": [step], "reward": line["reward"] + 0.25 * (at % 3)})
    return moved
