"""focal_modulation through the C++ kernels (csrc/cpu and csrc/cuda, focal_modulation*)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ...dispatch import Implementation
from .._autograd import bit_mask
from .._native import raw_op, why_not_native
from ..focal_context import native as context
from .parameters import LayerParameters, why_mixed


def why_not(backend: str, x: Tensor, parameters: LayerParameters, normalize: bool, ln_eps: float) -> str | None:
    return why_mixed(parameters) or why_not_native(backend, x, x.shape[1:-1], parameters.focal_weights)


def by_tokens(x: Tensor, focal_weights: Sequence[Tensor], ln_weight: Tensor | None) -> bool:
    """Whether the matrices of backend "cuda" lie as tokens: `Layer` in csrc/cuda/focal_modulation.cpp."""
    return ln_weight is None and context.by_tokens(x.shape[-1], [w.shape[2:] for w in focal_weights])


def new_tokens(x: Tensor, rows: int, tokens: int) -> Tensor:
    """An empty (rows, tokens) matrix with rows adjacent, tokens a multiple of 8 elements apart."""
    return x.new_empty(tokens, -(-rows // 8) * 8)[:, :rows].t()


def focal_modulation_fwd(backend, x, parameters: LayerParameters, normalize, ln_eps, save) -> tuple[Tensor, ...]:
    return raw_op("focal_modulation_fwd", backend)(x, list(parameters), normalize, ln_eps, save)


def focal_modulation_bwd(
    backend, grad_y, x, parameters: LayerParameters, intermediate, normalize, ln_eps, needed
) -> list[Tensor]:
    raw = raw_op("focal_modulation_bwd", backend)
    return raw(grad_y, x, list(parameters), *intermediate, normalize, ln_eps, bit_mask(needed))


def trains_fast(backend: str, x: Tensor, parameters: LayerParameters, normalize: bool, ln_eps: float) -> bool:
    return backend == "cpu" or by_tokens(x, parameters.focal_weights, parameters.ln_weight)


def implementation(backend: str) -> Implementation:
    """ "cpu"'s or "cuda"'s."""
    functions = (why_not, focal_modulation_fwd, focal_modulation_bwd, trains_fast)
    return Implementation(backend, *(partial(f, backend) for f in functions))
