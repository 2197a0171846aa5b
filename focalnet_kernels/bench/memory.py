"""Bytes that a training step keeps for its backward, and that a call needs at most."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import forkserver
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
        self._others: list = []  # processes that were there before

    def __enter__(self) -> HostMemory:
        if self._wanted:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__, "timm", "transformers.models.focalnet.modeling_focalnet"])
            self._others = multiprocessing.active_children()
            self._pool = ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)
            try:
                with _ctrl_c_afterwards():
                    _start_server()
                    self._pool.submit(int).result()
            except BaseException:
                self._end_processes()
                raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._pool is None:
            return
        if error is None:
            self._pool.shutdown()
        else:
            self._end_processes()

    def _end_processes(self) -> None:
        """At once: nobody waits for their answers any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            if process not in self._others:
                process.terminate()
        self._pool.shutdown()

    def peak_bytes(self, case: Case, provider: Provider, modes: Iterable[str]) -> dict[str, int]:
        """By mode; empty where it cannot be told."""
        if self._pool is None or provider.compiled:
            return {}
        threads = torch.get_num_threads()
        futures = {mode: self._pool.submit(_host_peak, case, provider, mode, threads) for mode in modes}
        return {mode: future.result() for mode, future in futures.items()}


@contextlib.contextmanager
def _ctrl_c_afterwards() -> Iterator[None]:
    """Ctrl-C meanwhile takes effect at the end: multiprocessing does not bear it in the midst of a start."""
    if threading.current_thread() is not threading.main_thread():  # which alone is told of it
        yield
        return
    came: list = []
    before = signal.signal(signal.SIGINT, lambda *args: came.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _start_server() -> None:
    """multiprocessing's forkserver. Ctrl-C, which a terminal sends to all, is left to this process by its children."""
    name = "MALLOC_MMAP_THRESHOLD_"  # read by glibc at the start: what is freed goes back to the system
    before = os.environ.get(name)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ[name] = str(1 << 16)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _host_peak(case: Case, provider: Provider, mode: str, threads: int) -> int:
    torch.set_num_threads(threads)
    # a small one first, for the pages of libraries and for whatever is set up once
    small = {"batch": 1, "image": tuple(min(side, 64) for side in case.image)}
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
