"""mlp_branch through the C++ kernels: csrc/cpu, mlp_branch*; on a GPU cuBLAS and csrc/cuda/token_rows.cu."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...dispatch import Implementation
from .._library import implement_cuda
from .._native import raw_op, why_not_native
from ..token_rows import CUDA
from . import around


def mlp_branch_fwd(backend, x, parameters, norm_eps, post, save) -> tuple[Tensor, list[Tensor]]:
    return raw_op("mlp_branch_fwd", backend)(x, list(parameters), norm_eps, post, save)


def mlp_branch_bwd(backend, grad_y, x, parameters, saved, norm_eps, post, needed) -> list[Tensor]:
    return raw_op("mlp_branch_bwd", backend)(grad_y, x, list(parameters), list(saved), norm_eps, post, needed)


def implementation(backend: str) -> Implementation:
    """ "cpu"'s or "cuda"'s."""
    return Implementation(
        backend, partial(why_not_native, backend), partial(mlp_branch_fwd, backend), partial(mlp_branch_bwd, backend)
    )


implement_cuda("mlp_branch_fwd_cuda", partial(around.forward, CUDA))
implement_cuda("mlp_branch_bwd_cuda", partial(around.backward, CUDA))
