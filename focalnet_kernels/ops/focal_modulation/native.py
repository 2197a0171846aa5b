"""focal_modulation through the C++ kernels (csrc/cpu/focal_modulation_fwd.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native_limits import why_not_cpu
from .parameters import LayerParameters


def why_not(x: Tensor, parameters: LayerParameters, normalize: bool, ln_eps: float) -> str | None:
    return why_not_cpu(x)


def focal_modulation_fwd(x: Tensor, parameters: LayerParameters, normalize: bool, ln_eps: float) -> Tensor:
    flat = parameters.flat()
    return torch.ops.focalnet_kernels.focal_modulation_fwd(
        x, *flat[:8], list(flat[8:]), normalize, ln_eps, False
    )[0]
