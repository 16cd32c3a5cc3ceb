"""The losses: what the log-probs of a batch of actions, and their advantages, come to."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sia_events.shared.events import Learning
from sia_events.trainer.algorithms.weighing import Reduction

Figures = dict[str, float]


@dataclass(frozen=True)
class Actions:
    """Actions of a batch, flat: each a token of a completion or a whole choice.

    Log-probs [A] are of the policy that learns (`now`, differentiable), of the one that made the rollouts (`then`;
    None: the same as now) and of the base model (`base`). `sample` [A] says which of the batch's `samples` an action
    is part of, `kept` [A] whether it is learned from. `share` [A] is each action's weight in the loss, as `shares`
    gives it for the whole batch: with it, the losses of the parts of a batch add up to the batch's. None: this is the
    whole batch.
    """

    now: Tensor
    then: Tensor | None
    base: Tensor | None
    advantage: Tensor
    sample: Tensor
    samples: int
    kept: Tensor
    entropy: Tensor | None = None
    share: Tensor | None = None


def shares(sample: Tensor, samples: int, kept: Tensor, reduction: Reduction) -> Tensor:
    """Weight [A] of every action's term in the loss of a batch; 0 for those not kept.

    `token` is 1/N for N kept actions, `constant` 1/S for S samples. `sample` and `joint` are 1/(S nᵢ) for the nᵢ kept
    actions of the action's sample.
    """
    counted = kept.double()
    if reduction == "token":
        return counted / counted.sum().clamp(min=1)
    if reduction == "constant":
        return counted / samples
    return counted / (samples * _summed(counted, sample, samples).clamp(min=1)[sample])


def surrogate(
    actions: Actions, learning: Learning, reduction: Reduction | None = None, kl_in_loss: bool = True
) -> tuple[Tensor, Figures]:
    """PPO's clipped surrogate, with the distance from the base model and an entropy bonus; and figures of the batch.

    A term is -min(ρA, clip(ρ, 1-ε, 1+ε)A) + kl·ρ·k3 - entropy·H with ρ = exp(log π_θ - log π_behaviour), ε = `clip`
    (Schulman et al. 2017, arXiv 1707.06347) and k3 = exp(d) - d - 1, d = log π_0 - log π_θ (Schulman 2020,
    "Approximating KL divergence"). With ρ before it (DeepSeek-V3.2, arXiv 2512.02556) its mean, and the gradient of
    that, are those of KL(π_θ ‖ π_0) whoever made the rollouts; alone its gradient would be that of KL(π_0 ‖ π_θ).

    Terms are added up by `shares`. `joint` makes each sample one action first, so that its tokens have one ratio.
    Without a `reduction` of its own the algorithm takes the settings'. Raises ValueError when the settings ask for a
    term whose log-probs or entropies are not there.
    """
    reduction = reduction or learning.reduction
    actions = replace(actions, share=_share(actions, reduction))
    if reduction == "joint":
        actions = _joined(actions)
    kept, now = actions.kept, actions.now[actions.kept]
    advantage = actions.advantage[kept]
    log_ratio = now - (now.detach() if actions.then is None else actions.then[kept])
    ratio = log_ratio.exp()
    free, bounded = ratio * advantage, ratio.clamp(1 - learning.clip, 1 + learning.clip) * advantage
    terms = -torch.minimum(free, bounded)
    clipped = (bounded < free).float()
    figures = {"actions": float(len(now)), "clip_fraction": _mean(clipped), "ratio": _mean(ratio)}
    if learning.kl and kl_in_loss:
        if actions.base is None:
            raise ValueError("The KL to the base model is asked for, and its log-probs are not there.")
        apart = actions.base[kept] - now
        distance = ratio * (torch.expm1(apart) - apart)
        terms = terms + learning.kl * distance
        figures["kl_base"] = _mean(distance)
    if learning.entropy:
        if actions.entropy is None:
            raise ValueError("An entropy bonus is asked for, and the entropies are not there.")
        terms = terms - learning.entropy * actions.entropy[kept]
    return _total(terms, actions), figures


def likelihood(actions: Actions, learning: Learning, reduction: Reduction | None = None) -> tuple[Tensor, Figures]:
    """Weighted negative log-likelihood: a term is -A log π_θ, added up by `shares`.

    Figures: `nll` is the mean of -log π_θ over the `actions` that are imitated (A > 0), each counted once: a token, not
    a sample, whatever it weighs in the loss.
    """
    actions = replace(actions, share=_share(actions, reduction or learning.reduction))
    now, weight = actions.now[actions.kept], actions.advantage[actions.kept]
    imitated = now[weight > 0]
    return _total(-weight * now, actions), {"actions": float(len(imitated)), "nll": -_mean(imitated)}


def preference(
    chosen: Tensor, rejected: Tensor, base_chosen: Tensor, base_rejected: Tensor, beta: float
) -> tuple[Tensor, Figures]:
    """DPO's mean over pairs [P] of -log σ(β·m), m = (log π_θ - log π_0)(chosen) - the same of rejected.

    Log-probs are summed over each sample's own tokens (`per_sample`). Rafailov et al. 2023, arXiv 2305.18290.
    """
    margin = (chosen - base_chosen) - (rejected - base_rejected)
    return -logsigmoid(beta * margin).mean(), {"margin": _mean(margin), "accuracy": _mean((margin > 0).float())}


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ mean max((V-R)², (V'-R)²) over actions [A], V' = V held within `clip` of the old value.

    The critic of PPO (Schulman et al. 2017, arXiv 1707.06347), clipped as in the code published with it.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean() / 2


def per_sample(values: Tensor, actions: Actions) -> Tensor:
    """Sum [S] of `values` [A] over the kept actions of each sample."""
    kept = actions.kept
    return _summed(values[kept], actions.sample[kept], actions.samples)


def _share(actions: Actions, reduction: Reduction) -> Tensor:
    share = actions.share
    if share is None:
        share = shares(actions.sample, actions.samples, actions.kept, reduction)
    return share.to(actions.now.dtype)


def _joined(actions: Actions) -> Actions:
    """Every sample as one action: log-probs, entropies and shares summed, the mean of the advantages."""
    counts = per_sample(torch.ones_like(actions.now), actions)
    return Actions(
        now=per_sample(actions.now, actions),
        then=None if actions.then is None else per_sample(actions.then, actions),
        base=None if actions.base is None else per_sample(actions.base, actions),
        advantage=per_sample(actions.advantage, actions) / counts.clamp(min=1),
        sample=torch.arange(actions.samples, device=actions.now.device),
        samples=actions.samples,
        kept=counts > 0,
        entropy=None if actions.entropy is None else per_sample(actions.entropy, actions),
        share=None if actions.share is None else per_sample(actions.share, actions),
    )


def _total(terms: Tensor, actions: Actions) -> Tensor:
    assert actions.share is not None
    return (actions.share[actions.kept] * terms).sum()


def _summed(values: Tensor, sample: Tensor, samples: int) -> Tensor:
    return torch.zeros(samples, dtype=values.dtype, device=values.device).index_add(0, sample, values)


def _mean(values: Tensor) -> float:
    return float(values.detach().mean()) if len(values) else 0.0
