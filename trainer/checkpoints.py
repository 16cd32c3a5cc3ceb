"""Where learning stands after a step, in one file that is whole or not there: what a killed process goes on from."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


class SavingFailed(Exception):
    """A checkpoint or an adapter could not be written or read; the message says what is kept and how to go on."""


@dataclass(frozen=True)
class Checkpoint:
    """The state behind `step` steps of the update of that `identity`; `state` is JSON."""

    identity: str
    step: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Put `checkpoint` in the place of the one before; returns when it is on disk. Raises SavingFailed."""
    told = {"identity": checkpoint.identity, "step": checkpoint.step, "state": checkpoint.state}
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    body = save(tensors, {"learning": json.dumps(told)})
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        draft.unlink(missing_ok=True)
        kept = f"the one of step {checkpoint.step - 1} is kept" if path.exists() else "there is none before it"
        raise SavingFailed(
            f"The checkpoint of step {checkpoint.step} could not be written to {path}: {error.strerror}; {kept}. Make "
            "room and start learning again: it goes on from there."
        ) from error


def load_checkpoint(path: Path, identity: str) -> Checkpoint | None:
    """The checkpoint at `path`; None where there is none, or one of another update. Raises SavingFailed."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["learning"])
            if told["identity"] != identity:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise SavingFailed(f"{path} is no checkpoint ({error}). Remove it to learn from the start.") from error
    return Checkpoint(identity, told["step"], told["state"], tensors)
