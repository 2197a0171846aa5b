"""What machine this is."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

import torch

from . import _libraries


@functools.cache
def device_class(device: torch.device) -> str | None:
    """A name for machines whose figures can be compared, "cpu-2-cores-avx512-bf16" or "nvidia-h200": a folder of
    results. None where nobody measures."""
    if device.type == "cuda" and torch.cuda.is_available():  # fake tensors may be on one that is not there
        return re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower())
    if device.type == "cpu":
        return f"cpu-{torch.get_num_threads()}-cores-{_libraries.cpu_isa().replace('_', '-')}"
    return None


def cpu_name() -> str:
    """The processor's own name, or the next best."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
