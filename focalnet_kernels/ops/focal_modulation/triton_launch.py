"""focal_modulation through the Triton kernels.

Everything between f and proj is a (channels, tokens) matrix, logically. In memory it is either planes (tokens adjacent:
what the depthwise chain wants, no permute anywhere) or tokens (channels adjacent: what cuBLAS writes with a bias).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._namespace import OPS
from ..focal_context.triton_launch import context_bwd, context_fwd
from ..modulate.triton_launch import (
    LARGEST_LN,
    LARGEST_PROJ,
    Tail,
    modulate,
    rows_bwd,
    rows_fwd,
    sum_programs,
)
from ..triton.geometry import strided_like, token_axes
from ..triton.launch import cdiv, implement_triton, launch
from ..triton.replay import replayed
from .parameters import LayerParameters


def focal_modulation_fwd(x, parameters: LayerParameters, normalize, ln_eps, save) -> tuple[Tensor, list[Tensor]]:
    return OPS.focal_modulation_fwd_triton(x, list(parameters), normalize, ln_eps, save)


def focal_modulation_bwd(grad_y, x, parameters: LayerParameters, saved, normalize, ln_eps, needed) -> list[Tensor]:
    return OPS.focal_modulation_bwd_triton(grad_y, x, list(parameters), *saved, normalize, ln_eps, needed)


def in_planes(x: Tensor) -> bool:
    """Whether matrices lie as planes. Where the products around the chain are bound by memory (kernels in 16 bits, few
    channels) our own stream as well as cuBLAS; elsewhere cuBLAS computes faster, and writes tokens."""
    return x.dtype != torch.float32 and x.shape[-1] <= 256


def new_matrix(x: Tensor, rows: int, tokens: int) -> Tensor:
    """An empty (rows, tokens) matrix in the layout of this layer."""
    return x.new_empty(rows, tokens) if in_planes(x) else x.new_empty(tokens, rows).t()


def _product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a @ b, a (rows, tokens) matrix, in the layout of this layer."""
    return a @ b if in_planes(x) else (b.t() @ a.t()).t()


def _as_map(matrix: Tensor, x: Tensor) -> Tensor:
    """A (rows, tokens) matrix as (B, rows, *spatial), without a copy."""
    return matrix.as_strided(*_map_geometry(matrix.shape, matrix.stride(), x.shape))


@functools.lru_cache(maxsize=1024)
def _map_geometry(
    matrix: Sequence[int], matrix_strides: tuple[int, ...], shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of a matrix as a map of x's shape."""
    strides = [matrix_strides[1]]
    for size in reversed(shape[1:-1]):
        strides.insert(0, strides[0] * size)
    return (shape[0], matrix[0], *shape[1:-1]), (strides[0], matrix_strides[0], *strides[1:])


def _linear_f(x: Tensor, weight: Tensor, bias: Tensor | None, tokens: int) -> Tensor:
    """f(x) as a (2C+L+1, tokens) matrix."""
    if not in_planes(x):
        return F.linear(x.reshape(tokens, x.shape[-1]), weight, bias).t()
    from .triton_linear import linear_planes_kernel

    out = new_matrix(x, len(weight), tokens)
    size, (strides,) = token_axes(x.movedim(-1, 1))
    BF, BN, BK = (64, 128, 32)
    launch(
        linear_planes_kernel, cdiv(len(weight), BF) * cdiv(tokens, BN), x.device,
        x, strides, weight, weight.stride(), weight if bias is None else bias.contiguous(), out, tokens, len(weight),
        x.shape[-1], size, HAS_BIAS=bias is not None, BF=BF, BN=BN, BK=BK, num_warps=8, num_stages=3, maxnreg=128,
    )  # fmt: skip
    return out


@replayed
def focal_modulation_fwd_impl(x, parameters, normalize, ln_eps, save):
    p = LayerParameters(parameters)
    C, tokens = x.shape[-1], x.numel() // x.shape[-1]
    projected = _linear_f(x, p.f_weight, p.f_bias, tokens)
    q, ctx, gates = projected.split((C, C, len(p.focal_weights) + 1))
    ctx_all = new_matrix(x, C, tokens)
    ctx_all_map, by_rows = _as_map(ctx_all, x), _by_rows(x, p.ln_weight)
    mean = context_fwd(_as_map(ctx, x), _as_map(gates, x), p.focal_weights, normalize, ctx_all_map, by_rows)
    if by_rows:
        kept = F.linear(ctx_all.t(), p.h_weight, p.h_bias).t()
        z = rows_fwd(q, kept, p.ln_weight, p.ln_bias, ln_eps, new_matrix(x, C, tokens) if save else kept)
        y = _like(x, F.linear(z.t(), p.proj_weight, p.proj_bias))
    else:
        kept = new_matrix(x, C, tokens) if save else None
        arguments = _as_map(q, x), ctx_all_map, p.h_weight, p.h_bias
        modulator = None if kept is None else _as_map(kept, x)
        if C <= LARGEST_PROJ and x.dtype != torch.float32:
            y = torch.empty_like(x)
            tail = Tail(p.ln_weight, p.ln_bias, ln_eps, p.proj_weight, p.proj_bias)
            modulate(*arguments, y.movedim(-1, 1), modulator, tail)
        else:
            z = new_matrix(x, C, tokens)
            modulate(*arguments, _as_map(z, x), modulator, Tail(p.ln_weight, p.ln_bias, ln_eps))
            y = _like(x, F.linear(z.t(), p.proj_weight, p.proj_bias))
    return y, [projected, kept, mean] if save else []


def _by_rows(x: Tensor, ln_weight: Tensor | None) -> bool:
    """Whether h is cuBLAS's and what follows it a kernel of its own: for LayerNorm over more channels than a tile of
    products holds, and in float32, where `tl.dot` is slow, unless there is so little work that launches count."""
    if ln_weight is not None and x.shape[-1] > LARGEST_LN:
        return True
    return x.dtype == torch.float32 and x.shape[0] * x.shape[-1] >= 1024


def _like(x: Tensor, tokens: Tensor) -> Tensor:
    """A contiguous (tokens, C) matrix as (B, *spatial, C) in x's memory order: mostly as it is."""
    result = tokens.view(x.shape)
    like = torch.empty_like(x)
    return result if result.stride() == like.stride() else like.copy_(result)


def focal_modulation_bwd_impl(grad_y, x, parameters, projected, modulator, mean, normalize, ln_eps, needed):
    p, L = LayerParameters(parameters), len(parameters) - 8
    inputs = dict(zip(("x", *p.names(L)), (x, *parameters), strict=True))
    wants = {name: t is not None and bool(needed >> i & 1) for i, (name, t) in enumerate(inputs.items())}
    of_levels = [name for name in inputs if name.startswith("focal_weights")]
    want_levels = any(wants[name] for name in of_levels)
    want_projected = wants["x"] or wants["f_weight"] or wants["f_bias"]
    gradients = {}
    C, tokens = x.shape[-1], x.numel() // x.shape[-1]
    dy = grad_y.reshape(tokens, C)
    q, ctx, gates = projected.split((C, C, L + 1))

    grad_projected = new_matrix(x, len(projected), tokens)
    grad_q, grad_ctx, grad_gates = grad_projected.split((C, C, L + 1))
    z = _product(x, p.proj_weight.t(), dy.t())  # the gradient of proj's input, until rows_bwd puts the input there
    grad_modulator = new_matrix(x, C, tokens)
    sums = rows_bwd(q, modulator, z, p.ln_weight, p.ln_bias, ln_eps, grad_q, grad_modulator)
    if wants["proj_weight"]:
        gradients["proj_weight"] = dy.t() @ z.t()
    if wants["proj_bias"]:
        gradients["proj_bias"] = dy.sum(0)
    if wants["h_bias"] or wants["ln_weight"] or wants["ln_bias"]:
        gradients.update(zip(("h_bias", "ln_weight", "ln_bias"), sum_programs(sums, x.dtype), strict=True))

    if want_projected or wants["h_weight"] or want_levels:
        grad_ctx_all = _product(x, p.h_weight.t(), grad_modulator)
        ctx_all = new_matrix(x, C, tokens) if wants["h_weight"] else None
        found = context_bwd(
            _as_map(grad_ctx_all, x), _as_map(ctx, x), _as_map(gates, x), p.focal_weights, mean, normalize,
            _as_map(grad_ctx, x) if want_projected else None, _as_map(grad_gates, x) if want_projected else None,
            want_weights=want_levels, ctx_all=None if ctx_all is None else _as_map(ctx_all, x),
        )  # fmt: skip
        gradients.update(zip(of_levels, found, strict=want_levels))
        if ctx_all is not None:
            gradients["h_weight"] = grad_modulator @ ctx_all.t()
    if wants["x"]:
        gradients["x"] = _like(x, grad_projected.t() @ p.f_weight)
    if wants["f_weight"]:
        gradients["f_weight"] = grad_projected @ x.reshape(tokens, C)
    if wants["f_bias"]:
        gradients["f_bias"] = grad_projected.sum(1)
    return [strided_like(gradients[name], t) if wants[name] else x.new_empty(0) for name, t in inputs.items()]


implement_triton("focal_modulation_fwd_triton", focal_modulation_fwd_impl)
implement_triton("focal_modulation_bwd_triton", focal_modulation_bwd_impl)
