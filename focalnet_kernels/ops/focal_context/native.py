"""focal_context through the C++ kernels (csrc/cpu and csrc/cuda, focal_context*)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

from torch import Tensor

from ..._calls import Call
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


def why_slow(backend: str, call: Call, training: bool) -> str | None:
    fast = backend == "cpu" or (call.channels_adjacent and by_tokens(call.channels, call.kernels))
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
