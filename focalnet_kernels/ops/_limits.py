"""What no kernel takes, whichever backend's."""

from __future__ import annotations

import functools

import torch

from .._calls import Call

OLDEST_CUDA = (8, 0)  # compute capability: tensor cores that know bfloat16; Triton's code for 7.5 has none, and spills
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


def why_biased(call: Call) -> str | None:
    """Why a GPU's kernels leave this call to the reference; None where they take it."""
    return "levels with biases are left to the reference on a GPU" if call.biased else None


def why_too_old(device: torch.device) -> str | None:
    """Why a GPU cannot run our kernels; None where it can."""
    found = capability(device)
    if found is not None and found < OLDEST_CUDA:
        return f"it needs compute capability {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}, {device} has {found[0]}.{found[1]}"
    return None


def capability(device: torch.device) -> tuple[int, int] | None:
    """A GPU's compute capability; None of another device, and in a trace, which cannot ask."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.compiler.is_compiling():
        return None
    return _capability(device)


_capability = functools.cache(torch.cuda.get_device_capability)
