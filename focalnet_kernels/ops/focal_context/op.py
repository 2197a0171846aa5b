"""focal_context: all focal levels, their gates and the global context, as one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import dispatch
from .._autograd import gradients_by_reference, needs_grad
from .._library import define
from . import native
from .reference import focal_context_reference

# ctx: (B, C, *spatial); gates: (B, L+1, *spatial); weights: L tensors (C, 1, *k), odd k; any strides
# -> ctx_all: (B, C, *spatial) with ctx's memory order


@define("focal_context_fwd(Tensor ctx, Tensor gates, Tensor[] weights, bool normalize) -> Tensor")
def _(ctx, gates, weights, normalize):
    return torch.empty_like(ctx)


class FocalContextFunction(torch.autograd.Function):
    @staticmethod
    def forward(fctx, backend, normalize, ctx, gates, *weights):
        fctx.backend, fctx.normalize = backend, normalize
        fctx.save_for_backward(ctx, gates, *weights)
        return dispatch.implementation("focal_context", backend).forward(ctx, gates, weights, normalize)

    @staticmethod
    def backward(fctx, grad_ctx_all):
        def reference(ctx, gates, *weights):
            return focal_context_reference(ctx, gates, weights, fctx.normalize)

        needed = fctx.needs_input_grad[2:]
        return None, None, *gradients_by_reference(reference, fctx.saved_tensors, needed, grad_ctx_all)


def focal_context(ctx: Tensor, gates: Tensor, weights: Sequence[Tensor], normalize: bool) -> Tensor:
    """The checked op: see `focalnet_kernels.focal_context`."""
    implementation = dispatch.select("focal_context", ctx, gates, weights, normalize)
    if implementation.backend != "reference" and needs_grad([ctx, gates, *weights]):
        return FocalContextFunction.apply(implementation.backend, normalize, ctx, gates, *weights)
    return implementation.forward(ctx, gates, weights, normalize)


dispatch.register(
    "focal_context",
    dispatch.Implementation("cpu", native.why_not, native.focal_context_fwd),
    dispatch.Implementation("reference", lambda *args: None, focal_context_reference),
)
