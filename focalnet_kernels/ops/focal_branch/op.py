"""focal_branch: the layer with the norm, scale and residual that a block has around it."""

from __future__ import annotations

import dataclasses
from math import prod
from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from ..._calls import Call
from .._autograd import needs_grad, run
from .._flops import level_gradients, levels, linear
from .._library import define
from ..focal_modulation import op as layer
from ..residual import residual_reference
from . import native, triton_launch
from .parameters import FocalBranchParameters
from .reference import focal_branch_reference

# x: (B, *spatial, C), any strides -> y: the same, with x's memory order
# For backward: what focal_modulation's forward saves; from the GPU's then the body's result where the norm follows it
_FORWARD = (
    "(Tensor x, Tensor?[] parameters, bool normalize, float ln_eps, float norm_eps, bool post, bool save)"
    " -> (Tensor, Tensor[])"
)


def forward_flops(x, parameters, *options, **results) -> int:
    p: Any = FocalBranchParameters(parameters)  # shapes
    tokens = prod(x[:-1])
    products = sum(linear(tokens, *shape[:2]) for shape in (p.layer.f_weight, p.layer.h_weight, p.layer.proj_weight))
    return products + levels((x[0], x[-1], *x[1:-1]), p.layer.focal_weights)


@define("focal_branch_fwd" + _FORWARD, flops=forward_flops)
def _(x, parameters, normalize, ln_eps, norm_eps, post, save):
    return torch.empty_like(x), _saved(layer.saved_by_cpu, x, parameters, save)


@define("focal_branch_fwd_triton" + _FORWARD, flops=forward_flops)
def _(x, parameters, normalize, ln_eps, norm_eps, post, save):
    return torch.empty_like(x), _saved(layer.saved_by_triton, x, parameters, save, post)


@define("focal_branch_fwd_cuda" + _FORWARD, flops=forward_flops)
def _(x, parameters, normalize, ln_eps, norm_eps, post, save):
    return torch.empty_like(x), _saved(layer.saved_by_cuda, x, parameters, save, post)


# see mlp_branch's


@define(
    "focal_branch_packed(Tensor x, Tensor?[] parameters, Tensor?[] packed, bool normalize, float ln_eps,"
    " float norm_eps, bool post) -> (Tensor, bool)",
    flops=forward_flops,
)
def _(x, parameters, packed, normalize, ln_eps, norm_eps, post):
    return torch.empty_like(x), True


def _saved(of_layer, x, parameters, save, post=False) -> list[Tensor]:
    if not save:
        return []
    u = torch.empty_like(x, dtype=parameters[0].dtype)
    return of_layer(u, FocalBranchParameters(parameters).layer) + ([u] if post else [])


def _backward_flops(grad_y, x, parameters, saved, normalize, ln_eps, norm_eps, post, needed, **results) -> int:
    p: Any = FocalBranchParameters(parameters)  # shapes
    inner, L, tokens = p.layer, len(p.layer.focal_weights), prod(x[:-1])
    names = ("x", *p.names(L))
    of = {name: bool(needed >> i & 1) for i, name in enumerate(names)}
    of_levels = needed >> names.index("f_bias") + 1 & (1 << L) - 1
    of["x"] |= not post and (of["norm_weight"] or of["norm_bias"])
    to_projected = of["x"] or of["f_weight"] or of["f_bias"]
    to_ctx_all = to_projected or of_levels != 0
    to_output = to_ctx_all or any(of[name] for name in ("h_weight", "h_bias", "ln_weight", "ln_bias"))
    return (
        (of["x"] + of["f_weight"]) * linear(tokens, *inner.f_weight[:2])
        + (to_ctx_all + of["h_weight"]) * linear(tokens, *inner.h_weight[:2])
        + (to_output + of["proj_weight"]) * linear(tokens, *inner.proj_weight[:2])
        + level_gradients((x[0], x[-1], *x[1:-1]), inner.focal_weights, to_projected, of_levels)
    )


@define(
    "focal_branch_bwd(Tensor grad_y, Tensor x, Tensor?[] parameters, Tensor[] saved, bool normalize, float ln_eps,"
    " float norm_eps, bool post, int needed) -> Tensor[]",
    backends=("", "_triton", "_cuda"),
    flops=_backward_flops,
)
def _(grad_y, x, parameters, saved, normalize, ln_eps, norm_eps, post, needed):
    return [torch.empty_like(t) if needed >> i & 1 else x.new_empty(0) for i, t in enumerate((x, *parameters))]


def focal_branch(
    call: Call,
    x: Tensor,
    parameters: FocalBranchParameters,
    normalize: bool,
    ln_eps: float,
    norm_eps: float,
    post: bool,
    backend: str | None = None,
) -> Tensor:
    """The checked op: see `focalnet_kernels.focal_branch`."""
    if dispatch.select(call, needs_grad((x, *parameters)), backend).backend != "reference":
        return run(call, x, parameters, (normalize, ln_eps, norm_eps, post), backend)
    of_layer = dataclasses.replace(call, op="focal_modulation", residual_dtype=None, chosen={})

    def body(z: Tensor) -> Tensor:
        z = z.to(parameters.layer.f_weight.dtype)
        return layer.focal_modulation(of_layer, z, parameters.layer, normalize, ln_eps, backend)

    return residual_reference(x, body, parameters.residual, norm_eps, post)


dispatch.register(
    "focal_branch",
    native.implementation("cpu"),
    native.implementation("cuda"),
    triton_launch.IMPLEMENTATION,
    dispatch.Implementation("reference", lambda call: None, focal_branch_reference),
)
