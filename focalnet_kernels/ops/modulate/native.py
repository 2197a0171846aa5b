"""modulate through the C++ kernels (csrc/cpu and csrc/cuda, modulate*)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..._calls import Call
from ...dispatch import Implementation
from .._native import raw_op, why_not_native


def modulate_fwd(backend: str, q: Tensor, ctx_all: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return raw_op("modulate_fwd", backend)(q, ctx_all, weight, bias)


def why_slow(call: Call, training: bool) -> str | None:
    """The backward is PyTorch's, and makes the modulator again, which eager keeps: a product of four more."""
    slow = training and call.device.type == "cpu"
    return "in training eager PyTorch is faster: it keeps the modulator" if slow else None


def implementation(backend: str) -> Implementation:
    """ "cpu"'s or "cuda"'s."""
    return Implementation(
        backend,
        partial(why_not_native, backend),
        partial(modulate_fwd, backend),
        why_slow=why_slow,
    )
