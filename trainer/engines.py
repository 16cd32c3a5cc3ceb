"""Who computes log-probs and their gradients: the seam, and our own network behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sia_events.local_model import adapter as lora
from sia_events.local_model import network
from sia_events.local_model.policy import common_length
from sia_events.local_model.weights import ModelFolder
from sia_events.trainer.groups import Scene
from sia_events.trainer.spec import LESS_MEMORY, Spec

TOKENS, GPU_TOKENS = 1536, 8192
"""At once, at most: what bounds the memory that activations take."""
LARGE = 1_000_000_000
"""From so many parameters on, activations are computed anew in the backward pass unless the spec says otherwise."""
LONG = 4 * TOKENS
"""So too from so many tokens on that go through the model together whatever there is room for."""


class TargetsRefused(ValueError):
    """No layer is of the names that were to be trained; nothing was trained."""


class OutOfMemory(Exception):
    """What is to be learned does not fit into memory, nor does half of it at once; the message says what to do."""

    def __init__(self, where: str) -> None:
        super().__init__(f"Out of memory, {where}. {LESS_MEMORY}")


# As the allocators of torch, of C++, of oneDNN, of CUDA and of cuBLAS tell it.
NO_MEMORY = (
    "allocate memory",
    "std::bad_alloc",
    "could not create a memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says; but for one allocator torch has no type of its own for it."""
    if isinstance(error, OutOfMemory | torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in NO_MEMORY)


@dataclass(frozen=True)
class Scored:
    """One continuation of one scene, of T tokens: `tokens` [T] are its log-probs in nats, at the scene's temperature
    (a choice's at 1: its own applies to sums). `entropy` [T] and `hidden` [T, width], before each token, where asked.
    """

    tokens: Tensor
    entropy: Tensor | None = None
    hidden: Tensor | None = None


class Engine(Protocol):
    """A frozen base model with one trainable adapter, whose factors require gradients and are the live ones."""

    @property
    def adapter(self) -> lora.Adapter: ...

    @property
    def width(self) -> int:
        """Of hidden vectors."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def at_once(self) -> int:
        """How many tokens a pass is to have, unless one call has more."""
        ...

    def cost(self, scenes: Sequence[Scene]) -> int:
        """How many tokens a pass over the scenes computes."""
        ...

    def score(
        self, scenes: Sequence[Scene], adapted: bool = True, entropy: bool = False, hidden: bool = False
    ) -> list[list[Scored]]:
        """Every continuation of every scene. All scenes are choices, or none is; all are of one temperature.

        Without `adapted` the adapter is off: the base model. Differentiable in the adapter.
        """
        ...

    def served(self, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """Log-probs of a text's tokens with the adapter, at temperature 1, in the precision that it is served in."""
        ...


class OwnEngine:
    """The network that also serves, so that learner and sampler compute the same."""

    device = torch.device("cpu")
    at_once = TOKENS

    def __init__(self, folder: ModelFolder, spec: Spec) -> None:
        self._net = network.load(folder.path)
        size = sum(rows * columns for rows, columns in self._net.modules.values())
        if recomputes(size, spec):
            self._net = network.load(folder.path, recompute=True)
        self._bfloat16 = spec.learning.dtype == "bfloat16"
        self.adapter = starting_adapter(self._net.modules, folder, spec)
        for pair in self.adapter.factors.values():
            for factor in pair:
                factor.requires_grad_()
        self.width = self._net.weight("model.embed_tokens").shape[1]

    def cost(self, scenes: Sequence[Scene]) -> int:
        return sum(scene.tokens for scene in scenes)

    def score(
        self, scenes: Sequence[Scene], adapted: bool = True, entropy: bool = False, hidden: bool = False
    ) -> list[list[Scored]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            return self._score(scenes, self.adapter if adapted else None, entropy, hidden)

    def served(self, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        ((scored,),) = self._score([text(prompt, completion)], self.adapter, False, False)
        return scored.tokens.tolist()

    def _score(
        self, scenes: Sequence[Scene], adapter: lora.Adapter | None, entropy: bool, hidden: bool
    ) -> list[list[Scored]]:
        prompts = [scene.prompt for scene in scenes]
        common = min(common_length(prompts), min(map(len, prompts)) - 1)
        prefix = self._net.empty()
        if common:
            _, prefix = self._net.extend(prefix, [prompts[0][:common]], adapter)
        rests = [prompt[common:] for prompt in prompts]
        offered = [scene.continuations for scene in scenes]
        last, behind = network.continuation_states(self._net, adapter, prefix, rests, offered)
        temperature = 1.0 if scenes[0].choice else scenes[0].temperature
        first = torch.log_softmax(self._net.logits(last).float() / temperature, dim=-1)
        scored = []
        for i, continuations in enumerate(offered):
            row = []
            for j, tokens in enumerate(continuations):
                states, logprobs = last[i : i + 1], first[i : i + 1]
                if (i, j) in behind:
                    after = torch.log_softmax(self._net.logits(behind[i, j]).float() / temperature, dim=-1)
                    states, logprobs = torch.cat([states, behind[i, j]]), torch.cat([logprobs, after])
                row.append(told(logprobs, tokens, states if hidden else None, entropy))
            scored.append(row)
        return scored


def text(prompt: Sequence[int], completion: Sequence[int]) -> Scene:
    """A text as a scene of its own."""
    return Scene(False, tuple(prompt), (tuple(completion),), None, 1.0)


def told(logprobs: Tensor, tokens: Sequence[int], hidden: Tensor | None, entropy: bool) -> Scored:
    """What is kept of a distribution over the vocabulary [T, vocabulary] at each of `tokens`."""
    return Scored(
        logprobs[torch.arange(len(tokens)), list(tokens)],
        -(logprobs.exp() * logprobs).sum(dim=-1) if entropy else None,
        None if hidden is None else hidden.float(),
    )


def recomputes(parameters: int, spec: Spec) -> bool:
    """Whether the backward pass computes activations anew, on a model of so many parameters."""
    asked = spec.learning.recompute
    return parameters >= LARGE if asked is None else asked


def starting_adapter(modules: Mapping[str, torch.Size], folder: ModelFolder, spec: Spec) -> lora.Adapter:
    """The adapter that made the rollouts, or a fresh one. Raises AdapterRefused, TargetsRefused."""
    learning = spec.learning
    if spec.adapter_in is not None:
        return lora.read(Path(spec.adapter_in), modules, folder.model, folder.digest)
    # In an order of their own, so that every engine draws the same.
    wanted = {name: shape for name, shape in sorted(modules.items()) if name.endswith(learning.targets or ("",))}
    if not wanted:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in modules}))
        raise TargetsRefused(f"No layer's name ends in {' or '.join(learning.targets)}; {folder.model} has {known}.")
    return lora.fresh(wanted, learning.rank, learning.rank * learning.scale, spec.seed)
