"""What the Triton backends share: whether they can run, and how a kernel is launched."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..._calls import Call
from .._library import implement
from .._limits import why_biased, why_no_kernel, why_too_old

# Triton reads it when it is imported, and takes these words: no changing it later
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _missing() -> str | None:
    try:
        found = importlib.util.find_spec("triton")  # looks without importing it
    except ImportError:
        found = None
    if found is None:
        return "the package triton is not installed"
    if torch.version.cuda is None and torch.version.hip is None and not INTERPRETED:
        return "this torch was built for CPUs only (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    if INTERPRETED and importlib.util.find_spec("numpy") is None:
        return "Triton's interpreter needs numpy"
    if INTERPRETED and _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        return "the interpreter of Triton before 3.7 needs numpy before 2.4 (triton-lang/triton#9171)"
    return None


def _version(package: str) -> tuple[int, int]:
    """Major and minor; of a module, for a distribution may go by another name."""
    major, minor = importlib.import_module(package).__version__.split(".")[:2]
    return int(major), int(minor)


MISSING = _missing()  # why Triton cannot be used on this machine, or None


def why_not_triton(call: Call) -> str | None:
    """Why the Triton kernels cannot run tensors of this device and dtype; None where they can."""
    if reason := why_no_kernel(call) or why_biased(call):
        return reason
    if INTERPRETED:
        if call.device.type != "cpu":
            return "TRITON_INTERPRET=1 runs kernels on CPU tensors only"
        if call.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
    elif call.device.type != "cuda":
        return f"the tensors are on {call.device}, not on a GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    return MISSING or why_too_old(call.device)


def implement_triton(name: str, function: Callable) -> None:
    """Make `function` the raw op's kernel for GPU tensors, or CPU tensors under the interpreter."""
    implement(name, "CPU" if INTERPRETED else "CUDA", function)


class Launch(NamedTuple):
    """A kernel launch as `recorded_launches` keeps it."""

    kernel: Any  # of @triton.jit
    programs: int
    args: tuple
    constants: dict


_recorder: list[Launch] | None = None


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Launches are recorded meanwhile, not run: what a call on "meta" tensors would ask of a GPU."""
    global _recorder
    previous, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = previous


def is_looked_at() -> bool:
    """Whether somebody wants to see each launch of this thread as it comes."""
    return _recorder is not None or getattr(_thread, "watch", None) is not None


def launch(kernel, programs: int, device: torch.device, *args, **constants) -> None:
    """Run `programs` instances of a kernel on `device`'s current stream. All on grid axis 0, which reaches 2^31."""
    if programs == 0:
        return
    watch = getattr(_thread, "watch", None)
    if _recorder is not None:
        _recorder.append(Launch(kernel, programs, args, constants))
        if watch is not None:  # of another thread's recorder
            watch.launched(kernel, args, None)
        return
    with current(device):
        if LOOKS_ANEW or kernel.pre_run_hooks:  # who has hooks counts on being called
            if LOOKS_ANEW:
                constants.pop("maxnreg", None)  # NVIDIA's alone
            kernel[(programs,)](*args, **constants, **_OPTIONS)
            built = None
        else:
            key = id(kernel), programs, device, _specialized(args), tuple(constants.values())
            built = _built.get(key)
            if built is not None:
                run, values = built
                run(*args, *values)
            else:
                built = _build(kernel, programs, args, constants)
                if built is not None:
                    if len(_built) == _MOST_BUILT:
                        _built.clear()
                    _built[key] = built
    if watch is not None:
        watch.launched(kernel, args, built)


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """In which launches go to that GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _build(kernel, programs: int, args: tuple, constants: dict) -> Built | None:
    """Launches what Triton compiles. None: somebody's hook took it over, or it is still being compiled."""
    compiled = kernel[(programs,)](*args, **constants, **_OPTIONS)
    if not hasattr(type(compiled), "__getitem__"):
        return None
    return compiled[(programs, 1, 1)], tuple([constants[name] for name in kernel.arg_names[len(args) :]])


def tell(watch: Any) -> None:
    """From now on `watch.launched(kernel, args, built)` hears of this thread's launches; None: nobody does."""
    _thread.watch = watch


_thread = threading.local()

# not every default is the same in every Triton: say what we want
_OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": True}
LOOKS_ANEW = INTERPRETED or torch.version.hip is not None  # AMD's Triton looks at sizes of memory too
# What runs the kernel that Triton compiled, and the constants after the arguments, by the grid and all that Triton
# looks at when it compiles, but for its knobs: set them before the first launch. It would look at every argument anew.
Built = tuple[Callable[..., None], tuple]
_built: dict[tuple, Built] = {}
_MOST_BUILT = 4096


def _specialized(args: tuple) -> tuple:
    """Of pointers their type and alignment; of numbers all. Tuples with tensors begin with one."""
    Tensor = torch.Tensor
    return tuple(
        [
            (arg.dtype, arg.data_ptr() % 16 == 0)
            if isinstance(arg, Tensor)
            else _specialized(arg)
            if type(arg) is tuple and arg and isinstance(arg[0], Tensor)
            else arg
            for arg in args
        ]
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least."""
    if device.type == "meta":
        return 132
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have."""
    if device.type != "cuda":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 48 * 1024)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def exact_gelu(dtype: torch.dtype) -> bool:
    """Whether GELU's erf is worth its instructions: bfloat16 rounds 100 times what the logistic form is off."""
    return dtype != torch.bfloat16
