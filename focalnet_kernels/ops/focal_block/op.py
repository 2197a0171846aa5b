"""focal_block: both branches of a block. In inference on a GPU one launch makes the sum of the first and the second's
norm."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ... import dispatch
from ..._calls import Call
from ..._namespace import OPS
from .._autograd import needs_grad
from .._library import define, implement_cuda
from ..focal_branch import op as first
from ..focal_branch.parameters import FocalBranchParameters
from ..focal_modulation import native as layer
from ..focal_modulation.triton_launch import focal_modulation_fwd_impl
from ..mlp_branch import native as mlp_native
from ..mlp_branch import op as second
from ..mlp_branch.parameters import MlpBranchParameters
from ..token_rows import CUDA
from ..triton.launch import implement_triton
from ..triton.token_rows import TRITON
from . import around

# x: (B, *spatial, C), any strides -> y: the same, with x's memory order; both norms come first


def _flops(x, focal, mlp, normalize, ln_eps, norm_eps, mlp_norm_eps, **results) -> int:
    return first.forward_flops(x, focal) + second.forward_flops(x, mlp)


@define(
    "focal_block_fwd(Tensor x, Tensor?[] focal, Tensor?[] mlp, bool normalize, float ln_eps, float norm_eps,"
    " float mlp_norm_eps) -> Tensor",
    backends=("_triton", "_cuda"),
    flops=_flops,
)
def _(x, focal, mlp, normalize, ln_eps, norm_eps, mlp_norm_eps):
    return torch.empty_like(x)


def focal_block(
    calls: tuple[Call, Call], x: Tensor, focal: FocalBranchParameters, mlp: MlpBranchParameters,
    focal_options: tuple[bool, float, float, bool], mlp_options: tuple[float, bool, bool], backend: str | None,
) -> Tensor:  # fmt: skip
    """The checked op: see `focalnet_kernels.functional.focal_block`."""
    normalize, ln_eps, norm_eps, post = focal_options
    mlp_norm_eps, mlp_post, _ = mlp_options
    norm_between = not post and not mlp_post and mlp.residual.norm_weight is not None
    if norm_between and not needs_grad((x, *focal, *mlp)) and (chosen := _chosen_by_both(calls, backend)):
        raw = getattr(OPS, f"focal_block_fwd_{chosen}")
        parameters = list(focal.as_matrices()), list(mlp.as_matrices())
        return raw(x, *parameters, normalize, ln_eps, norm_eps, mlp_norm_eps)
    y = first.focal_branch(calls[0], x, focal, *focal_options, backend)
    return second.mlp_branch(calls[1], y, mlp, *mlp_options, backend)


def _chosen_by_both(calls: tuple[Call, Call], backend: str | None) -> str | None:
    """The backend of a GPU that runs both branches, and whose MLP is no kernel with a norm of its own."""
    chosen, other = [dispatch.select(call, False, backend).backend for call in calls]
    if chosen != other or chosen not in ("triton", "cuda"):
        return None
    return None if chosen == "triton" and mlp_native.in_one_kernel(calls[1]) else chosen


implement_cuda("focal_block_fwd_cuda", partial(around.forward, CUDA, partial(layer.focal_modulation_fwd, "cuda")))
implement_triton("focal_block_fwd_triton", partial(around.forward, TRITON, focal_modulation_fwd_impl))
