"""focal_modulation through the C++ kernels (csrc/cpu and csrc/cuda, focal_modulation*)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ...dispatch import Implementation
from .._autograd import bit_mask
from .._native import raw_op, why_not_native
from .parameters import LayerParameters


def why_not(backend: str, x: Tensor, parameters: LayerParameters, normalize: bool, ln_eps: float) -> str | None:
    return why_not_native(backend, x, x.shape[1:-1], parameters.focal_weights)


def by_tokens(x: Tensor, focal_weights: Sequence[Tensor], ln_weight: Tensor | None) -> bool:
    """Whether the matrices of backend "cuda" lie as tokens: `takes_tokens` and `Layer` in csrc/cuda."""
    kernels = [w.shape[2:] for w in focal_weights]
    plain = ln_weight is None and len(kernels) > 0 and x.shape[-1] % 4 == 0 and x.shape[1:-1].numel() < 2**27
    return plain and all(3 <= k[-1] <= 13 and k.numel() <= 343 for k in kernels)


def new_tokens(x: Tensor, rows: int, tokens: int) -> Tensor:
    """An empty (rows, tokens) matrix with rows adjacent, tokens a multiple of 8 elements apart."""
    return x.new_empty(tokens, -(-rows // 8) * 8)[:, :rows].t()


def focal_modulation_fwd(backend, x, parameters: LayerParameters, normalize, ln_eps, save) -> tuple[Tensor, ...]:
    flat = parameters.flat()
    return raw_op("focal_modulation_fwd", backend)(x, *flat[:8], list(flat[8:]), normalize, ln_eps, save)


def focal_modulation_bwd(
    backend, grad_y, x, parameters: LayerParameters, intermediate, normalize, ln_eps, needed
) -> list[Tensor]:
    flat = parameters.flat()
    return raw_op("focal_modulation_bwd", backend)(
        grad_y, x, *flat[:8], list(flat[8:]), *intermediate, normalize, ln_eps, bit_mask(needed)
    )


def implementation(backend: str) -> Implementation:
    """ "cpu"'s or "cuda"'s."""
    return Implementation(
        backend, *(partial(f, backend) for f in (why_not, focal_modulation_fwd, focal_modulation_bwd))
    )
