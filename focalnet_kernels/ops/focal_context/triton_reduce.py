"""The second stage of the backward's sums: over channel blocks for the gates, over images and strips for the weights.
Every output is summed by one program in a fixed order, so results repeat bitwise."""

import triton
import triton.language as tl

from ..triton.functions import in_map, pixel
from .triton_chain import COUNTS


@triton.jit(do_not_specialize=COUNTS)
def reduce_partials_kernel(
    gates_parts, grad_gates,  # (blocks, B, LEVELS, T*M*W) float32; a view of (B, LEVELS, *spatial)
    weights_parts, grad_weights,  # (groups, C, ALL_TAPS) float32; per level (C, taps)
    gate_programs, blocks, groups, B, C, T, M, W,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, ALL_TAPS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Sums over the first axes. The first `gate_programs` programs do gates, the others weights."""
    pid = tl.program_id(0).to(tl.int64)
    if pid < gate_programs:
        _reduce_gates(pid, gates_parts, grad_gates, blocks, B, (T, M, W), BLOCK, LEVELS)
    else:
        _reduce_weights(pid - gate_programs, weights_parts, grad_weights, groups, C, TAPS, BLOCK, ALL_TAPS)


@triton.jit
def _reduce_gates(pid, parts, grad_gates, blocks, B, size, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    pointer, strides = grad_gates
    T, M, W = size
    pixels = T * M * W
    n = tl.full((), LEVELS, tl.int64) * B * pixels
    i = pid * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(0, blocks):
        total += tl.load(parts + block * n + i, mask=i < n, other=0.0)
    t, m, w = pixel(i % pixels, 0, W, M)
    to = i // (pixels * LEVELS) * strides[0] + i // pixels % LEVELS * strides[1] + in_map(t, m, w, strides)
    tl.store(pointer + to, total.to(pointer.dtype.element_ty), mask=i < n)


@triton.jit
def _reduce_weights(
    pid, parts, grad_weights, groups, C, TAPS: tl.constexpr, BLOCK: tl.constexpr, ALL_TAPS: tl.constexpr
):
    i = pid * BLOCK + tl.arange(0, BLOCK)
    inside = i < C * ALL_TAPS
    total = tl.zeros([BLOCK], tl.float32)
    part = parts + i
    for _ in range(0, groups):
        total += tl.load(part, mask=inside, other=0.0)
        part += C * ALL_TAPS
    tap = i % ALL_TAPS
    for k in tl.static_range(len(TAPS)):
        to = grad_weights[k] + i // ALL_TAPS * TAPS[k] + tap
        tl.store(to, total.to(grad_weights[k].dtype.element_ty), mask=inside & (tap >= 0) & (tap < TAPS[k]))
        tap -= TAPS[k]
