"""The kernels over token rows (rows.py), launched: see ../token_rows.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..residual import Residual
from ..token_rows import Norm, RowKernels, torch_norm_fwd
from .launch import cdiv, exact_gelu, launch, multiprocessors, next_power_of_2


def _tile(C: int, elements: int) -> dict:
    columns = next_power_of_2(C)
    # left to itself ptxas takes 64 or 80 registers, and spills a word or two
    return {
        "BN": max(1, elements // columns),
        "BC": columns,
        "num_warps": max(4, min(16, columns // 256)),
        "maxnreg": 128,
    }


def or_other(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's argument: something stands for what is absent."""
    return other if tensor is None else tensor.contiguous()


def residual_fwd(
    x: Tensor, u: Tensor, residual: Residual, norm_eps: float, post: bool, y: Tensor, following: Norm | None = None
) -> Tensor | None:
    from .rows import residual_fwd_kernel

    tokens, C = x.shape
    tile = _tile(C, 4096)
    r = residual
    n = Norm(x, x, 0.0, y.dtype) if following is None else following
    z = y if following is None else torch.empty_like(y, dtype=n.dtype)
    launch(
        residual_fwd_kernel, cdiv(tokens, tile["BN"]), x.device,
        x, u, or_other(r.norm_weight, x), or_other(r.norm_bias, x), norm_eps, or_other(r.gamma, x),
        or_other(r.drop_path, x), y, n.weight.contiguous(), n.bias.contiguous(), n.eps, z,
        tokens, _pixels(tokens, r), C,
        NORM=post and r.norm_weight is not None, GAMMA=r.gamma is not None, DROP_PATH=r.drop_path is not None,
        FOLLOWING=following is not None, **tile,
    )  # fmt: skip
    return None if following is None else z


def norm_bwd(
    rows: Tensor, grad: Tensor, grad_rows: Tensor, residual: Residual, norm_eps: float, *, norm: bool, scale: bool,
    add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from .rows import norm_bwd_kernel

    tokens, C = grad.shape
    tile = _tile(C, 1024)  # a thread keeps three sums of each of its elements
    programs = max(1, min(cdiv(tokens, tile["BN"]), 4 * multiprocessors(grad.device)))
    sums = grad.new_empty((programs, 4, C), dtype=torch.float32)
    r = residual
    launch(
        norm_bwd_kernel, programs, grad.device,
        rows, grad, or_other(add, grad), or_other(r.norm_weight, grad), or_other(r.norm_bias, grad), norm_eps,
        or_other(r.gamma, grad), or_other(r.drop_path, grad), grad_rows, sums,
        tokens, _pixels(tokens, r), C, programs,
        NORM=norm, GAMMA=scale and r.gamma is not None, DROP_PATH=scale and r.drop_path is not None,
        RESIDUAL=add is not None, **tile,
    )  # fmt: skip
    return sums.sum(0)


def gelu_bwd(pre: Tensor, hidden: Tensor, grad: Tensor) -> Tensor:
    from .rows import gelu_bwd_kernel

    tokens, M = hidden.shape
    BN, BM = (16, 128)
    tiles = cdiv(M, BM)
    programs = max(1, min(cdiv(tokens, BN), cdiv(8 * multiprocessors(grad.device), tiles)))
    sums = grad.new_empty((programs, M), dtype=torch.float32)
    launch(
        gelu_bwd_kernel, tiles * programs, grad.device, pre, hidden, grad, sums, tokens, M, programs,
        EXACT=exact_gelu(hidden.dtype), BN=BN, BM=BM, num_warps=4,
    )  # fmt: skip
    return sums.sum(0)


def _pixels(tokens: int, residual: Residual) -> int:
    """Of a sample, where drop_path says how many there are."""
    return max(1, tokens) if residual.drop_path is None else max(1, tokens // max(1, len(residual.drop_path)))


TRITON = RowKernels(torch_norm_fwd, residual_fwd, norm_bwd, gelu_bwd)
