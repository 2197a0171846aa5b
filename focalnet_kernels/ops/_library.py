"""The torch.library namespace of the raw ops.

Schemas and fakes stand in Python, so the ops exist without any compiled extension; C++ only adds kernels. Raw ops
are private: they have no autograd, which lives in the autograd.Functions around them.
"""

from collections.abc import Callable, Sequence

import torch

from .._namespace import NAMESPACE
from ._flops import set_formula

library = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, backends: Sequence[str] = ("",), *, flops: Callable[..., int]):
    """Declare a raw op; decorates its fake (shapes, dtypes, strides of the results).

    Args:
        schema: name, arguments and results.
        backends: suffixes of the name, for backends with a raw op of their own of the same schema.
        flops: what torch's flop counter shall say: see `_flops.py`.
    """
    name, rest = schema.split("(", 1)

    def decorate(fake):
        for backend in backends:
            library.define(f"{name}{backend}({rest}")
            torch.library.register_fake(f"{NAMESPACE}::{name}{backend}", fake, lib=library)
            set_formula(name + backend, flops)

    return decorate


def implement_cuda(name: str, function: Callable) -> None:
    """Make `function`, which calls kernels of backend "cuda", the raw op's kernel; on CPUs that emulate a GPU, too."""
    for key in ("CUDA", "CPU"):
        library.impl(name, function, key)


def implement(name: str, dispatch_key: str, function: Callable) -> None:
    """Give a raw op a kernel written in Python."""
    library.impl(name, function, dispatch_key)
