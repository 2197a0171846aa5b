"""focal_context forward: all levels, gates and the global context in one launch."""

import triton
import triton.language as tl

from ..triton.functions import gelu, in_map, pixel
from .triton_chain import COUNTS, clear, compute_level, copy_in, in_plane


@triton.jit(do_not_specialize=COUNTS)
def context_fwd_kernel(
    ctx, gates, out,  # views of (B, C, *spatial), (B, L+1, *spatial), (B, C, *spatial)
    mean_parts,  # (strips, B, C) float32
    weights,  # L of (C, 1, *k), contiguous
    scratch,  # (slots, L + 1, G * NB planes)
    B, C, T, M, W, tasks, strips, strip_rows, TOP, plane_size, G,  # not in tuples, which Triton would specialize
    KERNELS: tl.constexpr, NORMALIZE: tl.constexpr, EXACT: tl.constexpr, PADDING: tl.constexpr, PIXELS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A task is a block of NB channels of G images, or of one of `strips` strips of an image: then `out` lacks the
    global context and `mean_parts` are the strips' parts of the mean (see context_finish_kernel). PADDING: of planes,
    (left, right, RM)."""
    L: tl.constexpr = len(KERNELS)
    NB: tl.constexpr = TILE[0]
    size = (T, M, W)
    MP = M + 2 * PADDING[2]
    WP = (W + 7) // 8 * 8 + PADDING[0] + PADDING[1]
    blocks = (C + NB - 1) // NB
    level_size = G * NB * plane_size
    slot = scratch + tl.program_id(0).to(tl.int64) * ((L + 1) * level_size)
    clear(slot, (L + 1) * level_size)

    # without hoisting: what one step needs would be held in registers through all the others
    for task in tl.range(tl.program_id(0), tasks, tl.num_programs(0), disable_licm=True):
        channel = (task % blocks * NB + tl.arange(0, NB)).to(tl.int64)
        strip = task // blocks % strips
        b = (task // (blocks * strips)).to(tl.int64) * G
        block = (b, tl.minimum(B - b, G).to(tl.int32), channel, channel < C)
        t0 = strip * strip_rows
        t1 = tl.minimum(t0 + strip_rows, T)
        # a strip's slot sits elsewhere in the map for every task: rows beyond the map are written, as zeros. A whole
        # map's lie in the padding.
        lowest = tl.where(strips == 1, 0, t0 - TOP)
        highest = tl.where(strips == 1, T, t1 + TOP)
        layout = (size, (TOP - t0, PADDING[2], MP, WP, PADDING[0]), plane_size)

        ahead = 0  # rows that the levels to come need beyond the strip
        for k in tl.static_range(L):
            ahead += KERNELS[k][0] // 2
        rows = (tl.maximum(lowest, t0 - ahead), tl.minimum(highest, t1 + ahead))
        # here and below: always so, but what stands in an `if` of its own shares no indices with other steps, which
        # would stay in registers from the first step to the last
        if rows[0] < rows[1]:
            copy_in(ctx, slot, block, rows, layout, PIXELS, TILE)
        for k in tl.static_range(L):
            ahead -= KERNELS[k][0] // 2
            rows = (tl.maximum(lowest, t0 - ahead), tl.minimum(highest, t1 + ahead))
            if rows[0] < rows[1]:
                compute_level(
                    slot + k * level_size, level_size, 0, weights[k], block, rows, layout,
                    tl.constexpr(KERNELS[k]), True, False, EXACT, TILE,
                )  # fmt: skip
        mean_part = mean_parts + strip.to(tl.int64) * B * C
        _mix_levels(
            slot, level_size, gates, out, mean_part, C, block, (t0, t1), layout, strips == 1,
            L, NORMALIZE, PIXELS, TILE,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _mix_levels(
    slot, level_size, gates, out, mean_part, C, block, rows, layout, is_whole,
    L: tl.constexpr, NORMALIZE: tl.constexpr, PIXELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Levels times gates into `out`, and the last level's part of the mean; of a whole map the global context too."""
    NB: tl.constexpr = TILE[0]
    gates_pointer, gates_strides = gates
    out_pointer, out_strides = out
    b, n_images, channel, channels_inside = block
    t0, t1 = rows
    size, frame, plane_size = layout
    T, M, W = size
    top, MP, WP = frame[0], frame[2], frame[3]
    for g in range(0, n_images):
        planes = slot + (g * NB + tl.arange(0, NB))[:, None] * plane_size
        total = tl.zeros([NB, PIXELS], tl.float32)
        padded = (t1 - t0) * MP * WP
        for start in range(0, padded, PIXELS):
            i = (start + tl.arange(0, PIXELS))[None, :]
            last = planes + L * level_size + (top + t0) * MP * WP + i
            total += tl.load(last, mask=i < padded, other=0.0).to(tl.float32)
        part = tl.sum(total, 1) / (T * M * W)
        tl.store(mean_part + (b + g) * C + channel, part, mask=channels_inside)
        glob = gelu(part, True)

        n = (t1 - t0) * M * W
        for start in range(0, n, PIXELS):
            i = start + tl.arange(0, PIXELS)
            t, m, w = pixel(i, t0, W, M)
            gate_at = gates_pointer + (b + g) * gates_strides[0] + in_map(t, m, w, gates_strides)
            at = in_plane(t, m, w, frame)[None, :]
            value = tl.zeros([NB, PIXELS], tl.float32)
            for k in tl.static_range(L):
                gate = tl.load(gate_at + k * gates_strides[1], mask=i < n, other=0.0).to(tl.float32)
                level = tl.load(planes + (k + 1) * level_size + at, mask=(i < n)[None, :], other=0.0)
                value += gate[None, :] * level.to(tl.float32)
            if is_whole:
                gate = tl.load(gate_at + L * gates_strides[1], mask=i < n, other=0.0).to(tl.float32)
                value += gate[None, :] * glob[:, None]
                if NORMALIZE:
                    value = value / (L + 1)
            to = out_pointer + (b + g) * out_strides[0] + channel[:, None] * out_strides[1]
            to += in_map(t, m, w, out_strides)[None, :]
            mask = channels_inside[:, None] & (i < n)[None, :]
            tl.store(to, value.to(out_pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def context_finish_kernel(
    gates, out,  # views of (B, L+1, *spatial), (B, C, *spatial)
    mean_parts, mean,  # (strips, B, C), (B, C), float32
    B, C, T, M, W, strips,
    DIVISOR: tl.constexpr, LAST: tl.constexpr, NB: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The global context where images were cut into strips: out = (out + gates[LAST] * GELU(mean)) / DIVISOR, and the
    mean (B, C) itself."""
    gates_pointer, gates_strides = gates
    out_pointer, out_strides = out
    blocks = (C + NB - 1) // NB
    chunks = (T * M * W + PIXELS - 1) // PIXELS
    pid = tl.program_id(0)
    channel = (pid % blocks * NB + tl.arange(0, NB)).to(tl.int64)
    inside = channel < C
    chunk = pid // blocks % chunks
    b = (pid // (blocks * chunks)).to(tl.int64)
    total = tl.zeros([NB], tl.float32)
    for strip in range(0, strips):
        total += tl.load(mean_parts + (strip * B + b) * C + channel, mask=inside, other=0.0)
    if chunk == 0:
        tl.store(mean + b * C + channel, total, mask=inside)
    i = chunk * PIXELS + tl.arange(0, PIXELS)
    t, m, w = pixel(i, 0, W, M)
    valid = i < T * M * W
    gate_at = gates_pointer + b * gates_strides[0] + LAST * gates_strides[1] + in_map(t, m, w, gates_strides)
    gate = tl.load(gate_at, mask=valid, other=0.0).to(tl.float32)
    at = out_pointer + b * out_strides[0] + channel[:, None] * out_strides[1] + in_map(t, m, w, out_strides)[None, :]
    mask = inside[:, None] & valid[None, :]
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    value = (value + gate[None, :] * gelu(total, True)[:, None]) / DIVISOR
    tl.store(at, value.to(out_pointer.dtype.element_ty), mask=mask)
