"""What the C++ CPU kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_cpu(tensor: Tensor) -> str | None:
    """Why the CPU kernels cannot run on tensors of this device and dtype; None where they can."""
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}, not on the CPU"
    if tensor.dtype not in DTYPES:
        return f"dtype {tensor.dtype} is left to the reference (kernels: float32, bfloat16, float16)"
    return _native.cpu_missing
