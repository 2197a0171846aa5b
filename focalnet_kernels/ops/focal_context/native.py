"""focal_context through the C++ kernels (csrc/cpu and csrc/cuda, focal_context*)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ...dispatch import Implementation
from .._autograd import bit_mask
from .._native import raw_op, why_not_native


def why_not(backend: str, ctx: Tensor, gates: Tensor, weights: Sequence[Tensor], normalize: bool) -> str | None:
    return why_not_native(backend, ctx, ctx.shape[2:], weights)


def focal_context_fwd(backend, ctx, gates, weights, normalize) -> tuple[Tensor, Tensor]:
    return raw_op("focal_context_fwd", backend)(ctx, gates, list(weights), normalize)


def focal_context_bwd(backend, grad_out, ctx, gates, weights, mean, normalize, needed) -> list[Tensor]:
    return raw_op("focal_context_bwd", backend)(grad_out, ctx, gates, list(weights), mean, normalize, bit_mask(needed))


def implementation(backend: str) -> Implementation:
    """ "cpu"'s or "cuda"'s."""
    return Implementation(backend, *(partial(f, backend) for f in (why_not, focal_context_fwd, focal_context_bwd)))
