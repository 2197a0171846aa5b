"""The whole focal modulation layer in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..focal_context.reference import focal_context_reference
from .parameters import LayerParameters


def focal_modulation_reference(
    x: Tensor,
    parameters: LayerParameters,
    normalize: bool,
    ln_eps: float,
) -> Tensor:
    """See `focalnet_kernels.focal_modulation` (paper, section 3.2): differentiable to any order."""
    p, C = LayerParameters(parameters).as_matrices(), x.shape[-1]
    projected = F.linear(x, p.f_weight, p.f_bias).movedim(-1, 1)
    q, ctx, gates = projected.split((C, C, len(p.focal_weights) + 1), 1)
    ctx_all = focal_context_reference(ctx, gates, p.focal_weights, normalize)
    modulator = F.linear(ctx_all.movedim(1, -1), p.h_weight, p.h_bias)
    y = q.movedim(1, -1) * modulator
    if p.ln_weight is not None:
        y = F.layer_norm(y, (C,), p.ln_weight, p.ln_bias, ln_eps)
    return F.linear(y, p.proj_weight, p.proj_bias)
