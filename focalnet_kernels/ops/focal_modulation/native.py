"""focal_modulation through the C++ kernels (csrc/cpu and csrc/cuda, focal_modulation*)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ..._calls import Call
from ...dispatch import Implementation
from .._limits import SLOW_BACKWARD
from .._native import raw_op, why_not_native
from .._packed import packed_forward
from ..focal_context import native as context
from .parameters import LayerParameters


def by_tokens(x: Tensor, focal_weights: Sequence[Tensor], ln_weight: Tensor | None) -> bool:
    """Whether the matrices of backend "cuda" lie as tokens: `Layer` in csrc/cuda/focal_modulation.cpp."""
    C, sizes, kernels = x.shape[-1], x.shape[1:-1], [w.shape[2:] for w in focal_weights]
    # rows first: by images a dynamic width is asked whether it is 56, and would be fixed at that
    by_planes = context.by_rows(x.dtype, kernels, sizes) or context.by_images(x.dtype, C, kernels, sizes)
    return ln_weight is None and context.by_tokens(C, kernels) and not by_planes


def new_tokens(x: Tensor, rows: int, tokens: int) -> Tensor:
    """An empty (rows, tokens) matrix with rows adjacent, tokens a multiple of 8 elements apart."""
    return x.new_empty(tokens, -(-rows // 8) * 8)[:, :rows].t()


def product_weights(p: LayerParameters) -> tuple[Tensor, Tensor, Tensor]:
    """Those that the layer's products read, in the order of `focal_modulation_packed`."""
    return p.f_weight, p.h_weight, p.proj_weight


def focal_modulation_fwd(
    backend, x, parameters: LayerParameters, normalize, ln_eps, save
) -> tuple[Tensor, list[Tensor]]:
    if backend == "cpu" and not save:
        y = packed_forward("focal_modulation", x, parameters, product_weights(parameters), normalize, ln_eps)
        if y is not None:
            return y, []
    return raw_op("focal_modulation_fwd", backend)(x, list(parameters), normalize, ln_eps, save)


def focal_modulation_bwd(
    backend, grad_y, x, parameters: LayerParameters, saved, normalize, ln_eps, needed
) -> list[Tensor]:
    raw = raw_op("focal_modulation_bwd", backend)
    return raw(grad_y, x, list(parameters), *saved, normalize, ln_eps, needed)


def why_slow(backend: str, call: Call, training: bool) -> str | None:
    fast = backend == "cpu" or (call.norm_dtype is None and context.by_tokens(call.channels, call.kernels))
    if not fast and call.sizes_are_known():
        fast = context.by_images(call.dtype, call.channels, call.kernels, call.shape[1:])
    return SLOW_BACKWARD if training and not fast else None


def implementation(backend: str) -> Implementation:
    """ "cpu"'s or "cuda"'s."""
    return Implementation(
        backend,
        partial(why_not_native, backend),
        partial(focal_modulation_fwd, backend),
        partial(focal_modulation_bwd, backend),
        partial(why_slow, backend),
    )
