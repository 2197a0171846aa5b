"""modulate through the C++ kernels (csrc/cpu/modulate_fwd.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native_limits import why_not_cpu


def why_not(q: Tensor, ctx_all: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return why_not_cpu(q)


def modulate_fwd(q: Tensor, ctx_all: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.focalnet_kernels.modulate_fwd(q, ctx_all, weight, bias)
