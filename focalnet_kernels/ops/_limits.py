"""What no kernel takes, whichever backend's."""

from __future__ import annotations

import torch

from .._calls import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SLOW_BACKWARD = "its backward was slower than eager PyTorch on an H100: name it to train with it"
SLOW_ON_GPU = "it was slower than eager PyTorch on an H200: name it to have it"


def why_no_kernel(call: Call) -> str | None:
    """Why this call is the reference's; None where kernels can run it."""
    if call.dtype not in DTYPES:
        return f"dtype {call.dtype} is left to the reference (kernels: float32, bfloat16, float16)"
    if call.norm_dtype not in (None, call.dtype):
        return f"its LayerNorm is {call.norm_dtype} in a layer of {call.dtype}: left to the reference"
    return None
