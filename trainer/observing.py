"""What a step looked like: distance from the rollouts, entropy, preferred answers; and when that is reason to stop."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import torch

from sia_events.trainer.groups import Act, RolloutGroup
from sia_events.trainer.losses import Figures
from sia_events.trainer.views import View

COLLAPSE_WINDOW, COLLAPSE_SHARE, DESERVED_SHARE = 4, 0.9, 0.75
"""Collapsed: over so many steps one answer is preferred for this share of prompts, and best rewarded far less often."""

FARTHEST = 20.0
"""The most that a token's log-ratio is counted as, in nats: already e^20 times as likely as when it was sampled."""

Answer = tuple[int, ...]


@dataclass
class Answers:
    """Of each scene of a step: the answer that the policy prefers, the rollouts' own, and the best rewarded one."""

    preferred: list[Answer] = field(default_factory=list)
    behaved: list[Answer] = field(default_factory=list)
    rewarded: list[Answer] = field(default_factory=list)


@dataclass
class Met:
    """What the samples of a group made of one scene, over all parts of a step: sums of `acts` and their `actions`."""

    kl: float = 0.0
    entropy: float = 0.0
    acts: int = 0
    actions: int = 0
    liked: list[tuple[float, Answer]] = field(default_factory=list)
    paid: list[tuple[float, Answer]] = field(default_factory=list)
    behaved: Answer | None = None

    def choose(self, view: View, act: Act) -> None:
        """All acts of a choice have one distribution."""
        now = view.distribution.detach()
        self.entropy, self.acts, self.actions = -float((now.exp() * now).sum()), 1, 1
        if act.logprobs is not None:
            behaviour = torch.tensor(act.logprobs, device=now.device)
            self.behaved = view.scene.continuations[int(behaviour.argmax())]
            self.kl = float((now.exp() * (now - behaviour)).sum())

    def write(self, view: View, act: Act) -> None:
        """Of a completion only what was sampled is known.

        So KL(π‖behaviour) is by E_behaviour[ρ log ρ - ρ + 1] a token, as in k3 (Schulman 2020, "Approximating KL
        divergence"), and the entropy of a token by -log π.
        """
        now = view.logprobs(act).detach()
        self.entropy -= float(now.sum())
        self.acts, self.actions = self.acts + 1, self.actions + len(now)
        if act.logprobs is not None:
            # Of a token that far away, which its sample is masked for, the exponential is no number any more.
            apart = (now - torch.tensor(act.logprobs, device=now.device)).clamp(max=FARTHEST)
            self.kl += float((apart.exp() * apart - apart.exp() + 1).sum())


@dataclass
class Tally:
    """Sums over one step, whose samples have that `reward`, and the scenes that they came to, by group and number."""

    samples: int
    reward: float
    loss: float = 0.0
    actions: float = 0.0
    figures: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    scenes: dict[tuple[str, int], Met] = field(default_factory=dict)
    tokens: int = 0

    @classmethod
    def of(cls, batch: Sequence[RolloutGroup]) -> "Tally":
        rewards = [sample.reward for group in batch for sample in group.samples]
        return cls(len(rewards), sum(rewards))

    def add(
        self, groups: Sequence[RolloutGroup], views: Sequence[Mapping[int, View]], loss: float, told: Figures
    ) -> None:
        """Take in one part of the step; `told` are means over its actions."""
        self.loss += loss
        self.actions += told.get("actions", 0.0)
        for name, value in told.items():
            if name != "actions":
                self.figures[name] += told["actions"] * value
        for group, seen in zip(groups, views, strict=True):
            for number in sorted(seen):
                self._meet(group, number, seen[number])

    def _meet(self, group: RolloutGroup, number: int, view: View) -> None:
        said = view.scene.continuations
        self.tokens += view.scene.tokens
        met = self.scenes.setdefault((group.name, number), Met())
        best = int(view.distribution.argmax())
        met.liked.append((view.distribution[best].item(), said[best]))
        acts = [(act, sample.reward) for sample in group.samples for act in sample.acts if act.scene == number]
        met.paid += [(reward, group.said(act)) for act, reward in acts]
        if view.scene.choice:
            met.choose(view, acts[0][0])
        else:
            for act, _ in acts:
                met.write(view, act)

    @property
    def kl(self) -> float:
        """A scene's mean."""
        return sum(met.kl / met.acts for met in self.scenes.values()) / len(self.scenes)

    @property
    def answers(self) -> Answers:
        told = Answers()
        for met in self.scenes.values():
            told.preferred.append(max(met.liked, key=itemgetter(0))[1])
            told.rewarded.append(max(met.paid, key=itemgetter(0))[1])
            told.behaved.append(met.behaved or Counter(said for _, said in met.paid).most_common(1)[0][0])
        return told

    def means(self) -> dict[str, float]:
        """`loss` is the batch's, `kl` a scene's and `entropy` a scene's mean in nats, `reward` a sample's."""
        return {
            "loss": self.loss,
            "kl": self.kl,
            "entropy": sum(met.entropy / met.actions for met in self.scenes.values()) / len(self.scenes),
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
