"""What a policy makes of logged rollouts: the log-probs of their acts, scene by scene."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sia_events.local_model.policy import choice_distribution
from sia_events.trainer.engines import Engine, Scored
from sia_events.trainer.groups import Act, RolloutGroup, Scene


@dataclass(frozen=True)
class View:
    """One scene under a policy: its continuations scored, and the log-probs [continuations] of each as a whole.

    `scored` is by the number of the answer in its group, of which `scene` may have a few.

    For a choice these are the normalised distribution that it is drawn from, for a completion sums over its tokens.
    """

    scene: Scene
    scored: Mapping[int, Scored]
    distribution: Tensor

    def logprobs(self, act: Act) -> Tensor:
        """Of the act's actions: one for a choice, one a token for a completion."""
        if self.scene.choice:
            return self.distribution[act.answer : act.answer + 1]
        return self.scored[act.answer].tokens

    def entropies(self, act: Act) -> Tensor:
        """Of the distributions that the act's actions were drawn from."""
        if self.scene.choice:
            return -(self.distribution.exp() * self.distribution).sum().view(1)
        entropy = self.scored[act.answer].entropy
        assert entropy is not None, "entropies were asked for"
        return entropy

    def states(self, act: Act) -> Tensor:
        """Hidden vectors [actions, width] before the act's actions."""
        hidden = self.scored[act.answer].hidden
        assert hidden is not None, "hidden vectors were asked for"
        return hidden[:1] if self.scene.choice else hidden


def view(
    engine: Engine,
    groups: Sequence[RolloutGroup],
    adapted: bool = True,
    entropy: bool = False,
    hidden: bool = False,
) -> list[dict[int, View]]:
    """Every scene that samples of a group came to, by its number, in as few passes as kinds and temperatures allow."""
    views: list[dict[int, View]] = [{} for _ in groups]
    places = [(g, s, answers) for g, group in enumerate(groups) for s, answers in group.met().items()]

    def kind(place: tuple[int, int, list[int]]) -> tuple[bool, float]:
        scene = groups[place[0]].scenes[place[1]]
        return scene.choice, 1.0 if scene.choice else scene.temperature

    for (choice, _), alike in itertools.groupby(sorted(places, key=kind), key=kind):
        together = list(alike)
        scenes = [groups[g].scenes[s].only(answers) for g, s, answers in together]
        scored = engine.score(scenes, adapted, entropy and not choice, hidden)
        for (g, s, answers), scene, row in zip(together, scenes, scored, strict=True):
            totals = torch.stack([one.tokens.sum() for one in row])
            if choice:
                bias = None if scene.bias is None else torch.tensor(scene.bias, device=totals.device)
                totals = choice_distribution(totals, bias, scene.temperature)
            views[g][s] = View(scene, dict(zip(answers, row, strict=True)), totals)
    return views
