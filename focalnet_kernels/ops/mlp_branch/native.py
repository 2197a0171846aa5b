"""mlp_branch through the C++ kernels: csrc/cpu, mlp_branch*; on a GPU cuBLAS and csrc/cuda/token_rows.cu."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..._calls import Call
from ...dispatch import Implementation
from .._library import implement_cuda
from .._limits import SLOW_ON_GPU
from .._native import raw_op, why_not_native
from .._packed import packed_forward
from ..token_rows import CUDA
from ..triton.launch import why_not_triton
from . import around

MOST_CHANNELS = 128  # of what one Triton kernel does: with 192 it took 1.5 times as long as cuBLAS and GELU on an H200


def mlp_branch_fwd(backend, x, parameters, norm_eps, post, keep_hidden, save) -> tuple[Tensor, list[Tensor]]:
    if backend == "cpu" and not save:
        y = packed_forward("mlp_branch", x, parameters, (parameters[0], parameters[2]), norm_eps, post)
        if y is not None:
            return y, []
    return raw_op("mlp_branch_fwd", backend)(x, list(parameters), norm_eps, post, keep_hidden, save)


def mlp_branch_bwd(backend, grad_y, x, parameters, saved, norm_eps, post, keep_hidden, needed) -> list[Tensor]:
    raw = raw_op("mlp_branch_bwd", backend)
    return raw(grad_y, x, list(parameters), list(saved), norm_eps, post, keep_hidden, needed)


def why_slow(call: Call, training: bool) -> str | None:
    """On a GPU PyTorch is faster where fc1 is not made again in backward, and Triton where its one kernel can."""
    if call.device.type == "cpu" or (not training and not (in_one_kernel(call) and why_not_triton(call) is None)):
        return None
    return SLOW_ON_GPU


def in_one_kernel(call: Call) -> bool:
    """Whether backend "triton" keeps the hidden values in registers."""
    return call.dtype != torch.float32 and call.channels <= MOST_CHANNELS


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
