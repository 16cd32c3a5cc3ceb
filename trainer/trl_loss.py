"""TRL as the backend: its trainers' forward pass and loss, of the rollouts as they were logged.

TRL draws nothing here: a batch has the token ids, log-probs and advantages of the log. Steps, schedule, checkpoints and
what ends learning are the learner's, whoever's the loss is. A call is a row of its own, where our losses take all calls
of a sample together: of samples of several calls, `sample` and `constant` weigh calls alike instead of samples, and
RLOO has a ratio a call.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sia_events.local_model.weights import ModelNotReady
from sia_events.trainer.algorithms.dpo import pairs
from sia_events.trainer.hugging_face import HuggingFaceEngine
from sia_events.trainer.preparing import Prepared
from sia_events.trainer.spec import Spec
from sia_events.trainer.updating import Part, PartLoss, Totals

LOSS_TYPES = {"sample": "grpo", "token": "dapo", "constant": "dr_grpo"}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One call: its tokens, the log-probs of the completion's that do not change, and its weight. `sample` is whose."""

    sample: int
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    then: Sequence[float]
    base: Sequence[float]
    advantage: float


def trl_loss(engine: HuggingFaceEngine, spec: Spec, temperature: float) -> PartLoss:
    """The loss of the spec's algorithm by TRL's trainer of it, over the engine's model. Raises ModelNotReady."""
    if find_spec("trl") is None:
        raise ModelNotReady("learning.backend=trl needs TRL, which is not installed.", "pip install 'sia-events[trl]'")
    trainer = _trainer(engine, spec, temperature)

    def loss(part: Part, prepared: Prepared, whole: Totals, masked: Collection[int]) -> Tensor:
        rows = _rows(part, prepared, whole)
        if spec.algorithm == "dpo":
            first = rows[0].sample
            chosen = [pair for pair in _pairs(part, first, spec.learning.margin) if not set(pair) & set(masked)]
            if not chosen:
                return torch.zeros((), device=engine.device, requires_grad=True)
            found = trainer.compute_loss(trainer.model, _on(engine, _compared(rows, chosen, first)))
            return found * len(chosen) / whole.pairs
        inputs = _written(rows, masked)
        inputs["num_items_in_batch"] = torch.tensor(whole.actions)
        found = trainer.compute_loss(trainer.model, _on(engine, inputs))
        # DAPO's is divided by the whole batch's tokens already.
        by_tokens = spec.algorithm == "grpo" and spec.learning.reduction == "token"
        return found if by_tokens else found * len(rows) / whole.calls

    return loss


def _trainer(engine: HuggingFaceEngine, spec: Spec, temperature: float) -> Any:
    """TRL's trainer of the algorithm. It has no data of its own and no words, as nothing is tokenised."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    learning = spec.learning
    common: dict[str, Any] = {
        "output_dir": str(Path(spec.adapter_out).with_name("trl")),
        "use_cpu": engine.device.type == "cpu",
        "bf16": False,  # the engine's model is of the precision it is to have
        "report_to": "none",
        "activation_checkpointing": False,  # the engine's affair too
        "seed": spec.seed,
    }
    drawing = common | {
        "beta": learning.kl,
        "epsilon": learning.clip,
        "temperature": temperature,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "steps_per_generation": 1,
    }
    nothing = {"prompt": ["-"] * 2}
    words = Tokenizer(WordLevel({"-": 0}, unk_token="-"))
    given: dict[str, Any] = {
        "processing_class": PreTrainedTokenizerFast(tokenizer_object=words, pad_token="-", eos_token="-"),
    }
    model = engine.model
    if spec.algorithm == "dpo":
        rows = Dataset.from_dict(nothing | {"chosen": ["-"] * 2, "rejected": ["-"] * 2})
        trainer = DPOTrainer(model, args=DPOConfig(**common, beta=learning.beta), train_dataset=rows, **given)
        trainer.precompute_ref_logps = True  # by us: `Prepared.base`
    else:
        given |= {"train_dataset": Dataset.from_dict(nothing), "reward_funcs": lambda completions, **_: [0.0]}
        if spec.algorithm == "rloo":
            trainer = RLOOTrainer(model, args=RLOOConfig(**drawing), **given)
        else:
            config = GRPOConfig(
                **drawing,
                loss_type=LOSS_TYPES[learning.reduction],
                max_completion_length=1,  # what Dr. GRPO's loss is divided by
                use_bias_correction_kl=True,
            )
            trainer = GRPOTrainer(model, args=config, **given)
    trainer.current_gradient_accumulation_steps = 1
    if "ref" in model.peft_config:
        # A copy of the adapter as it was: our distance is from the base model.
        model.delete_adapter("ref")
    return trainer


def _rows(part: Part, prepared: Prepared, whole: Totals) -> list[Row]:
    rows = []
    advantages, base = list(chain.from_iterable(prepared.advantages)), list(chain.from_iterable(prepared.base or ()))
    end = part.first
    for group, _, sample in part.samples:
        for act in sample.acts:
            begin, end = end, end + group.actions(act)
            rows.append(
                Row(
                    int(whole.sample[begin]),
                    group.scenes[act.scene].prompt,
                    group.said(act),
                    group.behaviour(act) or (),
                    base[begin:end],
                    advantages[begin],
                )
            )
    return rows


def _written(rows: Sequence[Row], masked: Collection[int]) -> Inputs:
    """A batch of GRPO's and RLOO's trainers, [rows] and [rows, tokens]; a masked row has weight 0 in every term."""
    kept = torch.tensor([[row.sample not in masked] for row in rows])
    mask, then = _padded([[1] * len(row.completion) for row in rows]) * kept, _padded([row.then for row in rows])
    told = {
        "prompt_ids": _padded([row.prompt for row in rows], left=True),
        "prompt_mask": _padded([[1] * len(row.prompt) for row in rows], left=True),
        "completion_ids": _padded([row.completion for row in rows]),
        "completion_mask": mask,
        "old_per_token_logps": then,
        "old_logps": (then * mask).sum(dim=1),
        "advantages": torch.tensor([row.advantage for row in rows]) * kept[:, 0],
    }
    return told | {"ref_per_token_logps": _padded([row.base for row in rows])} if rows[0].base else told


def _compared(rows: Sequence[Row], chosen: Sequence[tuple[int, int]], first: int) -> Inputs:
    """A batch of DPO's trainer: the better of all pairs, then the worse, [2 · pairs, tokens]."""
    better, worse = ([rows[pair[side] - first] for pair in chosen] for side in (0, 1))
    both = [*better, *worse]
    return {
        "input_ids": _padded([(*row.prompt, *row.completion) for row in both]),
        "attention_mask": _padded([[1] * (len(row.prompt) + len(row.completion)) for row in both]),
        "completion_mask": _padded([[0] * len(row.prompt) + [1] * len(row.completion) for row in both]),
        "ref_chosen_logps": torch.tensor([sum(row.base) for row in better]),
        "ref_rejected_logps": torch.tensor([sum(row.base) for row in worse]),
    }


def _pairs(part: Part, first: int, margin: float) -> list[tuple[int, int]]:
    """(better, worse) of every group, by the samples' numbers in the batch, in which the part's begin at `first`."""
    found = []
    for group in part.groups:
        found += [(first + a, first + b) for a, b in pairs([sample.reward for sample in group.samples], margin)]
        first += len(group.samples)
    return found


def _padded(rows: Sequence[Sequence[Any]], left: bool = False) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor(
        [[*[0] * (width - len(row)), *row] if left else [*row, *[0] * (width - len(row))] for row in rows]
    )


def _on(engine: HuggingFaceEngine, inputs: Inputs) -> Inputs:
    return {name: tensor.to(engine.device) for name, tensor in inputs.items()}
