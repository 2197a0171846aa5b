"""focal_context: all focal levels, their gates and the global context, as one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import dispatch
from ..._calls import Call
from .._autograd import gradients_by_reference, needed_only, needs_grad, needs_reference_backward
from .._flops import level_gradients, levels
from .._library import define
from .._limits import SLOW_BACKWARD
from . import native, triton_launch
from .reference import focal_context_reference

# ctx: (B, C, *spatial); gates: (B, L+1, *spatial); weights: L tensors (C, 1, *k), odd k; any strides. Where a level has
# a bias (C, 2, *k): [:, 1] has it at its centre, and zeros, as if ctx had a second channel of ones
# -> ctx_all: (B, C, *spatial) with ctx's memory order; mean: (B, C) float32, of the last level over all pixels


def _forward_flops(ctx, gates, weights, normalize, **results) -> int:
    return levels(ctx, weights)


@define(
    "focal_context_fwd(Tensor ctx, Tensor gates, Tensor[] weights, bool normalize) -> (Tensor, Tensor)",
    backends=("", "_triton", "_cuda"),
    flops=_forward_flops,
)
def _(ctx, gates, weights, normalize):
    return torch.empty_like(ctx), ctx.new_empty(ctx.shape[:2], dtype=torch.float32)


# `needed`: bit i for input i of (ctx, gates, *weights); an empty tensor for the others


def _backward_flops(grad_out, ctx, gates, weights, mean, normalize, needed, **results) -> int:
    return level_gradients(ctx, weights, bool(needed & 1), needed >> 2)


@define(
    "focal_context_bwd(Tensor grad_out, Tensor ctx, Tensor gates, Tensor[] weights, Tensor mean, bool normalize,"
    " int needed) -> Tensor[]",
    backends=("", "_triton", "_cuda"),
    flops=_backward_flops,
)
def _(grad_out, ctx, gates, weights, mean, normalize, needed):
    inputs = (ctx, gates, *weights)
    return [torch.empty_like(t) if needed >> i & 1 else t.new_empty(0) for i, t in enumerate(inputs)]


class FocalContextFunction(torch.autograd.Function):
    @staticmethod
    def forward(fctx, backend, normalize, ctx, gates, *weights):
        ctx_all, mean = dispatch.implementation("focal_context", backend).forward(ctx, gates, weights, normalize)
        fctx.backend, fctx.normalize = backend, normalize
        fctx.save_for_backward(mean, ctx, gates, *weights)
        return ctx_all

    @staticmethod
    def backward(fctx, grad_ctx_all):
        mean, *inputs = fctx.saved_tensors
        needed = fctx.needs_input_grad[2:]
        if needs_reference_backward(grad_ctx_all):

            def reference(ctx, gates, *weights):
                return focal_context_reference(ctx, gates, weights, fctx.normalize)

            gradients = gradients_by_reference(reference, inputs, needed, grad_ctx_all)
        else:
            ctx, gates, *weights = inputs
            backward = dispatch.implementation("focal_context", fctx.backend).backward
            gradients = needed_only(backward(grad_ctx_all, ctx, gates, weights, mean, fctx.normalize, needed), needed)
        return None, None, *gradients


def focal_context(
    call: Call, ctx: Tensor, gates: Tensor, weights: Sequence[Tensor], normalize: bool, backend: str | None = None
) -> Tensor:
    """The checked op: see `focalnet_kernels.focal_context`."""
    training = needs_grad((ctx, gates, *weights))
    implementation = dispatch.select(call, training, backend)
    if implementation.backend == "reference":
        return focal_context_reference(ctx, gates, weights, normalize)
    if training:
        return FocalContextFunction.apply(implementation.backend, normalize, ctx, gates, *weights)
    return implementation.forward(ctx, gates, weights, normalize)[0]


dispatch.register(
    "focal_context",
    native.implementation("cpu"),
    native.implementation("cuda"),
    dispatch.Implementation(
        "triton",
        triton_launch.why_not,
        triton_launch.focal_context_fwd,
        triton_launch.focal_context_bwd,
        lambda call, training: SLOW_BACKWARD if training else None,
    ),
    dispatch.Implementation("reference", lambda call: None, focal_context_reference),
)
