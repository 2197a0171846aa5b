"""The focal modulation branch of a block in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..focal_modulation.reference import focal_modulation_reference
from ..residual import residual_reference
from .parameters import FocalBranchParameters


def focal_branch_reference(
    x: Tensor, parameters: FocalBranchParameters, normalize: bool, ln_eps: float, norm_eps: float, post: bool
) -> Tensor:
    """See `focalnet_kernels.focal_branch`: differentiable to any order."""
    p = FocalBranchParameters(parameters)

    def layer(z: Tensor) -> Tensor:
        return focal_modulation_reference(z.to(p.layer.f_weight.dtype), p.layer, normalize, ln_eps)

    return residual_reference(x, layer, p.residual, norm_eps, post)
