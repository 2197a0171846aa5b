"""focal_context through the Triton kernels (triton_fwd.py, triton_bwd.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._calls import Call
from ..._namespace import OPS
from .._autograd import bit_mask
from ..triton.geometry import padded_size, strided_like, view
from ..triton.launch import cdiv, exact_gelu, implement_triton, launch, why_not_triton
from ..triton.replay import replayed
from .triton_plan import make_plan, why_too_large


def why_not(call: Call) -> str | None:
    return why_not_triton(call) or why_too_large(call)


def focal_context_fwd(ctx, gates, weights, normalize) -> tuple[Tensor, Tensor]:
    return OPS.focal_context_fwd_triton(ctx, gates, list(weights), normalize)


def focal_context_bwd(grad_out, ctx, gates, weights, mean, normalize, needed) -> list[Tensor]:
    return OPS.focal_context_bwd_triton(grad_out, ctx, gates, list(weights), mean, normalize, bit_mask(needed))


@replayed
def focal_context_fwd_impl(ctx, gates, weights, normalize):
    ctx_all = torch.empty_like(ctx)
    return ctx_all, context_fwd(ctx, gates, weights, normalize, ctx_all)


@replayed
def focal_context_bwd_impl(grad_out, ctx, gates, weights, mean, normalize, needed):
    grad_ctx = torch.empty_like(ctx) if needed & 1 else None
    grad_gates = torch.empty_like(gates) if needed & 2 else None
    want_weights = needed >> 2 != 0
    grad_weights = context_bwd(
        grad_out, ctx, gates, weights, mean, normalize, grad_ctx, grad_gates, want_weights=want_weights
    )
    found = [grad_ctx, grad_gates, *(grad_weights if want_weights else [None] * len(weights))]
    return [
        strided_like(gradient, t) if needed >> i & 1 else ctx.new_empty(0)
        for i, (gradient, t) in enumerate(zip(found, (ctx, gates, *weights), strict=True))
    ]


implement_triton("focal_context_fwd_triton", focal_context_fwd_impl)
implement_triton("focal_context_bwd_triton", focal_context_bwd_impl)


def context_fwd(
    ctx: Tensor, gates: Tensor, weights: Sequence[Tensor], normalize: bool, out: Tensor, whole: bool = False
) -> Tensor:
    """Writes ctx_all into `out`; returns the mean (B, C) of the last level. `whole`: in one launch in any case."""
    from .triton_fwd import context_finish_kernel, context_fwd_kernel

    (B, C), size = ctx.shape[:2], padded_size(ctx.shape[2:])
    kernels = tuple(padded_size(w.shape[2:]) for w in weights)
    plan = make_plan(B, C, size, kernels, ctx.dtype, ctx.device, whole=whole)
    mean_parts = torch.empty((plan.strips, B, C), dtype=torch.float32, device=ctx.device)
    scratch = ctx.new_empty(plan.slots * plan.slot_size)
    launch(
        context_fwd_kernel, plan.slots, ctx.device,
        view(ctx), view(gates), view(out), mean_parts, tuple(w.contiguous() for w in weights), scratch,
        B, C, *size, *plan.arguments(),
        NORMALIZE=normalize, EXACT=exact_gelu(ctx.dtype), **plan.constants,
    )  # fmt: skip
    if plan.strips == 1:
        return mean_parts.view(B, C)
    mean = torch.empty_like(mean_parts[0])
    channels, pixels = 8, 256
    launch(
        context_finish_kernel, B * cdiv(C, channels) * cdiv(size[0] * size[1] * size[2], pixels), ctx.device,
        view(gates), view(out), mean_parts, mean, B, C, *size, plan.strips,
        DIVISOR=len(weights) + 1.0 if normalize else 1.0, LAST=len(weights), NB=channels, PIXELS=pixels,
    )  # fmt: skip
    return mean


def context_bwd(
    grad_out: Tensor, ctx: Tensor, gates: Tensor, weights: Sequence[Tensor], mean: Tensor, normalize: bool,
    grad_ctx: Tensor | None, grad_gates: Tensor | None, want_weights: bool, ctx_all: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Writes the gradients of ctx and gates, and ctx_all again, where given; returns the weights' if wanted."""
    from .triton_bwd import context_bwd_kernel
    from .triton_reduce import reduce_partials_kernel

    (B, C), L, device = ctx.shape[:2], len(weights), ctx.device
    size = padded_size(ctx.shape[2:])
    pixels = size[0] * size[1] * size[2]
    kernels = tuple(padded_size(w.shape[2:]) for w in weights)
    taps = tuple(k[0] * k[1] * k[2] for k in kernels)
    plan = make_plan(B, C, size, kernels, ctx.dtype, device, backward=True)
    groups = cdiv(B, plan.images) * plan.strips
    blocks = cdiv(cdiv(C, plan.tile.channels), plan.blocks_per_task)

    def part(wanted, *shape):
        return torch.empty(shape if wanted else (1,), dtype=torch.float32, device=device)

    nothing = ctx.new_empty((1,) * ctx.ndim)  # in the place of what is not wanted

    def wanted_view(tensor):
        return view(nothing if tensor is None else tensor)

    grad_means = part(True, plan.slots, plan.tile.channels * (plan.images + plan.window * 8))
    gates_parts = part(grad_gates is not None, blocks, B, L + 1, pixels)
    weights_parts = part(want_weights, groups, C, sum(taps))
    scratch = ctx.new_empty(plan.slots * plan.slot_size)
    launch(
        context_bwd_kernel, plan.slots, device,
        view(grad_out), view(ctx), view(gates), mean, tuple(w.contiguous() for w in weights), scratch, grad_means,
        wanted_view(grad_ctx), wanted_view(ctx_all), gates_parts, weights_parts,
        B, C, *size, *plan.arguments(), plan.blocks_per_task,
        NORMALIZE=normalize, EXACT=exact_gelu(ctx.dtype), REACH=sum(k[0] // 2 for k in kernels),
        ALL_TAPS=sum(taps), **plan.constants,
        WANT=(grad_ctx is not None, grad_gates is not None, want_weights, ctx_all is not None),
    )  # fmt: skip
    grad_weights = tuple(torch.empty(w.shape, dtype=w.dtype, device=device) for w in weights) if want_weights else ()
    BLOCK = 256
    gate_programs = cdiv(B * (L + 1) * pixels, BLOCK) if grad_gates is not None else 0
    weight_programs = cdiv(C * sum(taps), BLOCK) if want_weights else 0
    launch(
        reduce_partials_kernel, gate_programs + weight_programs, device,
        gates_parts, wanted_view(grad_gates), weights_parts, grad_weights, gate_programs, blocks, groups, B, C, *size,
        TAPS=taps if want_weights else (), BLOCK=BLOCK, ALL_TAPS=sum(taps), LEVELS=L + 1,
    )  # fmt: skip
    return list(grad_weights)
