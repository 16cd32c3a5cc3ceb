"""What a learning process is told: from what to learn, where to, and how."""

from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import msgspec

from sia_events.shared.events import Learning


@dataclass(frozen=True)
class Spec:
    """One update. All paths are absolute.

    `model` is a model folder, `adapter_in` the adapter that made the rollouts (None: the base weights), `rollouts` a
    file as `groups.read` takes it, `checkpoint` a file that a killed process goes on from (None: none is kept).
    `targets` are the layers that a fresh adapter changes, by the end of their names (none: all linear ones).
    `micro_prompts` (None: by their length) bounds memory, and changes the result by the rounding of sums alone.
    `max_seconds` (wall) ends learning, at the price that a repeat may end elsewhere; everything else repeats bit for
    bit on one machine with one number of `threads`. `recompute` trades a third more time for the memory of
    activations; None: for large models. `engine` is what computes (`opening.py`).
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
    targets: tuple[str, ...] = ()
    warmup: int = 5
    grad_norm: float = 1.0
    max_seconds: float | None = None
    threads: int = 1
    recompute: bool | None = None
    engine: Literal["auto", "own", "transformers"] = "auto"

    @property
    def identity(self) -> str:
        """SHA-256 of all that the finished adapter depends on: a checkpoint of another identity is another update's."""
        # As earlier releases told it, whose checkpoints are gone on from.
        told = to_json(replace(self, micro_prompts=self.micro_prompts or 8), places=False)
        data = Path(self.rollouts).read_bytes()
        parent = Path(self.adapter_in, "adapter_model.safetensors").read_bytes() if self.adapter_in else b""
        return sha256(b"".join(sha256(part).digest() for part in (told, data, parent))).hexdigest()


def to_json(spec: Spec, places: bool = True) -> bytes:
    fields = {name: value for name, value in vars(spec).items() if places or name not in PLACES}
    return msgspec.json.encode(fields | {"learning": spec.learning.model_dump()}, order="sorted")


def from_json(text: bytes) -> Spec:
    """Raises ValueError or TypeError for what is no spec."""
    fields = msgspec.json.decode(text)
    learning = Learning.model_validate(fields.pop("learning", {}))
    return Spec(**fields | {"learning": learning, "targets": tuple(fields.get("targets", ()))})


PLACES = ("rollouts", "adapter_out", "adapter_in", "checkpoint")
"""Where things lie: of no consequence for what is learned."""
