"""focal_branch through the Triton kernels: see around.py."""

from __future__ import annotations

from torch import Tensor

from ..._calls import Call
from ..._namespace import OPS
from ...dispatch import Implementation
from .._limits import SLOW_ON_GPU
from ..focal_context.triton_launch import why_not
from ..focal_modulation.triton_launch import focal_modulation_bwd_impl, focal_modulation_fwd_impl
from ..triton.launch import implement_triton
from ..triton.token_rows import TRITON
from . import around


def focal_branch_fwd(x, parameters, normalize, ln_eps, norm_eps, post, save) -> tuple[Tensor, list[Tensor]]:
    raw = OPS.focal_branch_fwd_triton
    return raw(x, list(parameters), normalize, ln_eps, norm_eps, post, save)


def focal_branch_bwd(grad_y, x, parameters, saved, normalize, ln_eps, norm_eps, post, needed) -> list[Tensor]:
    raw = OPS.focal_branch_bwd_triton
    return raw(grad_y, x, list(parameters), list(saved), normalize, ln_eps, norm_eps, post, needed)


def why_slow(call: Call, training: bool) -> str | None:
    """PyTorch's own kernels around the layer are as fast, but where the residual has more bits (autocast)."""
    return None if not training and call.residual_dtype != call.dtype else SLOW_ON_GPU


IMPLEMENTATION = Implementation("triton", why_not, focal_branch_fwd, focal_branch_bwd, why_slow)


def focal_branch_fwd_impl(*arguments):
    return around.forward(TRITON, focal_modulation_fwd_impl, *arguments)


def focal_branch_bwd_impl(*arguments):
    def layer_bwd(grad_y, x, parameters, saved, *options):
        return focal_modulation_bwd_impl(grad_y, x, parameters, *saved, *options)

    return around.backward(TRITON, focal_modulation_fwd_impl, layer_bwd, *arguments)


implement_triton("focal_branch_fwd_triton", focal_branch_fwd_impl)
implement_triton("focal_branch_bwd_triton", focal_branch_bwd_impl)
