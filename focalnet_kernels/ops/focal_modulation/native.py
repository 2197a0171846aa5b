"""focal_modulation through the C++ kernels (csrc/cpu and csrc/cuda, focal_modulation*)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...dispatch import Implementation
from .._autograd import bit_mask
from .._native import raw_op, why_not_native
from .parameters import LayerParameters


def why_not(backend: str, x: Tensor, parameters: LayerParameters, normalize: bool, ln_eps: float) -> str | None:
    return parameters.why_mixed() or why_not_native(backend, x, x.shape[1:-1], parameters.focal_weights)


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
