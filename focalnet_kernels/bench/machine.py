"""What machine this is, for tables and CSV files."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from .._machine import cpu_name, device_class
from .._version import __version__

_PACKAGES = ("torch", "triton", "timm", "transformers")


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
        "machine": device_class(torch.device(device)),
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
