"""mlp_branch on a GPU: for few channels one kernel (triton_mlp.py), otherwise cuBLAS and the kernels over rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch import Implementation
from ..triton.geometry import strided_like
from ..triton.launch import cdiv, exact_gelu, implement_triton, launch, next_power_of_2, why_not_triton
from ..triton.row_launch import _or, as_rows, gelu_bwd, like, norm_bwd, residual_fwd
from .parameters import MlpBranchParameters

MOST_CHANNELS = 192  # of what one kernel does: with more, a tile's sums leave no registers to products


def mlp_branch_fwd(x, parameters, norm_eps, post, save) -> tuple[Tensor, list[Tensor]]:
    return torch.ops.focalnet_kernels.mlp_branch_fwd_triton(x, list(parameters), norm_eps, post, save)


def mlp_branch_bwd(grad_y, x, parameters, saved, norm_eps, post, needed) -> list[Tensor]:
    raw = torch.ops.focalnet_kernels.mlp_branch_bwd_triton
    return raw(grad_y, x, list(parameters), list(saved), norm_eps, post, needed)


IMPLEMENTATION = Implementation("triton", why_not_triton, mlp_branch_fwd, mlp_branch_bwd)


def in_one_kernel(p: MlpBranchParameters) -> bool:
    return p.fc1_weight.dtype != torch.float32 and p.fc1_weight.shape[1] <= MOST_CHANNELS


# next_power_of_2(C) -> BN, BM, warps, stages of the forward and of the backward
_FORWARD = {16: (128, 64, 4, 2), 32: (128, 64, 4, 2), 64: (128, 64, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)}
_BACKWARD = {16: (64, 32, 4, 2), 32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 8, 1)}


def _tile(tiles: dict[int, tuple], C: int) -> dict:
    columns = max(16, next_power_of_2(C))
    BN, BM, warps, stages = tiles[columns]
    return {"BN": BN, "BC": columns, "BM": BM, "num_warps": warps, "num_stages": stages}


def mlp_branch_fwd_impl(x, parameters, norm_eps, post, save):
    p = MlpBranchParameters(parameters)
    r, dtype = p.residual, p.fc1_weight.dtype
    rows = as_rows(x)
    tokens, C = rows.shape
    y = torch.empty_like(rows)
    pre = not post and r.norm_weight is not None
    if in_one_kernel(p):
        from .triton_mlp import mlp_fwd_kernel

        keep = save and post
        u = rows.new_empty(tokens, C, dtype=dtype) if keep else y
        tile = _tile(_FORWARD, C)
        launch(
            mlp_fwd_kernel, cdiv(tokens, tile["BN"]), x.device,
            rows, _or(r.norm_weight, rows), _or(r.norm_bias, rows), norm_eps,
            p.fc1_weight.contiguous(), _or(p.fc1_bias, rows), p.fc2_weight.contiguous(), _or(p.fc2_bias, rows),
            _or(r.gamma, rows), _or(r.drop_path, rows), y, u,
            tokens, max(1, tokens // max(1, x.shape[0])), C, len(p.fc1_weight),
            NORM=r.norm_weight is not None, POST=post, BIAS1=p.fc1_bias is not None, BIAS2=p.fc2_bias is not None,
            GAMMA=r.gamma is not None, DROP_PATH=r.drop_path is not None, SAVE=keep, EXACT=exact_gelu(dtype), **tile,
        )  # fmt: skip
    else:
        z = (F.layer_norm(rows, (C,), r.norm_weight, r.norm_bias, norm_eps) if pre else rows).to(dtype)
        u = F.linear(F.gelu(F.linear(z, p.fc1_weight, p.fc1_bias)), p.fc2_weight, p.fc2_bias)
        residual_fwd(rows, u, r, norm_eps, post, y)
    return like(x, y), [u] if save and post else []


def mlp_branch_bwd_impl(grad_y, x, parameters, saved, norm_eps, post, needed):
    p = MlpBranchParameters(parameters)
    r, dtype = p.residual, p.fc1_weight.dtype
    inputs = dict(zip(("x", *p.names), (x, *parameters), strict=True))
    wants = {name: t is not None and bool(needed >> i & 1) for i, (name, t) in enumerate(inputs.items())}
    rows, dy = as_rows(x), as_rows(grad_y)
    tokens, C = rows.shape
    pre = not post and r.norm_weight is not None
    found = {}

    z = None
    u = saved[0] if post else rows
    if wants["gamma"] and not post:  # its gradient needs what it scales
        z = (F.layer_norm(rows, (C,), r.norm_weight, r.norm_bias, norm_eps) if pre else rows).to(dtype)
        u = F.linear(F.gelu(F.linear(z, p.fc1_weight, p.fc1_bias)), p.fc2_weight, p.fc2_bias)
    # du: of fc2's result
    norm = post and r.norm_weight is not None
    if norm or r.gamma is not None or r.drop_path is not None or dy.dtype != dtype or wants["fc2_bias"]:
        du = dy.new_empty(tokens, C, dtype=dtype)
        sums = norm_bwd(u, dy, du, r, norm_eps, norm=norm, scale=True)
        found |= {"gamma": sums[2], "fc2_bias": sums[3]}
        if norm:
            found |= {"norm_weight": sums[0], "norm_bias": sums[1]}
    else:
        du = dy
    dx = torch.empty_like(rows)
    if in_one_kernel(p):
        from .triton_mlp import mlp_bwd_kernel

        M, tile = len(p.fc1_weight), _tile(_BACKWARD, C)
        programs = cdiv(tokens, tile["BN"])
        hidden, grad_hidden = du.new_empty(tokens, M), du.new_empty(tokens, M)
        z = torch.empty_like(du)
        sums = rows.new_empty((programs, 2, C), dtype=torch.float32)
        hidden_sums = rows.new_empty((programs, M), dtype=torch.float32)
        launch(
            mlp_bwd_kernel, programs, x.device,
            rows, dy, du, _or(r.norm_weight, rows), _or(r.norm_bias, rows), norm_eps,
            p.fc1_weight.contiguous(), _or(p.fc1_bias, rows), p.fc2_weight.contiguous(), z, dx, hidden, grad_hidden,
            sums, hidden_sums, tokens, C, M, NORM=pre, BIAS1=p.fc1_bias is not None, EXACT=exact_gelu(dtype), **tile,
        )  # fmt: skip
        if pre:
            found |= zip(("norm_weight", "norm_bias"), sums.sum(0), strict=True)
        found["fc1_bias"] = hidden_sums.sum(0)
    else:
        if z is None:
            z = (F.layer_norm(rows, (C,), r.norm_weight, r.norm_bias, norm_eps) if pre else rows).to(dtype)
        hidden = F.linear(z, p.fc1_weight, p.fc1_bias)
        grad_hidden = du @ p.fc2_weight
        found["fc1_bias"] = gelu_bwd(hidden, grad_hidden)
        dz = grad_hidden @ p.fc1_weight
        sums = norm_bwd(rows, dz, dx, r, norm_eps, norm=pre, scale=False, add=dy)
        if pre:
            found |= {"norm_weight": sums[0], "norm_bias": sums[1]}
    found["x"] = like(x, dx)
    if wants["fc1_weight"]:
        found["fc1_weight"] = grad_hidden.t() @ z
    if wants["fc2_weight"]:
        found["fc2_weight"] = du.t() @ hidden
    return [strided_like(found[name].to(t.dtype), t) if wants[name] else x.new_empty(0) for name, t in inputs.items()]


implement_triton("mlp_branch_fwd_triton", mlp_branch_fwd_impl)
implement_triton("mlp_branch_bwd_triton", mlp_branch_bwd_impl)
