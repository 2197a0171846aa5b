"""The CUDA kernels, compiled to PTX and run on a CPU, launch by launch.

Plans and launches are the library's own, in the build of cuda_shim, which hands its launches over to here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_shim
import numpy as np
import torch

from . import machine
from .program import Program

with contextlib.ExitStack() as stack:
    sys.path.insert(0, str(cuda_shim.ROOT / "build_tools"))
    stack.callback(sys.path.remove, str(cuda_shim.ROOT / "build_tools"))
    import toolkit


def missing() -> str | None:
    """Why they cannot be compiled here, or None."""
    found = toolkit.find_toolkit(torch.version.cuda)
    return cuda_shim.missing() or (found if isinstance(found, str) else None)


def tool(name: str) -> Path:
    """That stands beside nvcc."""
    return toolkit.find_toolkit(torch.version.cuda).nvcc.parent / name


@contextlib.contextmanager
def recorded_memory() -> Iterator[None]:
    """Tensors made meanwhile are known to the machine, which takes no other's memory for a kernel's."""
    _, library = cuda_shim.load_kernels()
    library.focalnet_shim_record_blocks(True)
    try:
        yield
    finally:
        library.focalnet_shim_record_blocks(False)


class Running:
    """Runs launches. `results`: the machine's, of each."""

    def __init__(self, capability: int, seed: int, metered: bool):
        self.capability, self.seed, self.metered = capability, seed, metered
        self.results: list[machine.Result] = []
        self.failure: BaseException | None = None

    def __call__(self, function, blocks, threads, shared_bytes, parameters, size) -> int:
        try:
            name = _names()[function]
            self.seed += 1
            arguments = ctypes.string_at(parameters, size)
            program = programs(self.capability)[name]
            launch = blocks, threads, shared_bytes, self.seed, self.metered
            result = machine.run(program, arguments, _regions(arguments), *launch)
            assert not result.races, f"{name}: {result.races}"
            self.results.append(result)
        except BaseException as failure:  # which may not go through C++
            self.failure = failure
            return 1
        return 0


@contextlib.contextmanager
def emulated(capability: int, seed: int = 0, metered: bool = False) -> Iterator[Running]:
    """Backend "cuda" takes CPU tensors, and its launches run here as compiled for sm_`capability`; `metered`: what they
    ask of memory is counted.

    A race is an AssertionError, another fault a `memory.Fault`.
    """
    _, library = cuda_shim.load_kernels()
    running = Running(capability, seed, metered)
    handed = cuda_shim.RUNNER(running)
    library.focalnet_shim_set_runner(handed)
    try:
        with cuda_shim.emulated_ops():
            yield running
    except RuntimeError:
        if running.failure is None:
            raise
    finally:
        library.focalnet_shim_set_runner(None)
    if running.failure:
        raise running.failure


@functools.cache
def programs(capability: int) -> Programs:
    return Programs(capability)


class Programs(dict):
    """The kernels of csrc/cuda by their names, parsed when they are asked for."""

    def __init__(self, capability: int):
        super().__init__()
        self.entries: dict[str, tuple[str, str]] = {}
        for text in compiled(capability):
            entries = re.findall(r"\.entry\s+(\w+)\s*\(", text)
            for entry, name in zip(entries, demangled(entries), strict=True):
                self.entries[name] = text, entry

    def __missing__(self, name: str) -> Program:
        self[name] = Program(*self.entries[name])
        self[name].name = name
        return self[name]


def compiled(capability: int, sources: Sequence[Path] = cuda_shim.KERNELS) -> list[str]:
    """The sources as PTX; of the same source and headers once."""
    found = toolkit.find_toolkit(torch.version.cuda)
    assert not isinstance(found, str), found
    folder = cuda_shim.ROOT / "build" / "ptx"
    headers = b"".join(path.read_bytes() for path in sorted(cuda_shim.CSRC.rglob("*.h")))
    command = [str(found.nvcc), *found.flags(), "-std=c++20", f"-I{cuda_shim.CSRC}", f"-arch=sm_{capability}"]
    command += ["-lineinfo", "-ptx"]

    def compile(source: Path) -> str:
        key = hashlib.sha256(f"{found.version} {command}".encode() + headers + source.read_bytes()).hexdigest()[:16]
        target = folder / f"{source.stem}-sm_{capability}-{key}.ptx"
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, source, "-o", unfinished], check=True, capture_output=True)
            unfinished.rename(target)
        return target.read_text()

    with cuda_shim.locked(folder), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile, sources))


@functools.cache
def _names() -> dict[int, str]:
    """Of the kernels in the build of cuda_shim, by their addresses."""
    path, library = cuda_shim.load_kernels()
    said = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
    places = {name: int(at, 16) for at, name in re.findall(r"^([0-9a-f]+) [tT] (\w+)$", said, re.M)}
    base = ctypes.cast(library.focalnet_shim_seed, ctypes.c_void_p).value - places["focalnet_shim_seed"]
    kernels = [name for name in places if "_kernel" in name]
    return dict(zip([base + places[name] for name in kernels], demangled(kernels), strict=True))


def demangled(names: list[str]) -> list[str]:
    """As both compilers have them, which name the unnamed namespace in ways of their own: without namespaces."""
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"\w+::|\(anonymous namespace\)::|^void |\(.*\)$", "", line) for line in said.splitlines()]


def _regions(arguments: bytes) -> list[tuple[str, int, np.ndarray]]:
    """The blocks of memory that arguments point into."""
    _, library = cuda_shim.load_kernels()
    first, size = ctypes.c_uint64(), ctypes.c_uint64()
    found = {}
    for at in range(0, len(arguments) - 7, 8):
        pointer = ctypes.c_uint64(int.from_bytes(arguments[at : at + 8], "little"))
        if library.focalnet_shim_find_block(pointer, ctypes.byref(first), ctypes.byref(size)) & 1:
            data = (ctypes.c_uint8 * size.value).from_address(first.value)
            name = f"what byte {at} of the arguments points to"
            found[first.value] = name, first.value, np.frombuffer(data, np.uint8)
    return [*found.values()]
