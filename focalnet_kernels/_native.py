"""Loads the compiled kernels once, and remembers why where it could not."""

from __future__ import annotations

from pathlib import Path

import torch

from . import dispatch


def _load(stem: str) -> str | None:
    """Load the library `stem` beside this file. None on success, otherwise the reason."""
    files = sorted(Path(__file__).parent.glob(f"{stem}.*so")) + sorted(Path(__file__).parent.glob(f"{stem}*.pyd"))
    if not files:
        return "the C++ kernels were not built (install with a C++ compiler and --no-build-isolation)"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        reason = f"{files[0].name} does not load: {str(error).splitlines()[0]}"
        dispatch.warn_once(f"focalnet_kernels falls back to the reference: {reason}")
        return reason
    return None


torch.library.define("focalnet_kernels::cpu_isa", "() -> str")
cpu_missing = _load("_cpu")
