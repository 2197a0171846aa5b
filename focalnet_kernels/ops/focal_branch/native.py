"""focal_branch through the C++ kernels: csrc/cpu, focal_modulation*; on a GPU those of the layer and token_rows.cu."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..._calls import Call
from ...dispatch import Implementation
from .._library import implement_cuda
from .._native import raw_op, why_not_native
from .._packed import packed_forward
from ..focal_modulation import native as layer
from ..token_rows import CUDA
from . import around


def focal_branch_fwd(backend, x, parameters, normalize, ln_eps, norm_eps, post, save) -> tuple[Tensor, list[Tensor]]:
    if backend == "cpu" and not save:
        weights = layer.product_weights(parameters.layer)
        y = packed_forward("focal_branch", x, parameters, weights, normalize, ln_eps, norm_eps, post)
        if y is not None:
            return y, []
    return raw_op("focal_branch_fwd", backend)(x, list(parameters), normalize, ln_eps, norm_eps, post, save)


def focal_branch_bwd(backend, grad_y, x, parameters, saved, normalize, ln_eps, norm_eps, post, needed) -> list[Tensor]:
    raw = raw_op("focal_branch_bwd", backend)
    return raw(grad_y, x, list(parameters), list(saved), normalize, ln_eps, norm_eps, post, needed)


def why_slow(backend: str, call: Call, training: bool) -> str | None:
    """The layer's: norm and sum around it are as fast as PyTorch's, and faster for few channels."""
    return None if backend == "cpu" else layer.why_slow(backend, call, training)


def implementation(backend: str) -> Implementation:
    """ "cpu"'s or "cuda"'s."""
    return Implementation(
        backend,
        partial(why_not_native, backend),
        partial(focal_branch_fwd, backend),
        partial(focal_branch_bwd, backend),
        partial(why_slow, backend),
    )


_layer_fwd, _layer_bwd = partial(layer.focal_modulation_fwd, "cuda"), partial(layer.focal_modulation_bwd, "cuda")
implement_cuda("focal_branch_fwd_cuda", partial(around.forward, CUDA, _layer_fwd))
implement_cuda("focal_branch_bwd_cuda", partial(around.backward, CUDA, _layer_fwd, _layer_bwd))
