"""csrc/cuda emulated on a CPU: builds the very .cu sources against stub CUDA headers, and loads them.

The raw ops of backend "cuda" then take CPU tensors. See cuda_runtime.h and fibres.h beside this file.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

SHIM = Path(__file__).parent
ROOT = SHIM.parent.parent
CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
GLUE = [p for p in sorted((CSRC / "cuda").glob("*.cpp")) if p.name != "register.cpp"] + [SHIM / "register.cpp"]
RUNNER = ctypes.CFUNCTYPE(  # takes a launch: kernel, blocks, threads, bytes of shared memory, parameters, their size
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64
)
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += ["-fno-strict-aliasing"]  # nvcc takes pairs of elements for words wherever that is written


def missing() -> str | None:
    """Why it cannot be built here, or None."""
    return None if shutil.which(os.environ.get("CXX", "g++")) else "there is no C++ compiler"


def build(name: str, sources: list[Path]) -> Path:
    """Compiles and links `sources` unless that was done for the same files before. Returns the library."""
    headers = [*SHIM.rglob("*.h"), *CSRC.rglob("*.h")]
    key = hashlib.sha256(f"{torch.__version__} {sys.version} {FLAGS}".encode())
    for path in sorted([*headers, *sources]):
        key.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_shim" / key.hexdigest()[:16]
    library = folder / f"{name}.so"
    with locked(folder):
        if not library.exists():
            _build(library, sources)
    return library


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A folder of what is built, while no other process is at it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(library: Path, sources: list[Path]) -> None:
    folder = library.parent
    compiler = os.environ.get("CXX", "g++")
    includes = [f"-I{p}" for p in (SHIM, CSRC, *include_paths(), sysconfig.get_path("include"))]

    def compile(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        _run([compiler, *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    torch_libraries = Path(torch.__file__).parent / "lib"
    whole = library.with_suffix(".tmp")
    _run([compiler, "-shared", *objects, f"-L{torch_libraries}", "-ltorch_cpu", "-ltorch", "-lc10", "-o", str(whole)])
    whole.rename(library)


@contextlib.contextmanager
def emulated_ops() -> Iterator[Callable[[int], None]]:
    """Backend "cuda" takes CPU tensors meanwhile. Gives what seeds the order in which the kernels' threads run."""
    from focalnet_kernels import _libraries

    seed = _load_ops()
    with _libraries.cuda_kernels_on_cpu():
        yield seed


def emulate() -> None:
    """The same to the end of the process."""
    _process.enter_context(emulated_ops())


_process = contextlib.ExitStack()


def _load_ops() -> Callable[[int], None]:
    seed = load_kernels()[1].focalnet_shim_seed
    seed.argtypes, seed.restype = [ctypes.c_uint64], None
    return seed


@functools.cache
def load_kernels() -> tuple[Path, ctypes.CDLL]:
    """The raw ops of backend "cuda" for CPU tensors."""
    library = build("kernels", [*KERNELS, *GLUE, SHIM / "fibres.cpp", SHIM / "blocks.cpp"])
    torch.ops.load_library(str(library))
    return library, ctypes.CDLL(str(library))


def load_checks():
    """The Python module `checks`: kernels that test the shim itself, over NumPy arrays."""
    path = build("checks", [SHIM / "checks.cpp", SHIM / "fibres.cpp"])
    spec = importlib.util.spec_from_file_location("checks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
