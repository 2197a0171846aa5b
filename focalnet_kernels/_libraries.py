"""Loads the compiled kernels once, and remembers why where it could not."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from . import _calls
from ._namespace import NAMESPACE, OPS
from ._warnings import warn_once


def _not_built() -> dict[str, str]:
    """What setup.py wrote down of each half that it could not build."""
    path = Path(__file__).with_name("_not_built.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _load(stem: str, kernels: str, needs: str) -> str | None:
    """Load the library `stem` beside this file. None on success, otherwise the reason."""
    files = sorted(Path(__file__).parent.glob(f"{stem}.*so")) + sorted(Path(__file__).parent.glob(f"{stem}*.pyd"))
    if not files:
        why = _not_built().get("cuda" if "cuda" in stem else "cpu")
        hint = f"(install with {needs} and --no-build-isolation, and --no-cache-dir if pip has a wheel without them)"
        return f"the {kernels} kernels were not built {hint if why is None else f'({why})'}"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        reason = f"{files[0].name} does not load: {str(error.__cause__ or error).splitlines()[0]}"
        warn_once(f"focalnet_kernels falls back to other backends: {reason}")
        return reason
    return None


def _load_cuda() -> str | None:
    """The library of torch's CUDA: one of another major version must not run beside it."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    major = torch.version.cuda.partition(".")[0]
    found = {m[1] for path in Path(__file__).parent.glob("_cuda*") if (m := re.match(r"_cuda(\d+)\.", path.name))}
    if found and major not in found:
        built = " and ".join(sorted(found, key=int))
        reason = f"the CUDA C++ kernels were built for CUDA {built}, this torch is of CUDA {torch.version.cuda}"
        warn_once(f"focalnet_kernels falls back to other backends: {reason}")
        return reason
    return _load(f"_cuda{major}", "CUDA C++", f"nvcc of CUDA {major}")


def _ask_cpu_isa() -> tuple[str, str | None]:
    """The instruction set in force, or "none"; and what is wrong with the one that the environment names."""
    if cpu_missing:
        return "none", None
    try:
        return OPS.cpu_isa(), None
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


torch.library.define(f"{NAMESPACE}::cpu_isa", "() -> str")
torch.library.define(f"{NAMESPACE}::cuda_build", "() -> str")
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
