"""What a step looked like: distance from the rollouts, entropy, preferred answers; and when that is reason to stop."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sia_events.trainer.groups import Act, RolloutGroup
from sia_events.trainer.losses import Figures
from sia_events.trainer.views import View

COLLAPSE_WINDOW, COLLAPSE_SHARE, DESERVED_SHARE = 4, 0.9, 0.75
"""Collapsed: over so many steps one answer is preferred for this share of prompts, and best rewarded far less often."""

Answer = tuple[int, ...]


@dataclass
class Answers:
    """Of each scene of a step: the answer that the policy prefers, the rollouts' own, and the best rewarded one."""

    preferred: list[Answer] = field(default_factory=list)
    behaved: list[Answer] = field(default_factory=list)
    rewarded: list[Answer] = field(default_factory=list)


@dataclass
class Tally:
    """Sums over the samples and scenes of one step."""

    loss: float = 0.0
    samples: int = 0
    reward: float = 0.0
    scenes: int = 0
    kl: float = 0.0
    entropy: float = 0.0
    tokens: int = 0
    actions: float = 0.0
    figures: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    answers: Answers = field(default_factory=Answers)

    def add(self, groups: Sequence[RolloutGroup], views: Sequence[Sequence[View]], loss: float, told: Figures) -> None:
        """Take in one part of the step; `told` are means over its actions."""
        self.loss += loss
        self.actions += told.get("actions", 0.0)
        for name, value in told.items():
            if name != "actions":
                self.figures[name] += told["actions"] * value
        for group, seen in zip(groups, views, strict=True):
            self.samples += len(group.samples)
            self.reward += sum(sample.reward for sample in group.samples)
            for number, scene in enumerate(seen):
                met = [(act, s.reward) for s in group.samples for act in s.acts if act.scene == number]
                if met:
                    self._meet(scene, met)

    def _meet(self, view: View, met: Sequence[tuple[Act, float]]) -> None:
        said = view.scene.continuations
        acts = [act for act, _ in met]
        self.scenes += 1
        self.tokens += len(view.scene.prompt) + sum(map(len, said))
        self.answers.preferred.append(said[int(view.distribution.argmax())])
        self.answers.rewarded.append(said[max(met, key=lambda one: one[1])[0].answer])
        self.answers.behaved.append(said[Counter(act.answer for act in acts).most_common(1)[0][0]])
        if view.scene.choice:
            now = view.distribution.detach()
            self.entropy -= float((now.exp() * now).sum())
            if acts[0].logprobs is not None:
                behaviour = torch.tensor(acts[0].logprobs, device=now.device)
                self.answers.behaved[-1] = said[int(behaviour.argmax())]
                self.kl += float((now.exp() * (now - behaviour)).sum())
            return
        # Of a completion only what was sampled is known: KL(π‖behaviour) by E_behaviour[ρ log ρ - ρ + 1] a token, as in
        # k3 (Schulman 2020, "Approximating KL divergence"), and the entropy of a token by -log π.
        kl, entropy, count = 0.0, 0.0, 0
        for act in acts:
            now = view.logprobs(act).detach()
            entropy -= float(now.sum())
            count += len(now)
            if act.logprobs is not None:
                apart = now - torch.tensor(act.logprobs, device=now.device)
                kl += float((apart.exp() * apart - apart.exp() + 1).sum())
        self.kl += kl / len(acts)
        self.entropy += entropy / count

    def means(self) -> dict[str, float]:
        """`loss` is the batch's, `kl` a scene's and `entropy` a scene's mean in nats, `reward` a sample's."""
        return {
            "loss": self.loss,
            "kl": self.kl / self.scenes,
            "entropy": self.entropy / self.scenes,
            "reward": self.reward / self.samples,
            "preferred_share": _top_share(self.answers.preferred),
            # Of a step whose samples are all masked there are no actions, and every sum is 0.
            **{name: value / max(self.actions, 1.0) for name, value in self.figures.items()},
        }


def collapsed(recent: Sequence[Answers]) -> bool:
    """Whether the last steps prefer one answer nearly everywhere, more than the rollouts did and than is deserved."""
    if len(recent) < COLLAPSE_WINDOW:
        return False
    preferred, behaved, rewarded = (
        _top_share([answer for answers in recent for answer in getattr(answers, name)])
        for name in ("preferred", "behaved", "rewarded")
    )
    return preferred >= COLLAPSE_SHARE and preferred > behaved and rewarded < DESERVED_SHARE


def _top_share(answers: Sequence[Answer]) -> float:
    return Counter(answers).most_common(1)[0][1] / len(answers)
