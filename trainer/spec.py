"""What a learning process is told: from what to learn, where to, and how."""

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

import msgspec

from sia_events.shared.events import Learning

LESS_MEMORY = """\
Set learning.recompute=true, or take fewer or shorter calls an attempt (under dpo fewer samples, too), a smaller \
model, or a machine with more memory."""


@dataclass(frozen=True)
class Spec:
    """One update. All paths are absolute.

    `model` is a model folder, `adapter_in` the adapter that made the rollouts (None: the base weights), `rollouts` a
    file as `groups.read` takes it, `checkpoint` a file that a killed process goes on from (None: none is kept).
    `micro_prompts` (None: by their length) bounds memory, and changes the result by the rounding of sums alone. All
    repeats bit for bit on one machine with one number of `threads`. `engine` is what computes (`opening.py`).
    """

    model: str
    rollouts: str
    adapter_out: str
    adapter_in: str | None = None
    checkpoint: str | None = None
    algorithm: str = "reinforce"
    learning: Learning = field(default_factory=Learning)
    seed: int = 0
    epochs: int = 1
    micro_prompts: int | None = None
    warmup: int = 5
    grad_norm: float = 1.0
    threads: int = 1
    engine: Literal["auto", "own", "transformers"] = "auto"

    @property
    def identity(self) -> str:
        """SHA-256 of all that the finished adapter depends on: a checkpoint of another identity is another update's."""
        fields = {name: value for name, value in vars(self).items() if name not in PLACES}
        learning = self.learning.model_dump()
        # As earlier releases told it, whose checkpoints are gone on from.
        as_before = {"micro_prompts": self.micro_prompts or 8, "max_seconds": None}
        as_before |= {k: learning.pop(k) for k in ("targets", "recompute")}
        told = msgspec.json.encode(fields | as_before | {"learning": learning}, order="sorted")
        data = Path(self.rollouts).read_bytes()
        parent = Path(self.adapter_in, "adapter_model.safetensors").read_bytes() if self.adapter_in else b""
        return sha256(b"".join(sha256(part).digest() for part in (told, data, parent))).hexdigest()


def to_json(spec: Spec) -> bytes:
    return msgspec.json.encode(vars(spec) | {"learning": spec.learning.model_dump()}, order="sorted")


def from_json(text: bytes) -> Spec:
    """Raises ValueError or TypeError for what is no spec."""
    fields = msgspec.json.decode(text)
    return Spec(**fields | {"learning": Learning.model_validate(fields.pop("learning", {}))})


PLACES = ("rollouts", "adapter_out", "adapter_in", "checkpoint")
"""Where things lie: of no consequence for what is learned."""
