"""Loads the compiled kernels once, and remembers why where it could not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from . import _calls
from ._warnings import warn_once


def _load(stem: str, kernels: str, needs: str) -> str | None:
    """Load the library `stem` beside this file. None on success, otherwise the reason."""
    files = sorted(Path(__file__).parent.glob(f"{stem}.*so")) + sorted(Path(__file__).parent.glob(f"{stem}*.pyd"))
    if not files:
        return f"the {kernels} kernels were not built (install with {needs} and --no-build-isolation)"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        reason = f"{files[0].name} does not load: {str(error.__cause__ or error).splitlines()[0]}"
        warn_once(f"focalnet_kernels falls back to other backends: {reason}")
        return reason
    return None


def _load_cuda() -> str | None:
    """As `_load`: a library of another CUDA may find its runtime all the same, and must not run beside torch's."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    major = torch.version.cuda.partition(".")[0]
    if reason := _load("_cuda", "CUDA C++", f"nvcc of CUDA {major}"):
        return reason
    built = torch.ops.focalnet_kernels.cuda_build().rpartition("CUDA ")[2]
    if built.partition(".")[0] == major:
        return None
    reason = f"the CUDA C++ kernels were built by CUDA {built}, this torch is of CUDA {torch.version.cuda}"
    warn_once(f"focalnet_kernels falls back to other backends: {reason}")
    return reason


def _ask_cpu_isa() -> tuple[str, str | None]:
    """The instruction set in force, or "none"; and what is wrong with the one that the environment names."""
    if cpu_missing:
        return "none", None
    try:
        return torch.ops.focalnet_kernels.cpu_isa(), None
    except RuntimeError as error:
        return "none", str(error).splitlines()[0]


def cpu_isa() -> str:
    """The instruction set of the CPU kernels; "none" without them. Found when they were loaded: a trace that is going
    on would record the raw op.

    Raises:
        ValueError: FOCALNET_KERNELS_CPU_ISA names none of this machine's.
    """
    if _cpu_isa_fault is not None:
        raise ValueError(_cpu_isa_fault)
    return _cpu_isa


torch.library.define("focalnet_kernels::cpu_isa", "() -> str")
torch.library.define("focalnet_kernels::cuda_build", "() -> str")
cpu_missing = _load("_cpu", "C++", "a C++ compiler")
_cpu_isa, _cpu_isa_fault = _ask_cpu_isa()
cuda_device = "cuda"  # where the CUDA kernels take their tensors
cuda_missing = _load_cuda()


@contextlib.contextmanager
def cuda_kernels_on_cpu() -> Iterator[None]:
    """Backend "cuda" takes CPU tensors meanwhile, by raw ops that somebody loaded: an emulation of the kernels."""
    global cuda_device, cuda_missing
    before = cuda_device, cuda_missing
    cuda_device, cuda_missing = "cpu", None
    _calls.forget()
    try:
        yield
    finally:
        cuda_device, cuda_missing = before
        _calls.forget()
