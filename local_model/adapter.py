"""LoRA adapters: made, read with suspicion, and written, in PEFT's folder format."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


class AdapterRefused(Exception):
    """A folder is no usable adapter of this model; nothing of it was loaded."""


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of weights: module -> (down [rank, in], up [out, rank]), applied as `scale`·up·down."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def fresh(shapes: Mapping[str, torch.Size], rank: int, alpha: float, seed: int) -> Adapter:
    """An adapter that changes nothing yet: down Kaiming-uniform as PEFT draws it, up zero."""
    draw = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (rows, columns) in shapes.items():
        bound = columns**-0.5
        down = (torch.rand(rank, columns, generator=draw) * 2 - 1) * bound
        factors[name] = (down, torch.zeros(rows, rank))
    return Adapter(factors, rank, alpha)


def read(folder: Path, shapes: Mapping[str, torch.Size], model: str, digest: str) -> Adapter:
    """The adapter in `folder`, fit for a base of those `shapes`, that `model` id and weights `digest`.

    Raises AdapterRefused for anything but plain LoRA in safetensors, another base, unknown or misshapen factors,
    or numbers that are not finite. Pickled weights are never opened.
    """
    try:
        config = dict(json.loads((folder / CONFIG).read_text()))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise AdapterRefused(f"{folder} is no adapter folder: it needs {CONFIG} and {WEIGHTS} ({error}).") from error
    _check_config(folder, config, model, digest)

    rank, alpha = config["r"], config["lora_alpha"]
    names = {key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for key in tensors}
    factors = {}
    for name in sorted(names):
        down, up = (tensors.get(f"{_PREFIX}{name}.lora_{side}.weight") for side in "AB")
        if name not in shapes or down is None or up is None:
            raise AdapterRefused(f"{folder} changes {name}, which is no linear layer of {model} or lacks a factor.")
        rows, columns = shapes[name]
        if down.shape != (rank, columns) or up.shape != (rows, rank):
            raise AdapterRefused(
                f"{folder}: {name} has factors {list(down.shape)}, {list(up.shape)}; "
                f"rank {rank} on this layer needs [{rank}, {columns}], [{rows}, {rank}]."
            )
        if not (down.isfinite().all() and up.isfinite().all()):
            raise AdapterRefused(f"{folder}: {name} holds numbers that are not finite.")
        factors[name] = (down.float(), up.float())
    if 2 * len(factors) != len(tensors):
        raise AdapterRefused(f"{folder} holds tensors that are no LoRA factors.")
    return Adapter(factors, rank, alpha)


def write(adapter: Adapter, folder: Path, model: str, digest: str) -> None:
    """Write `adapter` as a PEFT folder, all of it or none; the same adapter makes the same bytes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tensors = {}
        for name, (down, up) in sorted(adapter.factors.items()):
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = down.detach().contiguous()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = up.detach().contiguous()
        save_file(tensors, draft / WEIGHTS)
        config = {
            "base_model_name_or_path": model,
            "bias": "none",
            "lora_alpha": adapter.alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": adapter.rank,
            "revision": digest,
            "target_modules": sorted({name.rsplit(".", 1)[-1] for name in adapter.factors}),
            "task_type": "CAUSAL_LM",
        }
        (draft / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        for file in (draft / WEIGHTS, draft / CONFIG):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check_config(folder: Path, config: dict, model: str, digest: str) -> None:
    plain = {"peft_type": "LORA", "bias": "none"}
    for key, wanted in plain.items():
        if config.get(key) != wanted:
            raise AdapterRefused(f"{folder}: {key} is {config.get(key)!r}, only {wanted!r} is served.")
    for key in ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise AdapterRefused(f"{folder}: {key} is set, which is not served.")
    if config.get("base_model_name_or_path") != model:
        raise AdapterRefused(f"{folder} belongs to {config.get('base_model_name_or_path')!r}, not to {model}.")
    if config.get("revision") not in (None, digest):
        raise AdapterRefused(f"{folder} was trained on other weights of {model} ({config['revision']}, here {digest}).")
    if not isinstance(config.get("r"), int) or config["r"] < 1 or not isinstance(config.get("lora_alpha"), int | float):
        raise AdapterRefused(f"{folder}: r and lora_alpha must be a positive whole number and a number.")
