"""What machine this is, for tables and CSV files."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

from .. import _native
from .._version import __version__

_PACKAGES = ("torch", "triton", "timm", "transformers")


def cpu_name() -> str:
    """The processor's own name, or the next best."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_class(device: str) -> str:
    """A folder's name for machines whose figures can be compared: "cpu-2-cores-avx512-bf16" or "nvidia-h200"."""
    if device.startswith("cuda"):
        return re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower())
    return f"cpu-{torch.get_num_threads()}-cores-{_native.cpu_isa().replace('_', '-')}"


def machine(device: str) -> dict[str, str | int]:
    """The device, the versions and the commit, as columns of a CSV file."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name(),
        "machine": machine_class(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
        "focalnet_kernels": __version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """Of the checkout that this runs from, "-dirty" where more than results differ; "" for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""

    def git(*arguments):
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)

    git("update-index", "-q", "--refresh")  # else a file that was only touched would count
    differs = git("diff-index", "--quiet", "HEAD", "--", ".", ":!benchmarks/results").returncode == 1
    return git("rev-parse", "--short=9", "HEAD").stdout.strip() + "-dirty" * differs
