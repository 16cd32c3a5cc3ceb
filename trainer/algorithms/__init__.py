"""The algorithms, a file each: rewards of a group of samples in, what each of them weighs out."""

from collections.abc import Mapping

from sia_events.trainer.algorithms.cloning import CLONING
from sia_events.trainer.algorithms.dpo import DPO
from sia_events.trainer.algorithms.entropic import ENTROPIC
from sia_events.trainer.algorithms.grpo import GRPO
from sia_events.trainer.algorithms.ppo import PPO
from sia_events.trainer.algorithms.reinforce import REINFORCE
from sia_events.trainer.algorithms.rloo import RLOO
from sia_events.trainer.algorithms.weighing import Algorithm, RewardRefused, Weighed

__all__ = ["ALGORITHMS", "Algorithm", "RewardRefused", "Weighed"]

ALGORITHMS: Mapping[str, Algorithm] = {
    algorithm.name: algorithm for algorithm in (REINFORCE, GRPO, RLOO, PPO, ENTROPIC, CLONING, DPO)
}
"""By the name that events and settings use."""
