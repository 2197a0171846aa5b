"""focal_branch through the C++ kernels: csrc/cpu, focal_modulation*; on a GPU those of the layer and token_rows.cu."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..._calls import Call
from ...dispatch import Implementation
from .._library import implement_cuda
from .._limits import SLOW_ON_GPU
from .._native import raw_op, why_not_native
from ..focal_modulation.native import focal_modulation_bwd, focal_modulation_fwd
from ..token_rows import CUDA
from . import around


def focal_branch_fwd(backend, x, parameters, normalize, ln_eps, norm_eps, post, save) -> tuple[Tensor, list[Tensor]]:
    return raw_op("focal_branch_fwd", backend)(x, list(parameters), normalize, ln_eps, norm_eps, post, save)


def focal_branch_bwd(backend, grad_y, x, parameters, saved, normalize, ln_eps, norm_eps, post, needed) -> list[Tensor]:
    raw = raw_op("focal_branch_bwd", backend)
    return raw(grad_y, x, list(parameters), list(saved), normalize, ln_eps, norm_eps, post, needed)


def why_slow(call: Call, training: bool) -> str | None:
    """On a GPU PyTorch's own kernels around the layer are as fast, but where the residual has more bits (autocast)."""
    gains = call.device.type == "cpu" or (not training and call.residual_dtype != call.dtype)
    return None if gains else SLOW_ON_GPU


def implementation(backend: str) -> Implementation:
    """ "cpu"'s or "cuda"'s."""
    return Implementation(
        backend,
        partial(why_not_native, backend),
        partial(focal_branch_fwd, backend),
        partial(focal_branch_bwd, backend),
        why_slow,
    )


_layer_fwd, _layer_bwd = partial(focal_modulation_fwd, "cuda"), partial(focal_modulation_bwd, "cuda")
implement_cuda("focal_branch_fwd_cuda", partial(around.forward, CUDA, _layer_fwd))
implement_cuda("focal_branch_bwd_cuda", partial(around.backward, CUDA, _layer_fwd, _layer_bwd))
