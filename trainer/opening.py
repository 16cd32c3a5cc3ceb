"""Which engine a model folder is learned with."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import torch

from sia_events.local_model.weights import MANIFEST, ModelFolder, ModelNotReady
from sia_events.local_model.weights import opened as own_folder
from sia_events.trainer.engines import Engine, OwnEngine
from sia_events.trainer.spec import Spec

WEIGHTS = "model.safetensors"
PACKAGES = ("transformers", "peft", "accelerate")


def opened(spec: Spec) -> tuple[Engine, ModelFolder]:
    """The engine on the spec's model folder. Raises ModelNotReady.

    `auto` is our own network for the embedded model, which it also serves, and for a plain Llama where there is no GPU;
    transformers for everything else.
    """
    folder = model_folder(Path(spec.model))
    if spec.engine == "own" or (spec.engine == "auto" and _ours(folder.path)):
        return OwnEngine(folder, spec), folder
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ModelNotReady(f"Learning on {folder.path} needs {', '.join(missing)}.", "pip install 'sia-events[train]'")
    from sia_events.trainer.hugging_face import HuggingFaceEngine

    return HuggingFaceEngine(folder, spec), folder


def model_folder(path: Path) -> ModelFolder:
    """The folder with its model's name and the SHA-256 of its weights, from our manifest or from the files."""
    if (path / MANIFEST).exists():
        return own_folder(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelNotReady(f"{path} holds no weights in safetensors.", f"put a Hugging Face model folder at {path}")
    digests = []
    for name in files:
        with name.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return ModelFolder(path, path.name, digest)


def _ours(path: Path) -> bool:
    """A GPU changes nothing for the embedded model: its server computes in float32 on the CPU."""
    return (path / MANIFEST).exists() or (_plain(path) and not torch.cuda.is_available())


def _plain(path: Path) -> bool:
    """Whether it is a model that our own network computes."""
    config = json.loads((path / "config.json").read_text())
    biases = config.get("attention_bias", False) or config.get("mlp_bias", False)
    rope = config.get("rope_parameters") or {}
    return (
        (config["model_type"], rope.get("rope_type"), biases) == ("llama", "default", False)
        and config.get("head_dim") is not None
        and (path / WEIGHTS).exists()
    )
