"""The network: a Llama decoder with named LoRA adapters, one forward pass for serving and for learning alike.

Written on torch alone, because importing a model library costs seconds at every start. Names and layout of the
weights are Hugging Face's (`LlamaForCausalLM`), adapters are read and written in PEFT's LoRA format.
Architecture: Touvron et al. 2023 (arXiv 2302.13971); grouped queries: arXiv 2305.13245; LoRA: arXiv 2106.09685.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sia_events.local_model.adapter import Adapter

Tokens = Sequence[int]

SLOTS = 12_288
"""Key-value slots (46 kB each in the embedded model) of one pass: what bounds memory."""
FEW_ROWS = 4
"""Fewer are no gain for oneDNN."""

_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


@dataclass(frozen=True)
class Shape:
    """Sizes of the network, named as in the model folder's config.json."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope_theta: float


@dataclass(frozen=True)
class State:
    """Keys and values of `B` token sequences, held so that they can be continued.

    `kv[layer]` is (keys, values), each [B, kv_heads, slots, head_dim]; `valid` [B, slots] is False where a slot is
    padding; `lengths` [B] counts each row's real tokens.
    """

    kv: tuple[tuple[Tensor, Tensor], ...]
    valid: Tensor
    lengths: Tensor

    def rows(self, index: Sequence[int]) -> "State":
        """The state of those rows, in that order; a row may be taken several times."""
        at = torch.tensor(index)
        kv = tuple((keys[at], values[at]) for keys, values in self.kv)
        return State(kv, self.valid[at], self.lengths[at])

    def spread(self, count: int) -> "State":
        """A state of one row seen as `count` equal rows, without copying it."""
        kv = tuple((keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)) for keys, values in self.kv)
        return State(kv, self.valid.expand(count, -1), self.lengths.expand(count))

    @staticmethod
    def joined(states: Sequence["State"]) -> "State":
        """The rows of all `states`, one after another; shorter ones are padded behind their last slot."""
        if len(states) == 1:
            return states[0]
        short = [max(state.valid.shape[1] for state in states) - state.valid.shape[1] for state in states]

        def padded(parts: Iterable[Tensor]) -> Tensor:
            return torch.cat([F.pad(part, (0, 0, 0, more)) for part, more in zip(parts, short, strict=True)])

        layers = zip(*(state.kv for state in states), strict=True)
        return State(
            tuple((padded(keys for keys, _ in layer), padded(values for _, values in layer)) for layer in layers),
            torch.cat([F.pad(state.valid, (0, more)) for state, more in zip(states, short, strict=True)]),
            torch.cat([state.lengths for state in states]),
        )


class Network:
    """Frozen base weights and the passes over them. Thread-safe: it holds nothing that changes.

    `modules` gives name and shape [out, in] of the layers that an adapter may change: all linear ones of the decoder.
    With `recompute` a backward pass computes each layer anew instead of keeping what it computed: less memory, a third
    more time (Chen et al. 2016, arXiv 1604.06174).
    """

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], recompute: bool = False) -> None:
        self.shape = shape
        self._recompute = recompute
        self._weights = weights
        self._embedding = weights["model.embed_tokens.weight"]
        self._head = weights.get("lm_head.weight", self._embedding)
        self.vocabulary = self._embedding.shape[0]
        self.modules = {
            name.removesuffix(".weight"): matrix.shape
            for name, matrix in weights.items()
            if name.endswith("_proj.weight")
        }

    def weight(self, module: str) -> Tensor:
        """The base matrix [out, in] of a module such as `model.layers.0.mlp.up_proj`."""
        return self._weights[f"{module}.weight"]

    def empty(self) -> State:
        """The state of one row that has no tokens yet."""
        nothing = torch.zeros(1, self.shape.kv_heads, 0, self.shape.head_dim)
        return State(
            ((nothing, nothing),) * self.shape.layers,
            torch.zeros(1, 0, dtype=torch.bool),
            torch.zeros(1, dtype=torch.long),
        )

    def extend(self, state: State, rows: Sequence[Tokens], adapter: Adapter | None) -> tuple[Tensor, State]:
        """Append `rows[b]` (not empty) to row b of `state`.

        Returns the hidden vectors [B, longest, width], garbage beyond a row's length, and the new state.
        """
        width = max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        added = torch.tensor([len(row) for row in rows])
        offsets = torch.arange(width)
        valid = torch.cat([state.valid, offsets < added[:, None]], dim=1)
        slots = torch.arange(valid.shape[1])
        # A query sees the real slots up to its own: causal by slot, rotated by position, so padding costs no position.
        seen = valid[:, None, :] & (slots <= (state.valid.shape[1] + offsets)[:, None])
        turn = _rotation(self.shape, state.lengths[:, None] + offsets)

        x = F.embedding(tokens, self._embedding)
        kv = []
        for layer in range(self.shape.layers):
            given = (f"model.layers.{layer}", x, state.kv[layer], seen, turn, adapter)
            if self._recompute and torch.is_grad_enabled():
                x, pair = checkpoint(self._layer, *given, use_reentrant=False)
            else:
                x, pair = self._layer(*given)
            kv.append(pair)
        return self._norm("model.norm", x), State(tuple(kv), valid, state.lengths + added)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., vocabulary]."""
        return _product(hidden, self._head)

    def _layer(
        self,
        name: str,
        x: Tensor,
        past: tuple[Tensor, Tensor],
        seen: Tensor,
        turn: tuple[Tensor, Tensor],
        adapter: Adapter | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        shape = self.shape
        batch, length, _ = x.shape
        h = self._norm(f"{name}.input_layernorm", x)
        q, k, v = (
            self._linear(f"{name}.self_attn.{part}_proj", h, adapter)
            .view(batch, length, -1, shape.head_dim)
            .transpose(1, 2)
            for part in "qkv"
        )
        q, k = _rotate(q, turn), _rotate(k, turn)
        keys, values = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        # The query heads that share a key head are laid end to end, so that keys and values are never repeated.
        share = shape.heads // shape.kv_heads
        q = q.reshape(batch, shape.kv_heads, share * length, shape.head_dim)
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen.repeat(1, share, 1)[:, None])
        mixed = mixed.view(batch, shape.heads, length, shape.head_dim).transpose(1, 2).reshape(batch, length, -1)
        x = x + self._linear(f"{name}.self_attn.o_proj", mixed, adapter)

        h = self._norm(f"{name}.post_attention_layernorm", x)
        gate = F.silu(self._linear(f"{name}.mlp.gate_proj", h, adapter))
        x = x + self._linear(f"{name}.mlp.down_proj", gate * self._linear(f"{name}.mlp.up_proj", h, adapter), adapter)
        return x, (keys, values)

    def _linear(self, module: str, x: Tensor, adapter: Adapter | None) -> Tensor:
        y = _product(x, self.weight(module))
        if adapter is None or module not in adapter.factors:
            return y
        down, up = adapter.factors[module]
        return y + F.linear(adapter.scale * F.linear(x, down), up)

    def _norm(self, module: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight(module), self.shape.eps)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """[..., in] times the transpose of a matrix [out, in].

    Where it only serves, by oneDNN if torch has it: what F.linear takes for float32 has half its speed for few rows on
    some machines, and a third for the wide head. The operator is the one that torch takes in what it compiles.
    """
    if _onednn is None or not torch.is_inference_mode_enabled() or x.shape[:-1].numel() < FEW_ROWS:
        return F.linear(x, matrix)
    return _onednn(x, matrix, None, "none", [], "")


def load(folder: Path, recompute: bool = False) -> Network:
    """The network of a Hugging Face Llama folder, its weights mapped from disk: processes share the pages."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama" or config["attention_bias"] or config["mlp_bias"]:
        raise ValueError(f"{folder} is not a Llama model without biases, the only kind served here.")
    shape = Shape(
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        eps=config["rms_norm_eps"],
        rope_theta=config["rope_parameters"]["rope_theta"],
    )
    # Float32 already is taken as it is, mapped; any other kind is copied.
    weights = {name: matrix.float() for name, matrix in load_file(folder / "model.safetensors").items()}
    return Network(shape, weights, recompute)


def continuation_logprobs(
    network: Network,
    adapter: Adapter | None,
    prefix: State,
    prompts: Sequence[Tokens],
    continuations: Sequence[Sequence[Tokens]],
    temperature: float = 1.0,
) -> list[list[Tensor]]:
    """Log-probability of every token of every continuation, `continuations[i]` following prefix + `prompts[i]`.

    `prefix` is a state of one row that all prompts share. Result [i][j] is a vector as long as continuation j of
    prompt i. The prompt is passed over once, whatever the number of its continuations; continuations of a single
    token need no further pass, longer ones as many passes as keep each within SLOTS. Differentiable in the adapter,
    and through the prefix when it was made with gradients.
    """
    last, behind = continuation_states(network, adapter, prefix, prompts, continuations)
    first = torch.log_softmax(network.logits(last) / temperature, dim=-1)
    scores = [[first[i, continuation[:1]] for continuation in group] for i, group in enumerate(continuations)]
    for (i, j), hidden in behind.items():
        rest = list(continuations[i][j][1:])
        after = torch.log_softmax(network.logits(hidden) / temperature, dim=-1)
        scores[i][j] = torch.cat([scores[i][j], after[torch.arange(len(rest)), rest]])
    return scores


def continuation_states(
    network: Network,
    adapter: Adapter | None,
    prefix: State,
    prompts: Sequence[Tokens],
    continuations: Sequence[Sequence[Tokens]],
) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """Hidden vectors before every token of every continuation: what each is predicted from.

    Returns those behind the prompts [prompts, width], before each first token, and by (i, j) those before the others of
    continuation j of prompt i [its length - 1, width], where it is longer than one token.
    """
    hidden, state = network.extend(prefix.spread(len(prompts)), prompts, adapter)
    last = hidden[torch.arange(len(prompts)), torch.tensor([len(prompt) - 1 for prompt in prompts])]
    longer = [(i, j) for i, group in enumerate(continuations) for j, tokens in enumerate(group) if len(tokens) > 1]
    longest = max((len(continuations[i][j]) for i, j in longer), default=0)
    # Each row takes a copy of its prompt's keys and values.
    rows = max(1, SLOTS // (state.valid.shape[1] + longest))
    behind = {}
    for start in range(0, len(longer), rows):
        part = longer[start : start + rows]
        read = [list(continuations[i][j][:-1]) for i, j in part]
        hidden, _ = network.extend(state.rows([i for i, _ in part]), read, adapter)
        behind |= {at: hidden[row, : len(tokens)] for row, (at, tokens) in enumerate(zip(part, read, strict=True))}
    return last, behind


def _rotation(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, L, head_dim] of the rotary embedding (Su et al. 2021, arXiv 2104.09864)."""
    frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cosines, sines = turn
    left, right = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-right, left], dim=-1) * sines
