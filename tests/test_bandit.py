"""A contextual bandit whose best arms are known: every algorithm finds them, through its real weights and losses."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sia_events.shared.events import Learning
from sia_events.trainer.algorithms import ALGORITHMS, Algorithm
from sia_events.trainer.algorithms.dpo import pairs
from sia_events.trainer.algorithms.ppo import gae, whitened
from sia_events.trainer.losses import Actions, likelihood, preference, surrogate, value_loss

REWARDS = torch.tensor([[0.1, 0.9, 0.3, 0.0, 0.4], [0.2, 0.0, 0.1, 1.0, 0.5], [0.7, 0.2, 0.4, 0.3, 0.1]])
"""Of every arm in every context; the best are arms 1, 3 and 0."""
CONTEXTS, ARMS = REWARDS.shape
STEPS, LR = 120, 0.1


@dataclass(frozen=True)
class Pull:
    context: int
    arm: int
    logprob: float
    reward: float


def pulled(policy: Tensor, draw: random.Random, samples: int) -> list[list[Pull]]:
    """A group of samples of every context, with the log-prob that each was drawn with."""
    logprobs = policy.detach().log_softmax(-1).tolist()
    groups = []
    for context in range(CONTEXTS):
        arms = draw.choices(range(ARMS), torch.tensor(logprobs[context]).exp().tolist(), k=samples)
        groups.append([Pull(context, arm, logprobs[context][arm], float(REWARDS[context, arm])) for arm in arms])
    return groups


def at(table: Tensor, pulls: Sequence[Pull]) -> Tensor:
    return table[[pull.context for pull in pulls], [pull.arm for pull in pulls]]


def loss_of(
    algorithm: Algorithm, policy: Tensor, critic: Tensor, groups: list[list[Pull]], learning: Learning
) -> Tensor | None:
    """The algorithm's loss of one batch, or None where no group teaches anything."""
    weighed = [algorithm.weigh([pull.reward for pull in group], learning).advantages for group in groups]
    kept = [(group, weights) for group, weights in zip(groups, weighed, strict=True) if weights is not None]
    if not kept:
        return None
    logprobs = policy.log_softmax(-1)
    base = torch.full((CONTEXTS, ARMS), 1 / ARMS).log()
    if algorithm.objective == "preference":
        chosen = [
            (group[better], group[worse])
            for group, _ in kept
            for better, worse in pairs([pull.reward for pull in group], learning.margin)
        ]
        better, worse = zip(*chosen, strict=True)
        tables = [at(table, pulls) for table in (logprobs, base) for pulls in (better, worse)]
        return preference(*tables, learning.beta)[0]
    pulls = [pull for group, _ in kept for pull in group]
    advantages = torch.tensor([advantage for _, weights in kept for advantage in weights])
    values = critic[[pull.context for pull in pulls]]
    if algorithm.critic:
        told = [
            gae([reward], [value], learning.discount, learning.trace)
            for reward, value in zip(advantages.tolist(), values.tolist(), strict=True)
        ]
        advantages = torch.tensor(whitened([advantage for (advantage,), _ in told]))
        returns = torch.tensor([target for _, (target,) in told])
    batch = Actions(
        now=at(logprobs, pulls),
        then=torch.tensor([pull.logprob for pull in pulls]),
        base=at(base, pulls),
        advantage=advantages,
        sample=torch.arange(len(pulls)),
        samples=len(pulls),
        kept=torch.ones(len(pulls), dtype=torch.bool),
    )
    if algorithm.objective == "likelihood":
        return likelihood(batch, learning, algorithm.reduction)[0]
    loss, _ = surrogate(batch, learning, algorithm.reduction, kl_in_loss=not algorithm.kl_in_reward)
    return loss + value_loss(values, values.detach(), returns, learning.clip) if algorithm.critic else loss


def learned(name: str, learning: Learning, seed: int, samples: int = 8) -> Tensor:
    """The probabilities [contexts, arms] that an algorithm ends with; two updates a batch, so that ratios leave 1."""
    draw = random.Random(seed)
    policy, critic = torch.zeros(CONTEXTS, ARMS, requires_grad=True), torch.zeros(CONTEXTS, requires_grad=True)
    optimiser = torch.optim.Adam([policy, critic], lr=LR)
    for step in range(STEPS):
        groups = pulled(policy, draw, samples)
        optimiser.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        for _ in range(2):
            loss = loss_of(ALGORITHMS[name], policy, critic, groups, learning)
            if loss is not None:
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return policy.detach().softmax(-1)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@pytest.mark.parametrize("seed", range(3))
def test_an_algorithm_finds_the_best_arm_of_every_context(name: str, seed: int) -> None:
    found = learned(name, Learning(clip=0.2), seed)
    assert found.argmax(-1).tolist() == REWARDS.argmax(-1).tolist()
    assert float((found * REWARDS).sum() / REWARDS.max(-1).values.sum()) > 0.95


@pytest.mark.parametrize(
    "learning",
    [
        Learning(clip=0.2, reduction="token"),
        Learning(clip=0.2, reduction="constant"),
        Learning(clip=0.2, leave_one_out=True),
    ],
    ids=["token", "constant", "leave-one-out"],
)
def test_so_do_the_variants(learning: Learning) -> None:
    found = learned("entropic" if learning.leave_one_out else "grpo", learning, seed=0)
    assert float((found * REWARDS).sum() / REWARDS.max(-1).values.sum()) > 0.95


def test_the_distance_from_the_base_model_holds_the_policy_where_theory_says() -> None:
    # Of E[r] - kl·KL(π‖π_0) the optimum is π ∝ π_0 exp(r / kl).
    found = learned("reinforce", Learning(clip=0.2, kl=0.5), seed=0, samples=256)
    assert torch.allclose(found, (REWARDS / 0.5).softmax(-1), atol=0.02)
