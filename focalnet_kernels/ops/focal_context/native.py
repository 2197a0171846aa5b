"""focal_context through the C++ kernels (csrc/cpu and csrc/cuda, focal_context*)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from ..._calls import Call, Sizes
from ...dispatch import Implementation
from .._autograd import bit_mask
from .._limits import SLOW_BACKWARD
from .._native import raw_op, why_not_native


def focal_context_fwd(backend, ctx, gates, weights, normalize) -> tuple[Tensor, Tensor]:
    return raw_op("focal_context_fwd", backend)(ctx, gates, list(weights), normalize)


def focal_context_bwd(backend, grad_out, ctx, gates, weights, mean, normalize, needed) -> list[Tensor]:
    return raw_op("focal_context_bwd", backend)(grad_out, ctx, gates, list(weights), mean, normalize, bit_mask(needed))


def by_tokens(C: int, kernels: Sequence[Sequence[int]]) -> bool:
    """Whether backend "cuda" takes maps of C adjacent channels level by level: `takes_tokens` in csrc/cuda."""
    return C % 4 == 0 and len(kernels) > 0 and all([3 <= k[-1] <= 13 and prod(k) <= 343 for k in kernels])


def by_images(dtype: torch.dtype, C: int, kernels: Sequence[Sequence[int]], sizes: Sizes) -> bool:
    """Whether backend "cuda" takes whole images whose pixels are adjacent: `takes_images` in csrc/cuda."""
    (H, M, W), *levels = [_three_axes(axes) for axes in (sizes, *kernels)]
    square = all([kt == kw and km == 1 and 3 <= kw <= 9 for kt, km, kw in levels])
    fits = M == 1 and (W <= 48 or W == 56) and H * W <= 56 * 56
    return dtype != torch.float32 and C % 8 == 0 and 1 <= len(levels) <= 4 and square and fits


def by_rows(dtype: torch.dtype, kernels: Sequence[Sequence[int]], sizes: Sizes) -> bool:
    """Whether backend "cuda" takes maps whose pixels are adjacent row by row, on any GPU: `takes_rows` in csrc/cuda."""
    (H, M, W), *levels = [_three_axes(axes) for axes in (sizes, *kernels)]
    small = all([km == 1 and max(kt, kw) <= 13 for kt, km, kw in levels])
    fits = M == 1 and 4 <= H <= 2**20 and W <= 384
    return dtype != torch.float32 and 1 <= len(levels) <= 4 and small and fits


def _three_axes(sizes: Sequence[int]) -> Sequence[int]:
    """(T, M, W): see csrc/common/geometry.h."""
    return sizes if len(sizes) == 3 else (sizes[0] if len(sizes) == 2 else 1, 1, sizes[-1])


def why_slow(backend: str, call: Call, training: bool) -> str | None:
    if call.channels_adjacent:
        fast = by_tokens(call.channels, call.kernels)
    else:
        fast = call.sizes_are_known() and by_images(call.dtype, call.channels, call.kernels, call.shape[1:])
    fast = fast or backend == "cpu"
    return SLOW_BACKWARD if training and not fast else None


def implementation(backend: str) -> Implementation:
    """ "cpu"'s or "cuda"'s."""
    return Implementation(
        backend,
        partial(why_not_native, backend),
        partial(focal_context_fwd, backend),
        partial(focal_context_bwd, backend),
        partial(why_slow, backend),
    )
