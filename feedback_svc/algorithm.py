"""Which algorithm learns from the rewards that a run has seen: by rule, and what an LLM is told of each. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sia_events.shared.calls import ModelCall
from sia_events.shared.events import Evidence, Learning, RunSettings

# Of eight samples an item, nine times in ten wrong each, four groups in ten hold no right one; at nineteen in twenty it
# is two in three: most groups then teach nothing, and what good samples there are had better be imitated.
NEARLY_NONE = 0.95
# More skewed than an exponential distribution, whose skewness is 2; right-or-wrong scores are so at one right in seven.
RIGHT_SKEWED = 2.0
# Fewer than one item in ten is left to be won: an update can lose more than it can gain.
NEARLY_ALL = 0.9
# With fewer calls an item than that, a step's reward is the attempt's.
STEPS = 2.0
# Where most rewards are neither of the two outer ones, a reward tells how far an attempt came.
GRADED = 0.5
# As RLOO weighs it by default in TRL: enough to hold, not enough to forbid a gain.
KL_TO_BASE = 0.05

TRIGGERS: Mapping[str, str] = {
    "grpo": "rollouts are cheap and the reward comes at the end of an attempt",
    "ppo": "rewards are dense: graded, not right or wrong, and earned over several calls; stability matters most; it "
    "learns a value head",
    "rloo": "as grpo, where groups are small: each sample is compared with the mean of the others",
    "entropic": "the histogram of rewards is strongly right-skewed: good samples are rare and worth most",
    "cloning": "almost every reward is the lowest, so there is hardly a gradient: the best samples are imitated",
    "dpo": "the score says which of two whole attempts is better, but its size says nothing: learns from pairs",
    "reinforce": "the model is nearly there and the main risk is to lose that: held near the base model by its KL",
}
WITHOUT_LOGPROBS = ("cloning", "dpo")


@dataclass(frozen=True)
class Signal:
    """What is known of rewards and rollouts beside their figures.

    `ranked`: the task's score ranks attempts, and its size says nothing. `logprobs`: replies carry log-probs.
    `worthless`: the share of rewards that are as good as none; None: what lies in the histogram's lowest tenth is.
    """

    ranked: bool = False
    logprobs: bool = True
    worthless: float | None = None


@dataclass(frozen=True)
class Pick:
    """An algorithm and why; without reasons where the run's settings name it."""

    algorithm: str
    reasons: tuple[str, ...] = ()


def pick(settings: RunSettings, seen: Evidence, signal: Signal) -> Pick:
    """The algorithm to learn by: the one that the settings name, else the first trigger that holds."""
    if settings.algorithm != "auto":
        return Pick(settings.algorithm)
    rewards = f"{seen.rewards_of} rewards"
    lowest, highest = _share(seen, 0) if signal.worthless is None else signal.worthless, _share(seen, -1)
    if signal.ranked:
        return _of_pairs(settings, "the task's score ranks attempts and its size says nothing: pairs are learned from")
    if lowest >= NEARLY_NONE:
        return Pick("cloning", (f"{lowest:.0%} of {rewards} are as good as none: imitate what good there is",))
    if not signal.logprobs:
        return _of_pairs(settings, "replies carry no log-probs, which leaves pairs of better and worse to learn from")
    if seen.reward_skew is not None and seen.reward_skew >= RIGHT_SKEWED:
        return Pick("entropic", (f"{rewards} are right-skewed, {seen.reward_skew:+.2f}: good samples are rare",))
    if highest >= NEARLY_ALL:
        return Pick("reinforce", (f"{highest:.0%} of {rewards} are in the highest tenth: the risk is to lose them",))
    calls = seen.calls_an_item or 0.0
    if settings.learning.credit == "per-step" and calls >= STEPS:
        return Pick("ppo", (f"{calls:.1f} calls an item, each credited for itself by a critic",))
    graded = sum(_share(seen, tenth) for tenth in range(1, len(seen.rewards) - 1))
    if graded >= GRADED and calls >= STEPS:
        return Pick("ppo", (f"{graded:.0%} of {rewards} are graded, and earned over {calls:.1f} calls an item",))
    return Pick("grpo", (f"{calls:.1f} calls an item, rewarded at the end: samples of an item are compared",))


def _of_pairs(settings: RunSettings, why: str) -> Pick:
    idle = "dpo compares whole attempts: learning.credit is idle"
    return Pick("dpo", (why, idle) if settings.learning.credit == "per-step" else (why,))


def offered(settings: RunSettings, signal: Signal) -> Mapping[str, str]:
    """The algorithms that an LLM may name, each with its trigger."""
    if settings.algorithm != "auto":
        return {settings.algorithm: TRIGGERS[settings.algorithm]}
    return TRIGGERS if signal.logprobs else {name: TRIGGERS[name] for name in WITHOUT_LOGPROBS}


def learning(settings: RunSettings, algorithm: str) -> Learning:
    """The settings of learning under `algorithm`: REINFORCE that was picked, not set, is held near the base model."""
    asked = settings.learning
    if settings.algorithm == "auto" and algorithm == "reinforce" and asked.kl == 0:
        return asked.model_copy(update={"kl": KL_TO_BASE})
    return asked


def carry_logprobs(calls: Iterable[ModelCall], whole: bool = False) -> bool:
    """Whether replies made for an item came with log-probs; so too where there are none to tell by.

    `whole`: rollouts are whole attempts, of which every call is learned from, whether it names an item or not.
    """
    replies = [call.reply for call in calls if (whole or call.item is not None) and call.reply]
    said = [reply if "choice" in reply else (reply.get("choices") or ({},))[0] for reply in replies]
    return not said or any(each.get("logprobs") for each in said)


def _share(seen: Evidence, tenth: int) -> float:
    return seen.rewards[tenth] / sum(seen.rewards) if seen.rewards else 0.0
