"""Bytes that a training step keeps for its backward, and that a call needs at most."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from .cases import Case
from .providers import Provider, Subject
from .steps import calls
from .timing import ready


def saved_bytes(subject: Subject) -> int:
    """What autograd keeps after a forward, parameters and inputs aside; tensors that share memory count once."""
    own = {t.untyped_storage().data_ptr() for t in (subject.inputs | subject.leaves()).values()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = subject()
    del y
    return sum(kept.values())


def cuda_peak_bytes(call: Callable[[], object]) -> int:
    """What a call allocates at most on the current GPU, beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class HostMemory:
    """Peak memory of calls on a CPU, as Linux counts it, each in a process of its own.

    The resident set is the one measure that sees everybody's buffers: PyTorch's allocator knows nothing of the scratch
    memory of our C++ kernels or of MKL. In this process it would also hold what earlier calls left behind, so each
    call runs in a child, forked from a server that has imported everything and run nothing (threads do not survive a
    fork). Compiled providers are left out: what the compiler itself needs would be counted with them.
    """

    def __init__(self, wanted: bool = True):
        self._wanted = wanted and Path("/proc/self/clear_refs").exists()
        self._pool = None

    def __enter__(self) -> HostMemory:
        if self._wanted:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__, "timm", "transformers.models.focalnet.modeling_focalnet"])
            # read by glibc when the server starts: tensors go back to the system as soon as they are freed
            before = os.environ.get("MALLOC_MMAP_THRESHOLD_")
            os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
            self._pool = ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)
            self._pool.submit(int).result()
            os.environ.pop("MALLOC_MMAP_THRESHOLD_") if before is None else None
        return self

    def __exit__(self, *exc_info) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def peak_bytes(self, case: Case, provider: Provider, modes: Iterable[str]) -> dict[str, int]:
        """By mode; empty where it cannot be told."""
        if self._pool is None or provider.compiled:
            return {}
        threads = torch.get_num_threads()
        futures = {mode: self._pool.submit(_host_peak, case, provider, mode, threads) for mode in modes}
        return {mode: future.result() for mode, future in futures.items()}


def _host_peak(case: Case, provider: Provider, mode: str, threads: int) -> int:
    torch.set_num_threads(threads)
    # a small one first, for the pages of libraries and for whatever is set up once
    small = {"batch": 1, "pixels": min(case.pixels, 64)}
    if case.layer is not None:
        small["layer"] = replace(case.layer, dim=32, size=8, width=None)
    ready(calls(provider.build(replace(case, **small), False), mode))()
    call = ready(calls(provider.build(case, False), mode))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
