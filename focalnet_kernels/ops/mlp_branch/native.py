"""mlp_branch through the C++ kernels: csrc/cpu, mlp_branch*; on a GPU cuBLAS and csrc/cuda/token_rows.cu."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..._calls import Call
from ...dispatch import Implementation
from .._library import implement_cuda
from .._limits import SLOW_ON_GPU
from .._native import raw_op, why_not_native
from ..token_rows import CUDA
from . import around


def mlp_branch_fwd(backend, x, parameters, norm_eps, post, keep_hidden, save) -> tuple[Tensor, list[Tensor]]:
    return raw_op("mlp_branch_fwd", backend)(x, list(parameters), norm_eps, post, keep_hidden, save)


def mlp_branch_bwd(backend, grad_y, x, parameters, saved, norm_eps, post, keep_hidden, needed) -> list[Tensor]:
    raw = raw_op("mlp_branch_bwd", backend)
    return raw(grad_y, x, list(parameters), list(saved), norm_eps, post, keep_hidden, needed)


def why_slow(call: Call, training: bool) -> str | None:
    """On a GPU cuBLAS and PyTorch's GELU are as fast, and faster where fc1 is not made again in backward."""
    gains = call.device.type == "cpu" or (not training and call.residual_dtype != call.dtype)
    return None if gains else SLOW_ON_GPU


def implementation(backend: str) -> Implementation:
    """ "cpu"'s or "cuda"'s."""
    return Implementation(
        backend,
        partial(why_not_native, backend),
        partial(mlp_branch_fwd, backend),
        partial(mlp_branch_bwd, backend),
        why_slow,
    )


implement_cuda("mlp_branch_fwd_cuda", partial(around.forward, CUDA))
implement_cuda("mlp_branch_bwd_cuda", partial(around.backward, CUDA))
