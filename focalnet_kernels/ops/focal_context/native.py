"""focal_context through the C++ kernels (csrc/cpu/focal_context.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._autograd import bit_mask
from .._native_limits import why_not_cpu


def why_not(ctx: Tensor, gates: Tensor, weights: Sequence[Tensor], normalize: bool) -> str | None:
    return why_not_cpu(ctx)


def focal_context_fwd(ctx, gates, weights, normalize) -> tuple[Tensor, Tensor]:
    return torch.ops.focalnet_kernels.focal_context_fwd(ctx, gates, list(weights), normalize)


def focal_context_bwd(grad_out, ctx, gates, weights, mean, normalize, needed) -> list[Tensor]:
    return torch.ops.focalnet_kernels.focal_context_bwd(
        grad_out, ctx, gates, list(weights), mean, normalize, bit_mask(needed)
    )
