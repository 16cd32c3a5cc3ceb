"""TriMul in blocks of pairs that fit the cache, intermediates written into a workspace kept between calls."""

import torch
from torch.nn.functional import layer_norm

BLOCK = 1024
"""Pairs per block: the block's five intermediates are then a few hundred kB each, about a core's cache."""

workspaces = {}


def workspace(n, hidden):
    if (n, hidden) not in workspaces:
        planes = [torch.empty(hidden, n * n) for _ in range(3)]
        blocks = [torch.empty(hidden, BLOCK) for _ in range(2)] + [torch.empty(BLOCK, hidden)]
        workspaces[n, hidden] = planes, blocks
    return workspaces[n, hidden]


def custom_kernel(data):
    x, mask, weights, config = data
    batch, n, _, channels = x.shape
    hidden = config["hidden_dim"]
    (left, right, product), (gate, value, pairs) = workspace(n, hidden)
    sides = [
        (left, weights["left_gate.weight"], weights["left_proj.weight"]),
        (right, weights["right_gate.weight"], weights["right_proj.weight"]),
    ]
    open_gate = weights["out_gate.weight"].t()
    to_out = weights["to_out.weight"].t()
    normed = torch.empty(n * n, channels)
    output = torch.empty_like(x)
    for b in range(batch):
        rows = x[b].view(n * n, channels)
        keep = mask[b].reshape(1, n * n)
        for start in range(0, n * n, BLOCK):
            stop = min(start + BLOCK, n * n)
            size = stop - start
            block = layer_norm(rows[start:stop], (channels,), weights["norm.weight"], weights["norm.bias"])
            normed[start:stop] = block
            for plane, gate_weight, value_weight in sides:
                torch.mm(gate_weight, block.t(), out=gate.view(-1)[: hidden * size].view(hidden, size))
                torch.mm(value_weight, block.t(), out=value.view(-1)[: hidden * size].view(hidden, size))
                opened = gate.view(-1)[: hidden * size].view(hidden, size).sigmoid_()
                opened.mul_(value.view(-1)[: hidden * size].view(hidden, size))
                torch.mul(opened, keep[:, start:stop], out=plane[:, start:stop])
        torch.bmm(left.view(hidden, n, n), right.view(hidden, n, n).transpose(1, 2), out=product.view(hidden, n, n))
        for start in range(0, n * n, BLOCK):
            stop = min(start + BLOCK, n * n)
            opened = torch.mm(normed[start:stop], open_gate, out=pairs[: stop - start]).sigmoid_()
            mixed = product[:, start:stop].t().contiguous()
            mixed = layer_norm(mixed, (hidden,), weights["to_out_norm.weight"], weights["to_out_norm.bias"])
            torch.mm(mixed.mul_(opened), to_out, out=output[b].view(n * n, channels)[start:stop])
    return output
