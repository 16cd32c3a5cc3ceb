"""A first agent for `trimul`: writes the formula down as a kernel, one operation at a time."""

import argparse
from pathlib import Path

KERNEL = """\
import torch
from torch.nn.functional import layer_norm, linear


def custom_kernel(data):
    x, mask, weights, config = data
    hidden = config["hidden_dim"]
    normed = layer_norm(x, (config["dim"],), weights["norm.weight"], weights["norm.bias"])
    left = linear(normed, weights["left_proj.weight"]) * mask.unsqueeze(-1)
    right = linear(normed, weights["right_proj.weight"]) * mask.unsqueeze(-1)
    left = left * linear(normed, weights["left_gate.weight"]).sigmoid()
    right = right * linear(normed, weights["right_gate.weight"]).sigmoid()
    gate = linear(normed, weights["out_gate.weight"]).sigmoid()
    product = torch.einsum("bikd,bjkd->bijd", left, right)
    product = layer_norm(product, (hidden,), weights["to_out_norm.weight"], weights["to_out_norm.bias"])
    return linear(product * gate, weights["to_out.weight"])
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    arguments = parser.parse_args()
    (arguments.working_dir / "kernel.py").write_text(KERNEL)


if __name__ == "__main__":
    main()
