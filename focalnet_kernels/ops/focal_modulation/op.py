"""focal_modulation: the whole layer as one op, so that an image can stay in cache from f to proj."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from ..._calls import Call
from .._autograd import run
from .._flops import level_gradients, levels, linear
from .._library import define
from .._limits import SLOW_BACKWARD
from ..focal_context import triton_launch as context_launch
from . import native, triton_launch
from .parameters import LayerParameters
from .reference import focal_modulation_reference

# x: (B, *spatial, C), any strides -> y: (B, *spatial, C) with x's memory order
# For backward: projected = f(x) and modulator over the N = B * prod(spatial) tokens, mean (B, C) float32 of the last
# level; an empty list where `save` is false. The CPU kernels keep (N, 2C+L+1) and (N, C), the others their transposes.
_FORWARD = "(Tensor x, Tensor?[] parameters, bool normalize, float ln_eps, bool save) -> (Tensor, Tensor[])"


def _forward_flops(x, parameters, *options, **results) -> int:
    p: Any = LayerParameters(parameters)  # shapes
    tokens = prod(x[:-1])
    products = sum(linear(tokens, *shape[:2]) for shape in (p.f_weight, p.h_weight, p.proj_weight))
    return products + levels((x[0], x[-1], *x[1:-1]), p.focal_weights)


@define("focal_modulation_fwd" + _FORWARD, flops=_forward_flops)
def _(x, parameters, normalize, ln_eps, save):
    return torch.empty_like(x), saved_by_cpu(x, LayerParameters(parameters)) if save else []


@define("focal_modulation_fwd_triton" + _FORWARD, flops=_forward_flops)
def _(x, parameters, normalize, ln_eps, save):
    return torch.empty_like(x), saved_by_triton(x, LayerParameters(parameters)) if save else []


@define("focal_modulation_fwd_cuda" + _FORWARD, flops=_forward_flops)
def _(x, parameters, normalize, ln_eps, save):
    return torch.empty_like(x), saved_by_cuda(x, LayerParameters(parameters)) if save else []


# In inference by kept copies of f's, h's and proj's weights (`_packed.py`) -> y, and whether none was out of date


@define(
    "focal_modulation_packed(Tensor x, Tensor?[] parameters, Tensor?[] packed, bool normalize, float ln_eps)"
    " -> (Tensor, bool)",
    flops=_forward_flops,
)
def _(x, parameters, packed, normalize, ln_eps):
    return torch.empty_like(x), True


def saved_by_cpu(x: Tensor, parameters: LayerParameters) -> list[Tensor]:
    return _saved(x, parameters, lambda x, rows, tokens: x.new_empty(tokens, rows))


def saved_by_triton(x: Tensor, parameters: LayerParameters) -> list[Tensor]:
    return _saved(x, parameters, triton_launch.new_matrix)


def saved_by_cuda(x: Tensor, parameters: LayerParameters) -> list[Tensor]:
    by_tokens = native.by_tokens(x, parameters.focal_weights, parameters.ln_weight)
    return _saved(x, parameters, native.new_tokens if by_tokens else torch.Tensor.new_empty)


def _saved(x, parameters, new_matrix) -> list[Tensor]:
    """`new_matrix(x, rows, tokens)`: an empty matrix as the backend lays it out."""
    B, C = x.shape[0], x.shape[-1]
    outputs, tokens = parameters.f_weight.shape[0], x.numel() // C
    mean = x.new_empty(B, C, dtype=torch.float32)
    return [new_matrix(x, outputs, tokens), new_matrix(x, C, tokens), mean]


# `needed`: bit i for input i of (x, *parameters); an empty tensor for the others


def _backward_flops(grad_y, x, parameters, projected, modulator, mean, normalize, eps, needed, **results) -> int:
    p: Any = LayerParameters(parameters)  # shapes
    tokens = prod(x[:-1])
    L = len(p.focal_weights)
    names = ("x", *p.names(L))
    of = {name: bool(needed >> i & 1) for i, name in enumerate(names)}
    of_levels = needed >> names.index("f_bias") + 1 & (1 << L) - 1
    to_projected = of["x"] or of["f_weight"] or of["f_bias"]
    to_ctx_all = to_projected or of_levels != 0
    to_output = to_ctx_all or any(of[name] for name in ("h_weight", "h_bias", "ln_weight", "ln_bias"))
    return (
        (of["x"] + of["f_weight"]) * linear(tokens, *p.f_weight[:2])
        + (to_ctx_all + of["h_weight"]) * linear(tokens, *p.h_weight[:2])
        + (to_output + of["proj_weight"]) * linear(tokens, *p.proj_weight[:2])
        + level_gradients((x[0], x[-1], *x[1:-1]), p.focal_weights, to_projected, of_levels)
    )


@define(
    "focal_modulation_bwd(Tensor grad_y, Tensor x, Tensor?[] parameters, Tensor projected, Tensor modulator,"
    " Tensor mean, bool normalize, float ln_eps, int needed) -> Tensor[]",
    backends=("", "_triton", "_cuda"),
    flops=_backward_flops,
)
def _(grad_y, x, parameters, projected, modulator, mean, normalize, ln_eps, needed):
    inputs = (x, *parameters)
    return [torch.empty_like(t) if needed >> i & 1 else x.new_empty(0) for i, t in enumerate(inputs)]


def focal_modulation(
    call: Call, x: Tensor, parameters: LayerParameters, normalize: bool, ln_eps: float, backend: str | None = None
) -> Tensor:
    """The checked op: see `focalnet_kernels.focal_modulation`."""
    return run(call, x, parameters, (normalize, ln_eps), backend)


dispatch.register(
    "focal_modulation",
    native.implementation("cpu"),
    native.implementation("cuda"),
    dispatch.Implementation(
        "triton",
        context_launch.why_not,
        triton_launch.focal_modulation_fwd,
        triton_launch.focal_modulation_bwd,
        lambda call, training: SLOW_BACKWARD if training else None,
    ),
    dispatch.Implementation("reference", lambda call: None, focal_modulation_reference),
)
