"""Any causal language model of a Hugging Face folder as an engine, by transformers and peft; on GPUs if there are."""

import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from sia_events.local_model import adapter as lora
from sia_events.local_model.weights import ModelFolder
from sia_events.trainer.engines import GPU_TOKENS, TOKENS, Scored, recomputes, starting_adapter, text, told
from sia_events.trainer.groups import Scene
from sia_events.trainer.spec import Spec

# Without it cuBLAS sums in another order each time (CUDA's documentation, cuBLAS, "Results reproducibility").
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class HuggingFaceEngine:
    """The base in bfloat16 on a GPU unless told otherwise, in float32 on a CPU; the adapter in float32 always.

    Of several GPUs each holds some of the layers, as accelerate lays them out.
    """

    def __init__(self, folder: ModelFolder, spec: Spec) -> None:
        os.environ.setdefault(*WORKSPACE)
        gpus = torch.cuda.device_count()
        wanted = spec.learning.dtype
        dtype = getattr(torch, wanted) if wanted != "auto" else torch.bfloat16 if gpus else torch.float32
        place = "auto" if gpus > 1 else "cuda" if gpus else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            folder.path, dtype=dtype, device_map=place, local_files_only=True, use_safetensors=True
        )
        head = model.get_output_embeddings()
        shapes = {
            name: module.weight.shape
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
        start = starting_adapter(shapes, folder, spec)
        config = LoraConfig(
            r=start.rank,
            lora_alpha=start.alpha,  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=list(start.factors),
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(model, config)
        self.adapter = lora.Adapter(_set(model, start.factors), start.rank, start.alpha)
        self.width: int = model.config.get_text_config().hidden_size
        self.device = next(model.parameters()).device
        self.at_once = TOKENS if self.device.type == "cpu" else GPU_TOKENS
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        size = sum(parameter.numel() for parameter in model.parameters())
        self.model.eval()
        if recomputes(size, spec):
            model.activation_checkpointing_enable({"use_reentrant": False})
            # Layers are computed anew in training mode only, in which nothing may be dropped: rollouts were not.
            self.model.train()
            for module in self.model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.0  # type: ignore[assignment]

    def cost(self, scenes: Sequence[Scene]) -> int:
        """Every row repeats its prompt, and is filled up to the longest of the pass."""
        rows = _rows(scenes)
        return len(rows) * max(map(len, rows))

    def score(
        self, scenes: Sequence[Scene], adapted: bool = True, entropy: bool = False, hidden: bool = False
    ) -> list[list[Scored]]:
        rows = _rows(scenes)
        longest = max(len(tokens) for scene in scenes for tokens in scene.continuations)
        with nullcontext() if adapted else self.model.disable_adapter():
            logits, states = self._forward(list(rows), longest, hidden)
        temperature = 1.0 if scenes[0].choice else scenes[0].temperature
        logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
        scored = []
        for scene in scenes:
            seen = []
            for tokens in scene.continuations:
                row = rows[(*scene.prompt, *tokens[:-1])]
                before = None if states is None else states[row, -len(tokens) :]
                seen.append(told(logprobs[row, -len(tokens) :], tokens, before, entropy))
            scored.append(seen)
        return scored

    def served(self, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        ((scored,),) = self.score([text(prompt, completion)])
        return scored.tokens.tolist()

    def _forward(self, rows: Sequence[tuple[int, ...]], keep: int, hidden: bool) -> tuple[Tensor, Tensor | None]:
        """Logits [rows, keep, vocabulary] and hidden vectors [rows, keep, width] at the last places of each row."""
        width = max(map(len, rows))
        tokens = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows], device=self.device)
        seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        out = self.model(
            input_ids=tokens,
            attention_mask=seen,
            position_ids=(seen.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            output_hidden_states=hidden,
            **({"logits_to_keep": keep} if self._keeps else {}),
        )
        logits = out.logits[:, -keep:].to(self.device)
        return logits, out.hidden_states[-1][:, -keep:].to(self.device) if hidden else None


def _rows(scenes: Sequence[Scene]) -> dict[tuple[int, ...], int]:
    """The rows of a pass, each with its number: continuations that differ in their last token alone have one."""
    rows: dict[tuple[int, ...], int] = {}
    for scene in scenes:
        for tokens in scene.continuations:
            rows.setdefault((*scene.prompt, *tokens[:-1]), len(rows))
    return rows


def _set(
    model: torch.nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> Mapping[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Put `factors` into peft's layers; returns the layers' own, which are trained."""
    live = {}
    with torch.no_grad():
        for name, given in factors.items():
            layer = model.get_submodule(name)
            own = tuple(getattr(layer, side)["default"].weight for side in ("lora_A", "lora_B"))
            for mine, value in zip(own, given, strict=True):
                mine.copy_(value)
            live[name] = own
    return live
