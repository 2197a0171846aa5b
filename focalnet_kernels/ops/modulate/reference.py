"""modulate in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def modulate_reference(q: Tensor, ctx_all: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `focalnet_kernels.modulate`: same arguments, same result, differentiable to any order."""
    modulator = F.linear(ctx_all.movedim(1, -1), weight, bias).movedim(-1, 1)
    return q * modulator
