"""The losses: closed forms, finite differences in float64, how terms add up, and what masks leave out."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from sia_events.shared.events import Learning
from sia_events.trainer.losses import (
    Actions,
    likelihood,
    per_sample,
    preference,
    shares,
    surrogate,
    value_loss,
)

REDUCTIONS = pytest.mark.parametrize("reduction", ["sample", "token", "constant", "joint"])
LEARNING = Learning(clip=0.2, kl=0.3, entropy=0.05)


def tensor(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def actions(now: Tensor, seed: int = 0) -> Actions:
    """Three samples of 1, 2 and 3 actions, one of them masked; log-probs near -1, no ratio at a corner of the clip."""
    draw = torch.Generator().manual_seed(seed)
    return Actions(
        now=now,
        then=tensor(-1.0, -1.6, -0.8, -1.1, -0.4, -1.3),
        base=now.detach() + torch.randn(6, generator=draw, dtype=torch.float64) * 0.4,
        advantage=tensor(1.0, -0.5, -0.5, 2.0, 2.0, 2.0),
        sample=torch.tensor([0, 1, 1, 2, 2, 2]),
        samples=3,
        kept=torch.tensor([True, True, True, True, False, True]),
        entropy=-now,
    )


def policy() -> Tensor:
    return tensor(-0.95, -1.2, -1.3, -0.7, -2.0, -1.25).requires_grad_()


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, of, retain_graph=True)
    return found


def test_at_ratio_one_the_surrogate_s_gradient_is_that_of_reinforce() -> None:
    now = policy()
    batch = replace(actions(now), then=None)
    loss, figures = surrogate(batch, Learning(clip=0.2), "constant")
    assert loss.item() == pytest.approx(-(1 - 0.5 - 0.5 + 2 + 2) / 3)
    assert gradient(loss, now) == pytest.approx(-batch.advantage * batch.kept / 3)
    assert figures == {"actions": 5, "clip_fraction": 0, "ratio": 1}


@pytest.mark.parametrize(
    ("ratio", "advantage", "term", "moves"),
    [
        (1.5, 1.0, -1.2, False),
        (1.5, -1.0, 1.5, True),
        (0.5, 1.0, -0.5, True),
        (0.5, -1.0, 0.8, False),
        (1.1, 3.0, -3.3, True),
    ],
)
def test_the_ratio_is_clipped_where_the_step_would_go_on_in_its_direction(
    ratio: float, advantage: float, term: float, moves: bool
) -> None:
    now = tensor(math.log(ratio)).requires_grad_()
    one = Actions(now, tensor(0.0), None, tensor(advantage), torch.tensor([0]), 1, torch.tensor([True]))
    loss, figures = surrogate(one, Learning(clip=0.2))
    assert loss.item() == pytest.approx(term)
    assert float(gradient(loss, now)) == pytest.approx(-ratio * advantage if moves else 0)
    assert figures["clip_fraction"] == (not moves)


def test_the_distance_and_the_entropy_bonus_are_added_by_their_weights() -> None:
    now = tensor(-1.0).requires_grad_()
    one = Actions(now, None, tensor(-1.5), tensor(0.0), torch.tensor([0]), 1, torch.tensor([True]), tensor(0.7))
    loss, figures = surrogate(one, Learning(kl=2.0, entropy=3.0))
    k3 = math.exp(-0.5) + 0.5 - 1
    assert loss.item() == pytest.approx(2 * k3 - 3 * 0.7)
    assert figures["kl_base"] == pytest.approx(k3)


def test_the_distance_and_its_gradient_are_those_of_the_kl_to_the_base_whoever_sampled() -> None:
    # Over all answers, each as often as its sampler gives it: no noise is left.
    draw = torch.Generator().manual_seed(0)
    logits, sampler, base = (torch.randn(5, generator=draw, dtype=torch.float64) for _ in range(3))
    now, then, base = logits.requires_grad_().log_softmax(0), sampler.log_softmax(0), base.log_softmax(0)
    every, taken = torch.arange(5), torch.ones(5, dtype=torch.bool)
    answers = Actions(now, then, base, tensor(0, 0, 0, 0, 0), every, 5, taken, share=then.exp())
    found, _ = surrogate(answers, Learning(kl=1.0))
    true = (now.exp() * (now - base)).sum()
    assert found.item() == pytest.approx(true.item())
    assert gradient(found, logits) == pytest.approx(gradient(true, logits))


def test_a_distance_that_came_off_the_reward_is_not_added_to_the_loss() -> None:
    batch = actions(policy())
    without, _ = surrogate(batch, LEARNING, kl_in_loss=False)
    assert without.item() == pytest.approx(surrogate(batch, LEARNING.model_copy(update={"kl": 0.0}))[0].item())
    assert without.item() < surrogate(batch, LEARNING)[0].item()


def test_terms_without_their_inputs_are_refused() -> None:
    batch = actions(policy())
    with pytest.raises(ValueError, match="base model"):
        surrogate(replace(batch, base=None), LEARNING)
    with pytest.raises(ValueError, match="entropies"):
        surrogate(replace(batch, entropy=None), LEARNING)


def test_reductions_weigh_actions_as_they_say() -> None:
    batch = actions(policy())
    expected = {
        "sample": [1 / 3, 1 / 6, 1 / 6, 1 / 6, 0, 1 / 6],
        "token": [1 / 5, 1 / 5, 1 / 5, 1 / 5, 0, 1 / 5],
        "constant": [1 / 3, 1 / 3, 1 / 3, 1 / 3, 0, 1 / 3],
    }
    for reduction, weights in expected.items():
        given = shares(batch.sample, 3, batch.kept, reduction)  # type: ignore[arg-type]
        assert given.tolist() == pytest.approx(weights), reduction


def test_joint_gives_a_sample_one_ratio() -> None:
    now = policy()
    batch = actions(now)
    loss, figures = surrogate(batch, Learning(clip=0.2), "joint")
    ratios = [math.exp(-0.95 + 1.0), math.exp(-1.2 - 1.3 + 1.6 + 0.8), math.exp(-0.7 - 1.25 + 1.1 + 1.3)]
    terms = [-ratios[0], 0.5 * max(ratios[1], 0.8), -2 * min(ratios[2], 1.2)]
    assert loss.item() == pytest.approx(sum(terms) / 3)
    assert figures["actions"] == 3
    assert gradient(loss, now)[3:].tolist() == [0, 0, 0], "the third sample's ratio is beyond the clip"


@REDUCTIONS
def test_the_losses_of_the_parts_add_up_to_the_batch_s(reduction: str) -> None:
    now = policy()
    whole = actions(now)
    given = shares(whole.sample, 3, whole.kept, reduction)  # type: ignore[arg-type]
    total, _ = surrogate(whole, LEARNING, reduction)  # type: ignore[arg-type]
    parts = []
    for places in ([0, 1, 2], [3, 4, 5]):
        fields = ("now", "then", "base", "advantage", "sample", "kept", "entropy")
        cut = {name: getattr(whole, name)[places] for name in fields}
        part = Actions(**cut, samples=3, share=given[places])
        parts.append(surrogate(part, LEARNING, reduction)[0])  # type: ignore[arg-type]
    assert torch.stack(parts).sum().item() == pytest.approx(total.item())
    assert gradient(torch.stack(parts).sum(), now) == pytest.approx(gradient(total, now))


@REDUCTIONS
def test_the_surrogate_s_gradient_is_that_of_finite_differences(reduction: str) -> None:
    given = actions(policy().detach())

    def loss(now: Tensor) -> Tensor:
        return surrogate(replace(given, now=now, entropy=-now.exp() * now), LEARNING, reduction)[0]  # type: ignore[arg-type]

    assert gradcheck(loss, policy())


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: likelihood(replace(actions(x), advantage=tensor(1, 0, 2, 0.5, 1, 3)), LEARNING)[0],
        lambda x: preference(x[:3], x[3:], tensor(-1, -2, -1), tensor(-1, -1, -2), 0.3)[0],
        lambda x: value_loss(x, tensor(-1, -0.5, -1.4, -0.7, -1, -2), tensor(0, 1, -2, -0.5, 0.3, -1), 0.2),
    ],
    ids=["likelihood", "preference", "value"],
)
def test_a_gradient_is_that_of_finite_differences(loss: Callable[[Tensor], Tensor]) -> None:
    assert gradcheck(loss, policy())


def test_what_is_masked_tells_nothing_even_where_it_is_no_number() -> None:
    now = policy()
    clean = actions(now)
    spoilt = {name: getattr(clean, name).detach().clone() for name in ("then", "base", "advantage")}
    for values in spoilt.values():
        values[4] = math.nan
    for reduction in ("sample", "joint"):
        loss, _ = surrogate(replace(clean, **spoilt), LEARNING, reduction)
        assert loss.item() == surrogate(clean, LEARNING, reduction)[0].item()
        assert gradient(loss, now)[4] == 0


def test_a_batch_of_which_everything_is_masked_has_loss_and_gradient_zero() -> None:
    now = policy()
    batch = replace(actions(now), kept=torch.zeros(6, dtype=torch.bool))
    for reduction in ("sample", "token", "constant", "joint"):
        loss, figures = surrogate(batch, LEARNING, reduction)
        assert (loss.item(), figures["actions"]) == (0, 0)
        assert gradient(loss, now).tolist() == [0] * 6


def test_likelihood_is_the_weighted_log_prob() -> None:
    now = policy()
    weighed = replace(actions(now), advantage=tensor(2, 0, 0, 1, 1, 1))
    loss, figures = likelihood(weighed, LEARNING, "constant")
    assert loss.item() == pytest.approx((2 * 0.95 + 0.7 + 1.25) / 3)
    assert figures == {"nll": pytest.approx((0.95 + 0.7 + 1.25) / 3), "actions": 3}, "those that are imitated"


def test_preference_is_the_log_odds_of_the_better_from_the_base() -> None:
    loss, figures = preference(tensor(-1.0), tensor(-3.0), tensor(-2.0), tensor(-2.5), 0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5 * 1.5)))
    assert figures == {"margin": pytest.approx(1.5), "accuracy": 1}
    at_base, _ = preference(tensor(-1.0), tensor(-3.0), tensor(-1.0), tensor(-3.0), 0.5)
    assert at_base.item() == pytest.approx(math.log(2))


def test_the_critic_pays_the_larger_of_two_errors() -> None:
    # The first is within the clip, the second is held at 0.2 and pays for it, the third pays for where it is.
    loss = value_loss(tensor(0.1, 1.0, -1.0), tensor(0, 0, 0), tensor(1, 1, 1), 0.2)
    assert loss.item() == pytest.approx((0.9**2 + 0.8**2 + 2.0**2) / 3 / 2)


def test_log_probs_are_summed_over_a_sample_s_own_actions() -> None:
    batch = actions(policy().detach())
    assert per_sample(batch.now, batch) == pytest.approx(tensor(-0.95, -2.5, -1.95))
