"""Dense token rows (tokens, C), and the kernels over them: norm, scale, residual, and GELU's backward.

A backend's are a `RowKernels`: triton/token_rows.py, or csrc/cuda/token_rows.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._namespace import OPS
from ._library import library
from .residual import Residual


class Norm(NamedTuple):
    """LayerNorm over (tokens, C); the result in `dtype`."""

    weight: Tensor
    bias: Tensor
    eps: float
    dtype: torch.dtype


class RowKernels(NamedTuple):
    """norm_fwd(rows, weight, bias, eps, dtype): LayerNorm of adjacent rows in their own dtype or float32, in `dtype`.

    residual_fwd(x, u, residual, norm_eps, post, y, following=None): y = x + drop_path * gamma * post_norm?(u). Returns
    the `Norm` `following` of y, where there is one.

    norm_bwd(rows, grad, grad_rows, residual, norm_eps, *, norm, scale, add=None): the backward of
    (drop_path * gamma *)? norm?(rows), plus `add`, into `grad_rows`. Returns (4, C) float32: the gradients of
    norm_weight, norm_bias and gamma, and, without `add`, the sum of `grad_rows` over tokens.

    gelu_bwd(pre, hidden, grad): `hidden` = GELU(pre), and pre's gradient over `grad`, all (tokens, M); pre and hidden
    may be one. Returns that gradient's sum (M,) over tokens.
    """

    norm_fwd: Callable[[Tensor, Tensor, Tensor | None, float, torch.dtype], Tensor]
    residual_fwd: Callable[..., Tensor | None]
    norm_bwd: Callable[..., Tensor]
    gelu_bwd: Callable[[Tensor, Tensor, Tensor], Tensor]


def as_rows(x: Tensor) -> Tensor:
    """(B, *spatial, C) of any strides as adjacent rows (tokens, C): mostly as they are."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def like(x: Tensor, rows: Tensor) -> Tensor:
    """Adjacent (tokens, C) rows as (B, *spatial, C) in x's memory order: mostly as they are."""
    result, wanted = rows.view(x.shape), torch.empty_like(x)
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


def separate(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A raw op's result, which shares its memory with no other: sums of several parameters come in one tensor."""
    return gradient.to(dtype, copy=gradient.ndim == 1)


_RESIDUAL = "Tensor?[] residual, float norm_eps, bool norm"
for _schema in (
    f"residual_rows_fwd_cuda(Tensor x, Tensor u, {_RESIDUAL}, Tensor(a!) y) -> ()",
    "residual_norm_rows_fwd_cuda(Tensor x, Tensor u, Tensor?[] residual, Tensor weight, Tensor bias, float eps,"
    " Tensor(a!) y, Tensor(b!) z) -> bool",
    "norm_rows_fwd_cuda(Tensor x, Tensor weight, Tensor bias, float eps, Tensor(a!) y) -> bool",
    f"norm_rows_bwd_cuda(Tensor rows, Tensor grad, Tensor? add, {_RESIDUAL}, bool scale, Tensor(a!) grad_rows)"
    " -> Tensor",
    "gelu_rows_bwd_cuda(Tensor pre, Tensor(a!) hidden, Tensor(b!) grad) -> Tensor",
):  # not seen by PyTorch: the branches' raw ops call them
    library.define(_schema)


def torch_norm_fwd(rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(rows.to(weight.dtype), rows.shape[-1:], weight, bias, eps).to(dtype)


def _norm_fwd(rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    y = torch.empty_like(rows, dtype=dtype)
    raw = OPS.norm_rows_fwd_cuda
    if bias is not None and raw(rows, weight.contiguous(), bias.contiguous(), eps, y):
        return y
    return torch_norm_fwd(rows, weight, bias, eps, dtype)


def _contiguous(residual: Residual) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in residual]


def _residual_fwd(
    x: Tensor, u: Tensor, residual: Residual, norm_eps: float, post: bool, y: Tensor, following: Norm | None = None
) -> Tensor | None:
    norm, raw = post and residual.norm_weight is not None, OPS
    if following is not None and not norm:
        weight, bias, eps, dtype = following
        z = torch.empty_like(y, dtype=dtype)
        of_norm = weight.contiguous(), bias.contiguous(), eps
        if raw.residual_norm_rows_fwd_cuda(x, u, _contiguous(residual), *of_norm, y, z):
            return z
    raw.residual_rows_fwd_cuda(x, u, _contiguous(residual), norm_eps, norm, y)
    return None if following is None else _norm_fwd(y, *following)


def _norm_bwd(rows, grad, grad_rows, residual, norm_eps, *, norm, scale, add=None) -> Tensor:
    raw = OPS.norm_rows_bwd_cuda
    return raw(rows, grad, add, _contiguous(residual), norm_eps, norm, scale, grad_rows)


def _gelu_bwd(pre: Tensor, hidden: Tensor, grad: Tensor) -> Tensor:
    return OPS.gelu_rows_bwd_cuda(pre, hidden, grad)


CUDA = RowKernels(_norm_fwd, _residual_fwd, _norm_bwd, _gelu_bwd)
