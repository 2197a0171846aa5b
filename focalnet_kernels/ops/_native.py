"""What the C++ backends share: "cpu" on CPU tensors, "cuda" on GPU tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod

import torch

from .. import _libraries
from .._calls import Call
from .._namespace import OPS
from ._limits import capability, why_biased, why_no_kernel, why_too_old

LARGEST_CUDA_LEVELS, LARGEST_CUDA_ROWS = 8, 6144  # MAX_LEVELS and MOST_NORMALIZED in csrc/cuda/kernels.h


def raw_op(name: str, backend: str) -> Callable:
    """The C++ kernel of that name: "cuda" has raw ops of its own."""
    return getattr(OPS, name + {"cpu": "", "cuda": "_cuda"}[backend])


def why_not_native(backend: str, call: Call) -> str | None:
    """Why a backend's kernels cannot run this call; None where they can."""
    device = "cpu" if backend == "cpu" else _libraries.cuda_device
    if call.device.type != device:
        return f"the tensors are on {call.device}, not on {'the CPU' if backend == 'cpu' else 'a GPU'}"
    if reason := why_no_kernel(call):
        return reason
    if backend == "cpu":
        return _libraries.cpu_missing
    return (
        why_biased(call)
        or _why_too_large(call)
        or _libraries.cuda_missing
        or why_too_old(call.device)
        or _why_not_built_for(call.device)
    )


def _why_not_built_for(device: torch.device) -> str | None:
    """Why the library has no code for a GPU: it goes for GPUs of the same major compute capability from the minor one
    on, as PTX for all newer ones."""
    found = capability(device)
    if found is None:
        return None
    build = OPS.cuda_build()
    built = [
        ((int(major), int(minor)), exact, ptx)
        for major, minor, exact, ptx in re.findall(r"\b(\d+)\.(\d)(a?)(?:f?)(\+PTX)?", build.partition(",")[0])
    ]  # none where GPUs were named otherwise ("Hopper")

    def runs(capability, exact, ptx):
        return found == capability or not exact and found > capability and (ptx or found[0] == capability[0])

    if not built or any(runs(*each) for each in built):
        return None
    here = ".".join(map(str, found))
    return f"it was built for {build}; {device} has compute capability {here}: build with TORCH_CUDA_ARCH_LIST={here}"


def _why_too_large(call: Call) -> str | None:
    kernels, sizes = call.kernels, call.shape[1:]
    if len(kernels) > LARGEST_CUDA_LEVELS:
        return f"{len(kernels)} focal levels are more than its {LARGEST_CUDA_LEVELS}"
    if call.residual_dtype is not None and call.channels > LARGEST_CUDA_ROWS:
        return f"rows of {call.channels} channels are longer than its {LARGEST_CUDA_ROWS}"
    zeros = [max([k[axis] for k in kernels], default=1) + 8 for axis in range(len(sizes))]
    if (
        call.op not in ("modulate", "mlp_branch")
        and prod([size + z for size, z in zip(sizes, zeros, strict=True)]) >= 2**27
    ):
        return f"maps of {' x '.join(map(str, sizes))} pixels are too large for its 32-bit offsets"
    return None
