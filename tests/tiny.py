"""A model folder small enough to learn in a second: a Llama of two layers with random weights and no tokenizer."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sia_events.local_model import adapter, network
from sia_events.local_model.weights import MANIFEST

WIDTH, HEADS, KV_HEADS, HEAD, INNER, VOCABULARY, LAYERS = 48, 6, 2, 8, 96, 40, 2


def make_model(folder: Path) -> Path:
    draw = torch.Generator().manual_seed(7)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw) / columns**0.5

    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, WIDTH, generator=draw) * 0.3,
        "model.norm.weight": torch.ones(WIDTH),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.input_layernorm.weight": torch.rand(WIDTH, generator=draw) + 0.5,
            f"{name}.post_attention_layernorm.weight": torch.rand(WIDTH, generator=draw) + 0.5,
            f"{name}.self_attn.q_proj.weight": matrix(HEADS * HEAD, WIDTH),
            f"{name}.self_attn.k_proj.weight": matrix(KV_HEADS * HEAD, WIDTH),
            f"{name}.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD, WIDTH),
            f"{name}.self_attn.o_proj.weight": matrix(WIDTH, HEADS * HEAD),
            f"{name}.mlp.gate_proj.weight": matrix(INNER, WIDTH),
            f"{name}.mlp.up_proj.weight": matrix(INNER, WIDTH),
            f"{name}.mlp.down_proj.weight": matrix(WIDTH, INNER),
        }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "max_position_embeddings": 512,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = (folder / "model.safetensors").read_bytes()
    manifest = {"model": "tiny", "sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def stirred(net: network.Network, seed: int, rank: int = 4) -> adapter.Adapter:
    """An adapter that does change the network."""
    made = adapter.fresh(net.modules, rank, 8, seed)
    draw = torch.Generator().manual_seed(seed)
    factors = {name: (down, torch.randn(up.shape, generator=draw) * 0.2) for name, (down, up) in made.factors.items()}
    return adapter.Adapter(factors, rank, 8)
