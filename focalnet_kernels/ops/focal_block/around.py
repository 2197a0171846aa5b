"""focal_block by the layer's kernels, cuBLAS and, around their products, the kernels over token rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..focal_branch.around import layer_input
from ..focal_branch.parameters import FocalBranchParameters
from ..mlp_branch.around import from_body_input
from ..mlp_branch.parameters import MlpBranchParameters
from ..token_rows import Norm, RowKernels, as_rows, like


def forward(kernels: RowKernels, layer_fwd, x, focal, mlp, normalize, ln_eps, norm_eps, mlp_norm_eps) -> Tensor:
    """`layer_fwd`: a focal_modulation_fwd."""
    p, m = FocalBranchParameters(focal), MlpBranchParameters(mlp)
    r: Any = m.residual  # whose norm is there
    u, _ = layer_fwd(layer_input(kernels, x, p, norm_eps, False), p.layer, normalize, ln_eps, False)
    rows = as_rows(x)
    y = torch.empty_like(rows)
    norm = Norm(r.norm_weight, r.norm_bias, mlp_norm_eps, m.fc1_weight.dtype)
    z: Any = kernels.residual_fwd(rows, as_rows(u), p.residual, norm_eps, False, y, norm)
    return like(x, from_body_input(kernels, m, y, z, mlp_norm_eps, False)[0])
