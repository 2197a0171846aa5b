"""The MLP branch of a block in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..residual import residual_reference
from .parameters import MlpBranchParameters


def mlp_branch_reference(
    x: Tensor, parameters: MlpBranchParameters, norm_eps: float, post: bool, keep_hidden: bool
) -> Tensor:
    """See `focalnet_kernels.mlp_branch`: differentiable to any order. Autograd keeps hidden values, asked or not."""
    p = MlpBranchParameters(parameters).as_matrices()

    def mlp(z: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(z.to(p.fc1_weight.dtype), p.fc1_weight, p.fc1_bias))
        return F.linear(hidden, p.fc2_weight, p.fc2_bias)

    return residual_reference(x, mlp, p.residual, norm_eps, post)
