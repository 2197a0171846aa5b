"""csrc/cuda on a CPU: builds the unchanged .cu sources against stub headers that emulate CUDA, and loads them.

The raw ops of backend "cuda" then take CPU tensors. See cuda_runtime.h and fibres.h beside this file.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

SHIM = Path(__file__).parent
ROOT = SHIM.parent.parent
CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
GLUE = [p for p in sorted((CSRC / "cuda").glob("*.cpp")) if p.name != "register.cpp"] + [SHIM / "register.cpp"]
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


def missing() -> str | None:
    """Why it cannot be built here, or None."""
    return None if shutil.which(os.environ.get("CXX", "g++")) else "there is no C++ compiler"


def build(name: str, sources: list[Path]) -> Path:
    """Compiles and links `sources` unless that was done for the same files before. Returns the library."""
    headers = [*SHIM.rglob("*.h"), *CSRC.rglob("*.h")]
    key = hashlib.sha256(f"{torch.__version__} {sys.version}".encode())
    for path in sorted([*headers, *sources]):
        key.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_shim" / key.hexdigest()[:16]
    library = folder / f"{name}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "g++")
    includes = [f"-I{p}" for p in (SHIM, CSRC, *include_paths(), sysconfig.get_path("include"))]

    def compile(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        _run([compiler, *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    torch_libraries = Path(torch.__file__).parent / "lib"
    whole = folder / f"{name}.{os.getpid()}.tmp"
    _run([compiler, "-shared", *objects, f"-L{torch_libraries}", "-ltorch_cpu", "-ltorch", "-lc10", "-o", str(whole)])
    whole.rename(library)
    return library


def load_ops() -> Callable[[int], None]:
    """The raw ops of backend "cuda", on CPU tensors. Returns a function that seeds the order of their threads."""
    library = str(build("kernels", [*KERNELS, *GLUE, SHIM / "fibres.cpp"]))
    torch.ops.load_library(library)
    seed = ctypes.CDLL(library).focalnet_shim_seed
    seed.argtypes, seed.restype = [ctypes.c_uint64], None
    return seed


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
