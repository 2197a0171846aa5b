"""mlp_branch: the MLP of a block with its norm, scale and residual. Hidden values need not go through memory."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from ..._calls import Call
from .._autograd import run
from .._flops import linear
from .._library import define
from . import native, triton_launch
from .parameters import MlpBranchParameters
from .reference import mlp_branch_reference

# x: (B, *spatial, C), any strides -> y: the same, with x's memory order
# For backward: the body's result u (tokens, C) where the norm follows it, fc1's result (tokens, M) with `keep_hidden`;
# otherwise nothing, x is all


def forward_flops(x, parameters, *options, **results) -> int:
    p: Any = MlpBranchParameters(parameters)  # shapes
    return sum(linear(prod(x[:-1]), *weight[:2]) for weight in (p.fc1_weight, p.fc2_weight))


@define(
    "mlp_branch_fwd(Tensor x, Tensor?[] parameters, float norm_eps, bool post, bool keep_hidden, bool save)"
    " -> (Tensor, Tensor[])",
    backends=("", "_triton", "_cuda"),
    flops=forward_flops,
)
def _(x, parameters, norm_eps, post, keep_hidden, save):
    tokens, (M, C) = x.numel() // x.shape[-1], parameters[0].shape[:2]
    widths = [width for width, kept in ((C, post), (M, keep_hidden)) if kept and save]
    return torch.empty_like(x), [x.new_empty(tokens, width, dtype=parameters[0].dtype) for width in widths]


# In inference by kept copies of fc1's and fc2's weights (`_packed.py`) -> y, and whether none was out of date


@define(
    "mlp_branch_packed(Tensor x, Tensor?[] parameters, Tensor?[] packed, float norm_eps, bool post) -> (Tensor, bool)",
    flops=forward_flops,
)
def _(x, parameters, packed, norm_eps, post):
    return torch.empty_like(x), True


# `needed`: bit i for input i of (x, *parameters); an empty tensor for the others


def _backward_flops(grad_y, x, parameters, saved, norm_eps, post, keep_hidden, needed, **results) -> int:
    p: Any = MlpBranchParameters(parameters)  # shapes
    tokens = prod(x[:-1])
    of = {name: bool(needed >> i & 1) for i, name in enumerate(("x", *p.names))}
    to_z = of["x"] or not post and (of["norm_weight"] or of["norm_bias"])
    to_hidden = to_z or of["fc1_weight"] or of["fc1_bias"]
    return (to_z + of["fc1_weight"]) * linear(tokens, *p.fc1_weight[:2]) + (to_hidden + of["fc2_weight"]) * linear(
        tokens, *p.fc2_weight[:2]
    )


@define(
    "mlp_branch_bwd(Tensor grad_y, Tensor x, Tensor?[] parameters, Tensor[] saved, float norm_eps, bool post,"
    " bool keep_hidden, int needed) -> Tensor[]",
    backends=("", "_triton", "_cuda"),
    flops=_backward_flops,
)
def _(grad_y, x, parameters, saved, norm_eps, post, keep_hidden, needed):
    return [torch.empty_like(t) if needed >> i & 1 else x.new_empty(0) for i, t in enumerate((x, *parameters))]


def mlp_branch(
    call: Call, x: Tensor, parameters: MlpBranchParameters, norm_eps: float, post: bool, keep_hidden: bool,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The checked op: see `focalnet_kernels.mlp_branch`."""
    return run(call, x, parameters, (norm_eps, post, keep_hidden), backend)


dispatch.register(
    "mlp_branch",
    native.implementation("cpu"),
    native.implementation("cuda"),
    triton_launch.IMPLEMENTATION,
    dispatch.Implementation("reference", lambda call: None, mlp_branch_reference),
)
