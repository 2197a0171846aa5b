"""The arguments of the user's functions, checked: a `Call` for dispatch, and the tensors that the op takes.

What is a matter of kinds alone (see `_calls.py`) is checked once and looked up from then on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import (
    as_levels,
    check_levels,
    check_map,
    check_matrix,
    check_same_kind,
    check_shape,
    check_tensor,
    follow_autocast,
    per_axis,
)
from ._calls import Call, Kind, kinds_of, looked_up
from .ops.focal_branch.parameters import FocalBranchParameters
from .ops.focal_modulation.parameters import LayerParameters, as_matrix
from .ops.mlp_branch.parameters import MlpBranchParameters


def prepare_focal_context(ctx, gates, weights, *, biases=None) -> tuple[Call, Sequence[Any]]:
    return prepare_levels(ctx, gates, as_levels("weights", weights, biases))


def prepare_levels(ctx, gates, levels) -> tuple[Call, Sequence[Any]]:
    """`focal_context` of levels as the ops take them."""
    tensors = follow_autocast((ctx, gates, *levels))
    kinds = kinds_of(tensors)
    # (B, C, *spatial) knows where its channels lie; whatever is no tensor is the check's to refuse
    adjacent = isinstance(tensors[0], Tensor) and tensors[0].ndim > 1 and tensors[0].stride(1) == 1
    return _check_focal_context(kinds, adjacent), tensors


@looked_up
def _check_focal_context(kinds: tuple[Kind, ...], adjacent: bool) -> Call:
    ctx, gates, *weights = kinds
    check_map("ctx", ctx)
    shape, dtype, device = ctx
    check_levels("weights", weights, shape[1], len(shape) - 2)
    expected = (shape[0], len(weights) + 1, *shape[2:])
    check_shape("gates", gates, expected, f"(B, L+1, *spatial) for L = {len(weights)} weights")
    check_same_kind(kinds, ("ctx", "gates", *[f"weights[{i}]" for i in range(len(weights))]))
    kernels = tuple([tuple(weight[0][2:]) for weight in weights])
    spatial = (shape[0], *shape[2:])
    biased = _has_bias(weights)
    return Call("focal_context", device, dtype, shape[1], kernels, spatial, biased=biased, channels_adjacent=adjacent)


def _has_bias(levels: Sequence[Kind]) -> bool:
    return any([level[0][1] == 2 for level in levels])


def prepare_modulate(q, ctx_all, weight, bias=None) -> tuple[Call, Sequence[Any]]:
    q, ctx_all, weight, bias = follow_autocast((q, ctx_all, weight, bias))
    call = _check_modulate(kinds_of((q, ctx_all, weight, bias)))
    return call, (q, ctx_all, as_matrix(weight), bias)


@looked_up
def _check_modulate(kinds: tuple[Kind, ...]) -> Call:
    q, ctx_all, weight, bias = kinds
    check_map("q", q)
    shape, dtype, device = q
    check_shape("ctx_all", ctx_all, tuple(shape), "q's shape")
    check_matrix("weight", weight, shape[1], shape[1])
    check_shape("bias", bias, (shape[1],), "(C,)", optional=True)
    check_same_kind(kinds, ("q", "ctx_all", "weight", "bias"))
    return Call("modulate", device, dtype, shape[1], (), (shape[0], *shape[2:]))


def prepare_focal_modulation(
    x, f_weight, f_bias, focal_weights, h_weight, h_bias, proj_weight, proj_bias, *, focal_biases=None,
    ln_weight=None, ln_bias=None,
) -> tuple[Call, Sequence[Any]]:  # fmt: skip
    levels = as_levels("focal_weights", focal_weights, focal_biases)
    tensors = follow_autocast(
        (x, f_weight, f_bias, *levels, h_weight, h_bias, proj_weight, proj_bias, ln_weight, ln_bias)
    )
    return _check_focal_modulation(kinds_of(tensors)), tensors


@looked_up
def _check_focal_modulation(kinds: tuple[Kind, ...]) -> Call:
    x = kinds[0]
    p: Any = LayerParameters(kinds[1:])
    check_map("x", x, layout="(B, *spatial, C)")
    shape, dtype, device = x
    C, f_out = shape[-1], 2 * shape[-1] + len(p.focal_weights) + 1
    check_levels("focal_weights", p.focal_weights, C, len(shape) - 2)
    check_matrix("f_weight", p.f_weight, f_out, C)
    check_matrix("h_weight", p.h_weight, C, C)
    check_matrix("proj_weight", p.proj_weight, C, C)
    check_shape("f_bias", p.f_bias, (f_out,), "(2C+L+1,)", optional=True)
    check_shape("h_bias", p.h_bias, (C,), "(C,)", optional=True)
    check_shape("proj_bias", p.proj_bias, (C,), "(C,)", optional=True)
    check_shape("ln_weight", p.ln_weight, (C,), "(C,)", optional=True)
    check_shape("ln_bias", p.ln_bias, (C,), "(C,)", optional=True)
    if (p.ln_weight is None) != (p.ln_bias is None):
        raise ValueError("ln_weight, ln_bias: give both or neither")
    names = ("x", *LayerParameters.names(len(p.focal_weights)))
    check_same_kind(kinds, names, norm=("ln_weight", "ln_bias"))
    kernels = tuple([tuple(weight[0][2:]) for weight in p.focal_weights])
    norm_dtype = None if p.ln_weight is None else p.ln_weight[1]
    biased = _has_bias(p.focal_weights)
    return Call("focal_modulation", device, dtype, C, kernels, tuple(shape[:-1]), norm_dtype, biased=biased)


def prepare_focal_branch(
    x, f_weight, f_bias, focal_weights, h_weight, h_bias, proj_weight, proj_bias, *, focal_biases=None,
    ln_weight=None, ln_bias=None, norm_weight=None, norm_bias=None, gamma=None, drop_path=None,
) -> tuple[Call, Sequence[Any]]:  # fmt: skip
    levels = as_levels("focal_weights", focal_weights, focal_biases)
    layer = follow_autocast((f_weight, f_bias, *levels, h_weight, h_bias, proj_weight, proj_bias, ln_weight, ln_bias))
    _check_drop_path(drop_path)
    tensors = (x, *layer, norm_weight, norm_bias, gamma, drop_path)
    return _check_focal_branch(kinds_of(tensors)), tensors


@looked_up
def _check_focal_branch(kinds: tuple[Kind, ...]) -> Call:
    x = kinds[0]
    p: Any = FocalBranchParameters(kinds[1:])
    check_map("x", x, layout="(B, *spatial, C)")
    _check_body("f_weight", p.layer.f_weight, x)
    check_residual(x, p.residual)
    call = _check_focal_modulation(((x[0], p.layer.f_weight[1], x[2]), *p.layer))
    return dataclasses.replace(call, op="focal_branch", residual_dtype=x[1], chosen={})


def _check_drop_path(drop_path) -> None:
    if isinstance(drop_path, Tensor) and drop_path.requires_grad:
        raise ValueError("drop_path: expected factors that require no gradient, got a tensor that does")


def _check_body(name: str, kind: Kind, x: Kind) -> None:
    """That a branch's body is of the kind of x, or of 16 bits beside float32."""
    _, residual_dtype, device = x
    check_tensor(name, kind)
    fits = kind[1] == residual_dtype or (residual_dtype == torch.float32 and kind[1].itemsize == 2)
    if not fits or kind[2] != device:
        expected = f"{residual_dtype}{' or 16 bits' if residual_dtype == torch.float32 else ''} on {device} as x"
        raise TypeError(f"{name}: expected {expected}, got {kind[1]} on {kind[2]}")


def prepare_mlp_branch(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, norm_weight=None, norm_bias=None, gamma=None, drop_path=None
) -> tuple[Call, Sequence[Any]]:
    mlp = follow_autocast((fc1_weight, fc1_bias, fc2_weight, fc2_bias))
    _check_drop_path(drop_path)
    tensors = (x, *mlp, norm_weight, norm_bias, gamma, drop_path)
    return _check_mlp_branch(kinds_of(tensors)), tensors


@looked_up
def _check_mlp_branch(kinds: tuple[Kind, ...]) -> Call:
    x = kinds[0]
    p: Any = MlpBranchParameters(kinds[1:])
    check_map("x", x, layout="(B, *spatial, C)")
    shape, residual_dtype, device = x
    C = shape[-1]
    _check_body("fc1_weight", p.fc1_weight, x)
    M, dtype = p.fc1_weight[0][0], p.fc1_weight[1]
    check_matrix("fc1_weight", p.fc1_weight, M, C)
    check_matrix("fc2_weight", p.fc2_weight, C, M)
    check_shape("fc1_bias", p.fc1_bias, (M,), "(M,)", optional=True)
    check_shape("fc2_bias", p.fc2_bias, (C,), "(C,)", optional=True)
    check_residual(x, p.residual)
    check_same_kind(kinds[1:5], p.names[:4])
    return Call("mlp_branch", device, dtype, C, (), tuple(shape[:-1]), residual_dtype=residual_dtype)


def check_residual(x: Kind, residual: Any) -> None:
    """The tensors of a `Residual` around a branch of x."""
    shape = x[0]
    for name in ("norm_weight", "norm_bias", "gamma"):
        check_shape(name, getattr(residual, name), (shape[-1],), "(C,)", optional=True)
    check_shape("drop_path", residual.drop_path, (shape[0],), "(B,)", optional=True)
    if (residual.norm_weight is None) != (residual.norm_bias is None):
        raise ValueError("norm_weight, norm_bias: give both or neither")
    check_same_kind((x, *residual), ("x", *residual._fields), norm=("norm_weight", "norm_bias"))


def prepare_patch_embed(
    x, weight, bias, *, stride, padding=0, norm_weight=None, norm_bias=None
) -> tuple[Call, Sequence[Any]]:
    """Its tensors, then stride and padding per axis."""
    x, weight, bias = follow_autocast((x, weight, bias))
    tensors = (x, weight, bias, norm_weight, norm_bias)
    axes = len(x.shape) - 2 if isinstance(x, Tensor) else 0
    steps, zeros = per_axis("stride", stride, axes, 1), per_axis("padding", padding, axes, 0)
    return _check_patch_embed(kinds_of(tensors), steps, zeros), (*tensors, steps, zeros)


@looked_up
def _check_patch_embed(kinds: tuple[Kind, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> Call:
    x, weight, bias, norm_weight, norm_bias = kinds
    check_map("x", x)
    shape, dtype, device = x
    check_tensor("weight", weight)
    if len(weight[0]) != len(shape) or weight[0][1] != shape[1] or weight[0][0] == 0:
        got = f"got {tuple(weight[0])}"
        raise ValueError(f"weight: expected shape (N, {shape[1]}, {', '.join('k' * len(stride))}) = (N, C, *k), {got}")
    N, _, *kernel = weight[0]
    check_shape("bias", bias, (N,), "(N,)", optional=True)
    check_shape("norm_weight", norm_weight, (N,), "(N,)", optional=True)
    check_shape("norm_bias", norm_bias, (N,), "(N,)", optional=True)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight, norm_bias: give both or neither")
    names = ("x", "weight", "bias", "norm_weight", "norm_bias")
    check_same_kind(kinds, names, norm=("norm_weight", "norm_bias"))
    grid = [
        (n + 2 * zeros - k) // step + 1 for n, k, step, zeros in zip(shape[2:], kernel, stride, padding, strict=True)
    ]
    if any([n < 1 for n in grid]):
        raise ValueError(f"x: expected at least one patch of {tuple(kernel)}, got a map of {tuple(shape[2:])}")
    norm_dtype = None if norm_weight is None else norm_weight[1]
    kernels = (tuple(kernel), stride)
    return Call("patch_embed", device, dtype, N, kernels, (shape[0], *grid), norm_dtype)


def prepare_cross_focal_modulation(x, target, *args, **kwargs) -> tuple[Tensor, Tensor, LayerParameters]:
    _, (x, *parameters) = prepare_focal_modulation(x, *args, **kwargs)
    x, target = follow_autocast((x, target))
    of_x, of_target = kinds_of((x, target))
    check_map("target", of_target, layout="(B, *spatial, C)")
    B, C = x.shape[0], x.shape[-1]
    if target.ndim != x.ndim or (target.shape[0], target.shape[-1]) != (B, C):
        raise ValueError(
            f"target: expected x's batch {B}, channels {C} and {x.ndim - 2} spatial axes, "
            f"got shape {tuple(target.shape)}"
        )
    check_same_kind((of_x, of_target), ("x", "target"))
    return x, target, LayerParameters(parameters).as_matrices()


def context_of(target: Tensor, p: LayerParameters) -> tuple[Tensor, Tensor]:
    """ctx (B, C, *spatial) and gates (B, L+1, *spatial): f without the rows of q."""
    C = target.shape[-1]
    projected = F.linear(target, p.f_weight[C:], None if p.f_bias is None else p.f_bias[C:]).movedim(-1, 1)
    return projected.split((C, len(p.focal_weights) + 1), 1)


def prepare_cross_context(*args, **kwargs) -> tuple[Call, Sequence[Any]]:
    _, target, p = prepare_cross_focal_modulation(*args, **kwargs)
    return prepare_levels(*context_of(target, p), p.focal_weights)


PREPARE: dict[str, Callable[..., tuple[Call, Sequence[Any]]]] = {
    "focal_context": prepare_focal_context,
    "modulate": prepare_modulate,
    "focal_modulation": prepare_focal_modulation,
    "focal_branch": prepare_focal_branch,
    "mlp_branch": prepare_mlp_branch,
    "patch_embed": prepare_patch_embed,
    "cross_focal_modulation": prepare_cross_context,
}
