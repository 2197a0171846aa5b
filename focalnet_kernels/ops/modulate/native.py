"""modulate through the C++ kernels (csrc/cpu and csrc/cuda, modulate*)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...dispatch import Implementation
from .._native import raw_op, why_not_native


def modulate_fwd(backend: str, q: Tensor, ctx_all: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return raw_op("modulate_fwd", backend)(q, ctx_all, weight, bias)


def implementation(backend: str) -> Implementation:
    """ "cpu"'s or "cuda"'s."""
    return Implementation(
        backend,
        partial(why_not_native, backend),
        partial(modulate_fwd, backend),
    )
