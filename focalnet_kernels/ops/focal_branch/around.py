"""focal_branch by the kernels of the layer and, around them, those over token rows: norm, scale and sum."""

from __future__ import annotations

import torch
from torch import Tensor

from ..token_rows import RowKernels, as_rows, like, separate
from .parameters import FocalBranchParameters


def forward(
    kernels: RowKernels, layer_fwd, x, parameters, normalize, ln_eps, norm_eps, post, save
) -> tuple[Tensor, list[Tensor]]:
    """`layer_fwd`: a focal_modulation_fwd. Saves what that does; and its result where the norm follows it."""
    p = FocalBranchParameters(parameters)
    u, saved = layer_fwd(layer_input(kernels, x, p, norm_eps, post), p.layer, normalize, ln_eps, save)
    y = torch.empty_like(as_rows(x))
    kernels.residual_fwd(as_rows(x), as_rows(u), p.residual, norm_eps, post, y)
    return like(x, y), [*saved, u] if save and post else list(saved)


def backward(
    kernels: RowKernels, layer_fwd, layer_bwd, grad_y, x, parameters, saved, normalize, ln_eps, norm_eps, post, needed
) -> list[Tensor]:
    p = FocalBranchParameters(parameters)
    names = ("x", *p.names(len(p.layer.focal_weights)))
    wants = {name: bool(needed >> i & 1) for i, name in enumerate(names)}
    r, z = p.residual, layer_input(kernels, x, p, norm_eps, post)
    dy, rows = as_rows(grad_y), as_rows(x)
    pre, last = not post and r.norm_weight is not None, post and r.norm_weight is not None
    found: dict[str, Tensor] = {}

    du = dy
    if last or r.gamma is not None or r.drop_path is not None or dy.dtype != z.dtype:
        u = rows
        if last:
            u = as_rows(saved[-1])
        elif wants["gamma"]:
            u = as_rows(layer_fwd(z, p.layer, normalize, ln_eps, False)[0])
        du = dy.new_empty(dy.shape, dtype=z.dtype)
        sums = kernels.norm_bwd(u, dy, du, r, norm_eps, norm=last, scale=True)
        found |= {"norm_weight": sums[0], "norm_bias": sums[1], "gamma": sums[2]}
    of_layer = needed & (1 << len(p.layer) + 1) - 1
    if wants["norm_weight"] or wants["norm_bias"]:
        of_layer |= 1
    dz, *of_parameters = layer_bwd(like(z, du), z, p.layer, tuple(saved[:3]), normalize, ln_eps, of_layer)
    if of_layer & 1:
        dx = torch.empty_like(rows)
        sums = kernels.norm_bwd(rows, as_rows(dz), dx, r, norm_eps, norm=pre, scale=False, add=dy)
        if pre:
            found |= {"norm_weight": sums[0], "norm_bias": sums[1]}
        found["x"] = like(x, dx)
    found |= zip(names[1:], of_parameters, strict=False)
    return [
        separate(found[name], t.dtype) if wants[name] else x.new_empty(0)
        for name, t in zip(names, (x, *parameters), strict=True)
    ]


def layer_input(kernels: RowKernels, x: Tensor, p: FocalBranchParameters, norm_eps: float, post: bool) -> Tensor:
    """The layer's. As it is, it keeps x's strides, which its result then has."""
    r, dtype = p.residual, p.layer.f_weight.dtype
    if post or r.norm_weight is None:
        return x.to(dtype)
    return kernels.norm_fwd(as_rows(x), r.norm_weight, r.norm_bias, norm_eps, dtype).view(x.shape)
