"""mlp_branch on a GPU: for few channels one kernel (triton_mlp.py), otherwise cuBLAS and the kernels over rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._calls import Call
from ..._namespace import OPS
from ...dispatch import Implementation
from .._limits import SLOW_ON_GPU
from ..token_rows import as_rows, like
from ..triton.launch import cdiv, exact_gelu, implement_triton, launch, next_power_of_2, why_not_triton
from ..triton.token_rows import TRITON, or_other
from . import around, native
from .parameters import MlpBranchParameters


def mlp_branch_fwd(x, parameters, norm_eps, post, keep_hidden, save) -> tuple[Tensor, list[Tensor]]:
    raw = OPS.mlp_branch_fwd_triton
    return raw(x, list(parameters), norm_eps, post, keep_hidden, save)


def mlp_branch_bwd(grad_y, x, parameters, saved, norm_eps, post, keep_hidden, needed) -> list[Tensor]:
    raw = OPS.mlp_branch_bwd_triton
    return raw(grad_y, x, list(parameters), list(saved), norm_eps, post, keep_hidden, needed)


def why_slow(call: Call, training: bool) -> str | None:
    gains = native.in_one_kernel(call) or (not training and call.residual_dtype != call.dtype)
    return None if gains else SLOW_ON_GPU


IMPLEMENTATION = Implementation("triton", why_not_triton, mlp_branch_fwd, mlp_branch_bwd, why_slow)


def in_one_kernel(p: MlpBranchParameters, keep_hidden: bool) -> bool:
    """Which has no hidden values to keep."""
    return not keep_hidden and p.fc1_weight.dtype != torch.float32 and p.fc1_weight.shape[1] <= native.MOST_CHANNELS


# next_power_of_2(C) -> BN, BM, warps, stages, forward and backward; those of 128 in bfloat16 were measured on an H200
_FORWARD = {16: (128, 64, 4, 2), 32: (128, 64, 4, 2), 64: (128, 64, 4, 2), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2)}
_BACKWARD = {16: (64, 32, 4, 2), 32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 8, 1)}
_BACKWARD_SPARING = _BACKWARD | {128: (32, 16, 4, 2)}  # of registers: for the exact GELU and rows of float32


def _tile(tiles: dict[int, tuple], C: int) -> dict:
    columns = max(16, next_power_of_2(C))
    BN, BM, warps, stages = tiles[columns]
    return {"BN": BN, "BC": columns, "BM": BM, "num_warps": warps, "num_stages": stages}


def mlp_branch_fwd_impl(x, parameters, norm_eps, post, keep_hidden, save):
    p = MlpBranchParameters(parameters)
    if not in_one_kernel(p, keep_hidden and save):
        return around.forward(TRITON, x, parameters, norm_eps, post, keep_hidden, save)
    from .triton_mlp import mlp_fwd_kernel

    r, dtype, rows = p.residual, p.fc1_weight.dtype, as_rows(x)
    tokens, C = rows.shape
    y, keep = torch.empty_like(rows), save and post
    u = rows.new_empty(tokens, C, dtype=dtype) if keep else y
    tile = _tile(_FORWARD, C)
    launch(
        mlp_fwd_kernel, cdiv(tokens, tile["BN"]), x.device,
        rows, or_other(r.norm_weight, rows), or_other(r.norm_bias, rows), norm_eps,
        p.fc1_weight.contiguous(), or_other(p.fc1_bias, rows), p.fc2_weight.contiguous(), or_other(p.fc2_bias, rows),
        or_other(r.gamma, rows), or_other(r.drop_path, rows), y, u,
        tokens, max(1, tokens // max(1, x.shape[0])), C, len(p.fc1_weight),
        NORM=r.norm_weight is not None, POST=post, BIAS1=p.fc1_bias is not None, BIAS2=p.fc2_bias is not None,
        GAMMA=r.gamma is not None, DROP_PATH=r.drop_path is not None, SAVE=keep, EXACT=exact_gelu(dtype), **tile,
    )  # fmt: skip
    return like(x, y), [u] if keep else []


def mlp_branch_bwd_impl(grad_y, x, parameters, saved, norm_eps, post, keep_hidden, needed):
    p = MlpBranchParameters(parameters)
    if not in_one_kernel(p, keep_hidden):
        return around.backward(TRITON, grad_y, x, parameters, saved, norm_eps, post, keep_hidden, needed)
    from .triton_mlp import mlp_bwd_kernel

    r, rows, dy = p.residual, as_rows(x), as_rows(grad_y)
    wants = around.wanted(p, x, needed)
    du, found = around.body_gradient(TRITON, p, rows, dy, saved, norm_eps, post, wants)
    (tokens, C), M, exact = rows.shape, len(p.fc1_weight), exact_gelu(p.fc1_weight.dtype)
    tile = _tile(_BACKWARD_SPARING if exact or rows.dtype == torch.float32 else _BACKWARD, C)
    programs, pre = cdiv(tokens, tile["BN"]), not post and r.norm_weight is not None
    dx, z = torch.empty_like(rows), torch.empty_like(du)
    hidden, grad_hidden = du.new_empty(tokens, M), du.new_empty(tokens, M)
    sums = rows.new_empty((programs, 2, C), dtype=torch.float32)
    hidden_sums = rows.new_empty((programs, M), dtype=torch.float32)
    launch(
        mlp_bwd_kernel, programs, x.device,
        rows, dy, du, or_other(r.norm_weight, rows), or_other(r.norm_bias, rows), norm_eps,
        p.fc1_weight.contiguous(), or_other(p.fc1_bias, rows), p.fc2_weight.contiguous(), z, dx, hidden, grad_hidden,
        sums, hidden_sums, tokens, C, M,
        NORM=pre, BIAS1=p.fc1_bias is not None, EXACT=exact, **tile,
    )  # fmt: skip
    if pre:
        found |= zip(("norm_weight", "norm_bias"), sums.sum(0), strict=True)
    found |= {"x": like(x, dx), "fc1_bias": hidden_sums.sum(0)}
    return around.gradients(p, x, found, wants, z, du, hidden, grad_hidden)


implement_triton("mlp_branch_fwd_triton", mlp_branch_fwd_impl)
implement_triton("mlp_branch_bwd_triton", mlp_branch_bwd_impl)
