"""mlp_branch by cuBLAS and, around its products, the kernels over token rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..token_rows import RowKernels, as_rows, like, separate
from ..triton.geometry import strided_like
from .parameters import MlpBranchParameters


def forward(kernels: RowKernels, x, parameters, norm_eps, post, keep_hidden, save) -> tuple[Tensor, list[Tensor]]:
    p, rows = MlpBranchParameters(parameters), as_rows(x)
    z = body_input(kernels, p, rows, norm_eps, post)
    y, u, pre = from_body_input(kernels, p, rows, z, norm_eps, post)
    return like(x, y), [t for t, kept in ((u, post), (pre, keep_hidden)) if kept and save]


def from_body_input(
    kernels: RowKernels, p: MlpBranchParameters, rows: Tensor, z: Tensor, norm_eps: float, post: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The branch's result, fc2's and fc1's."""
    y, pre = torch.empty_like(rows), before_gelu(p, z)
    u = after_gelu(p, F.gelu(pre))
    kernels.residual_fwd(rows, u, p.residual, norm_eps, post, y)
    return y, u, pre


def backward(kernels: RowKernels, grad_y, x, parameters, saved, norm_eps, post, keep_hidden, needed) -> list[Tensor]:
    p, rows, dy = MlpBranchParameters(parameters), as_rows(x), as_rows(grad_y)
    wants = wanted(p, x, needed)
    du, found = body_gradient(kernels, p, rows, dy, saved, norm_eps, post, wants)
    z = body_input(kernels, p, rows, norm_eps, post)
    pre = saved[-1] if keep_hidden else before_gelu(p, z)
    hidden = torch.empty_like(pre) if keep_hidden else pre  # what is kept may be asked for once more
    grad_hidden = du @ p.fc2_weight
    found["fc1_bias"] = kernels.gelu_bwd(pre, hidden, grad_hidden)
    dx, dz, pre = torch.empty_like(rows), grad_hidden @ p.fc1_weight, not post and p.residual.norm_weight is not None
    sums = kernels.norm_bwd(rows, dz, dx, p.residual, norm_eps, norm=pre, scale=False, add=dy)
    if pre:
        found |= {"norm_weight": sums[0], "norm_bias": sums[1]}
    found["x"] = like(x, dx)
    return gradients(p, x, found, wants, z, du, hidden, grad_hidden)


def body_input(kernels: RowKernels, p: MlpBranchParameters, rows: Tensor, norm_eps: float, post: bool) -> Tensor:
    r, dtype = p.residual, p.fc1_weight.dtype
    if post or r.norm_weight is None:
        return rows.to(dtype)
    return kernels.norm_fwd(rows, r.norm_weight, r.norm_bias, norm_eps, dtype)


def before_gelu(p: MlpBranchParameters, z: Tensor) -> Tensor:
    return F.linear(z, p.fc1_weight, p.fc1_bias)


def after_gelu(p: MlpBranchParameters, hidden: Tensor) -> Tensor:
    return F.linear(hidden, p.fc2_weight, p.fc2_bias)


def wanted(p: MlpBranchParameters, x: Tensor, needed: int) -> dict[str, bool]:
    """By name; drop_path never."""
    tensors = zip(("x", *p.names), (x, *p), strict=True)
    return {name: t is not None and bool(needed >> i & 1) for i, (name, t) in enumerate(tensors)}


def body_gradient(
    kernels: RowKernels, p: MlpBranchParameters, rows, dy, saved, norm_eps, post, wants
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient of fc2's result, and what gradients of parameters come with it."""
    r, dtype = p.residual, p.fc1_weight.dtype
    norm = post and r.norm_weight is not None
    if not (norm or r.gamma is not None or r.drop_path is not None or dy.dtype != dtype or wants["fc2_bias"]):
        return dy, {}
    u = saved[0] if post else rows
    if wants["gamma"] and not post:  # its gradient needs what it scales
        u = after_gelu(p, F.gelu(before_gelu(p, body_input(kernels, p, rows, norm_eps, post))))
    du = dy.new_empty(dy.shape, dtype=dtype)
    sums = kernels.norm_bwd(u, dy, du, r, norm_eps, norm=norm, scale=True)
    found = {"gamma": sums[2], "fc2_bias": sums[3]}
    return du, found | ({"norm_weight": sums[0], "norm_bias": sums[1]} if norm else {})


def gradients(p: MlpBranchParameters, x, found, wants, z, du, hidden, grad_hidden) -> list[Tensor]:
    """The raw op's result, with the two weights' gradients."""
    if wants["fc1_weight"]:
        found["fc1_weight"] = grad_hidden.t() @ z
    if wants["fc2_weight"]:
        found["fc2_weight"] = du.t() @ hidden
    tensors = zip(("x", *p.names), (x, *p), strict=True)
    return [strided_like(separate(found[name], t.dtype), t) if wants[name] else x.new_empty(0) for name, t in tensors]
