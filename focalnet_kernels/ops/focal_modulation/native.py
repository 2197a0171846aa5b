"""focal_modulation through the C++ kernels (csrc/cpu/focal_modulation.cpp, focal_modulation_bwd.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import bit_mask
from .._native_limits import why_not_cpu
from .parameters import LayerParameters


def why_not(x: Tensor, parameters: LayerParameters, normalize: bool, ln_eps: float) -> str | None:
    return why_not_cpu(x)


def focal_modulation_fwd(x, parameters: LayerParameters, normalize, ln_eps, save) -> tuple[Tensor, ...]:
    flat = parameters.flat()
    return torch.ops.focalnet_kernels.focal_modulation_fwd(x, *flat[:8], list(flat[8:]), normalize, ln_eps, save)


def focal_modulation_bwd(
    grad_y, x, parameters: LayerParameters, intermediate, normalize, ln_eps, needed
) -> list[Tensor]:
    flat = parameters.flat()
    return torch.ops.focalnet_kernels.focal_modulation_bwd(
        grad_y, x, *flat[:8], list(flat[8:]), *intermediate, normalize, ln_eps, bit_mask(needed)
    )
