"""What the C++ backends share: "cpu" on CPU tensors, "cuda" on GPU tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CUDA = (8, 0)  # compute capability: tensor cores that know bfloat16
LARGEST_CUDA_LEVELS = 8  # MAX_LEVELS in csrc/cuda/kernels.h


def raw_op(name: str, backend: str) -> Callable:
    """The C++ kernel of that name: "cuda" has raw ops of its own."""
    return getattr(torch.ops.focalnet_kernels, name + {"cpu": "", "cuda": "_cuda"}[backend])


def why_not_native(
    backend: str, tensor: Tensor, sizes: Sequence[int] = (), weights: Sequence[Tensor] = ()
) -> str | None:
    """Why a backend's kernels cannot run this call; None where they can.

    Args:
        tensor: the call's first, which has everybody's device and dtype.
        sizes: of the map, where there are focal levels.
        weights: the focal levels'.
    """
    device = "cpu" if backend == "cpu" else _native.cuda_device
    if tensor.device.type != device:
        return f"the tensors are on {tensor.device}, not on {'the CPU' if backend == 'cpu' else 'a GPU'}"
    if tensor.dtype not in DTYPES:
        return f"dtype {tensor.dtype} is left to the reference (kernels: float32, bfloat16, float16)"
    if backend == "cpu":
        return _native.cpu_missing
    return _why_too_large(sizes, weights) or _native.cuda_missing or _why_too_old(tensor)


def _why_too_old(tensor: Tensor) -> str | None:
    if tensor.is_cuda and not torch.compiler.is_compiling() and (found := _capability(tensor.device)) < OLDEST_CUDA:
        return (
            f"it needs compute capability {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}, {tensor.device} has {found[0]}.{found[1]}"
        )
    return None


_capability = functools.cache(torch.cuda.get_device_capability)


def _why_too_large(sizes: Sequence[int], weights: Sequence[Tensor]) -> str | None:
    if len(weights) > LARGEST_CUDA_LEVELS:
        return f"{len(weights)} focal levels are more than its {LARGEST_CUDA_LEVELS}"
    zeros = [max((w.shape[2 + axis] for w in weights), default=1) + 8 for axis in range(len(sizes))]
    if torch.Size([size + z for size, z in zip(sizes, zeros, strict=True)]).numel() >= 2**27:
        return f"maps of {' x '.join(map(str, sizes))} pixels are too large for its 32-bit offsets"
    return None
