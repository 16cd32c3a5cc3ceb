"""The problems as data: shapes, input generator, fp64 oracle, and the sources that ship with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HIDDEN = 128
"""Channels inside the triangle update; the problem fixes it for every shape."""

EPSILON = 1e-5
"""Added to the variance by both layer norms."""


@dataclass(frozen=True)
class Case:
    """One shape: x is [batch, n, n, channels], mask is [batch, n, n]."""

    n: int
    batch: int
    channels: int
    masked: bool = False
    distribution: Literal["normal", "cauchy"] = "normal"


@dataclass(frozen=True)
class Inputs:
    """What a kernel is called with: `custom_kernel((*tensors, weights, config))`, every array fp32."""

    tensors: tuple[Array, ...]
    weights: Mapping[str, Array]
    config: Mapping[str, int]
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """A kernel to write. An output is right when |output - oracle| <= atol + rtol * |oracle| everywhere.

    `checked` cases are only judged, `timed` cases are judged and timed. `baseline` names the shipped source that
    candidates are compared with. `oracle` returns fp64.
    """

    name: str
    checked: tuple[Case, ...]
    timed: tuple[Case, ...]
    generate: Callable[[Case, np.random.Generator], Inputs]
    oracle: Callable[[Inputs], Array]
    baseline: str
    atol: float = 2e-2
    rtol: float = 2e-2


def shipped(name: str) -> str:
    """The source of `candidates/<name>.py`. Raises FileNotFoundError."""
    return files("sia_events.kernel_bench").joinpath("candidates", f"{name}.py").read_text()


def trimul_inputs(case: Case, rng: np.random.Generator) -> Inputs:
    """Fresh activations, mask and ten weight arrays for `case`; linear weights are [out, in] as torch keeps them."""
    shape = (case.batch, case.n, case.n, case.channels)
    if case.distribution == "cauchy":
        x = (2.0 * rng.standard_cauchy(shape)).astype(np.float32)
    else:
        x = rng.standard_normal(shape, dtype=np.float32)
    mask = rng.integers(0, 2, shape[:3]).astype(np.float32) if case.masked else np.ones(shape[:3], np.float32)

    def normal(*size: int, scale: float = 1.0) -> Array:
        return rng.standard_normal(size, dtype=np.float32) * np.float32(scale)

    projections = ("left_proj", "right_proj", "left_gate", "right_gate", "out_gate")
    weights = {
        "norm.weight": normal(case.channels),
        "norm.bias": normal(case.channels),
        **{f"{name}.weight": normal(HIDDEN, case.channels, scale=HIDDEN**-0.5) for name in projections},
        "to_out_norm.weight": normal(HIDDEN),
        "to_out_norm.bias": normal(HIDDEN),
        "to_out.weight": normal(case.channels, HIDDEN, scale=case.channels**-0.5),
    }
    return Inputs((x, mask), weights, {"dim": case.channels, "hidden_dim": HIDDEN}, shape)


def trimul_oracle(inputs: Inputs) -> Array:
    """The outgoing triangle multiplicative update (Jumper et al. 2021, supplementary algorithm 11), forward, in fp64.

    With x' = LayerNorm(x): L = mask * W_l x' * s(W_lg x'), R likewise, O[b,i,j,d] = sum_k L[b,i,k,d] R[b,j,k,d],
    out = W_o (LayerNorm(O) * s(W_og x')), where s is the logistic function and W_o maps back to x's channels.
    Interface and shapes follow GPU MODE's problem of that name.
    """
    x, mask = (tensor.astype(np.float64) for tensor in inputs.tensors)
    weight = {name: value.astype(np.float64) for name, value in inputs.weights.items()}

    def layer_norm(value: Array, name: str) -> Array:
        centred = value - value.mean(-1, keepdims=True)
        scale = 1.0 / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
        return centred * scale * weight[f"{name}.weight"] + weight[f"{name}.bias"]

    def linear(value: Array, name: str) -> Array:
        return value @ weight[f"{name}.weight"].T

    def gate(value: Array, name: str) -> Array:
        return 0.5 * (1.0 + np.tanh(0.5 * linear(value, name)))

    normed = layer_norm(x, "norm")
    left = mask[..., None] * linear(normed, "left_proj") * gate(normed, "left_gate")
    right = mask[..., None] * linear(normed, "right_proj") * gate(normed, "right_gate")
    product = np.matmul(left.transpose(0, 3, 1, 2), right.transpose(0, 3, 2, 1)).transpose(0, 2, 3, 1)
    return linear(layer_norm(product, "to_out_norm") * gate(normed, "out_gate"), "to_out")


TRIMUL = Problem(
    name="trimul",
    checked=(
        Case(32, 1, 128),
        Case(32, 1, 128, masked=True),
        Case(32, 1, 128, distribution="cauchy"),
        Case(64, 2, 256, distribution="cauchy"),
    ),
    timed=(Case(64, 2, 256, masked=True), Case(128, 1, 128)),
    generate=trimul_inputs,
    oracle=trimul_oracle,
    baseline="reference",
)

# Measured in a few CPU seconds, most of them torch's start: for runs that measure many candidates.
TRIMUL_SMALL = replace(
    TRIMUL,
    name="trimul-small",
    checked=(Case(16, 2, 64), Case(32, 1, 128, masked=True), Case(32, 1, 128, distribution="cauchy")),
    timed=(Case(64, 1, 128, masked=True),),
)

PROBLEMS: Mapping[str, Problem] = {problem.name: problem for problem in (TRIMUL, TRIMUL_SMALL)}
