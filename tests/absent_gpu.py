"""Triton's own way to a launch, on a machine without a GPU: a driver of an H100 that is not there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from focalnet_kernels.ops.triton import launch as launching
from focalnet_kernels.ops.triton import replay


class Handed(NamedTuple):
    """What a driver is handed for one launch."""

    kernel: str
    grid: tuple[int, int, int]
    args: tuple


class _Launcher:
    def __init__(self, source: Any, metadata: Any):
        self.kernel = source.fn.__name__

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *args) -> None:
        launched = driver.active.launched
        if launched is not None:
            launched.append(Handed(self.kernel, (x, y, z), args))


_numbers = itertools.count(-1, -1)  # of devices: Triton keeps kernels by it, and these are for nobody else


class _Driver:
    """As far as `triton.JITFunction` and `CompiledKernel` ask."""

    launcher_cls = _Launcher
    utils = SimpleNamespace(
        load_binary=lambda *of_kernel: (1, 1, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
    )

    def __init__(self, launched: list[Handed] | None):
        self.launched = launched
        self.device = next(_numbers)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def absent_gpu(launched: list[Handed] | None = None) -> Iterator[None]:
    """Launches of CPU tensors are compiled for an H100 meanwhile and handed to nobody, or to a list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", _Driver(launched))
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
        patch.setattr(launching, "_built", {})
        patch.setattr(replay, "_recipes", {})
        launching.multiprocessors.cache_clear()
        try:
            yield
        finally:
            launching.multiprocessors.cache_clear()
