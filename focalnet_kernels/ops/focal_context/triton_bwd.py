"""focal_context backward: levels recomputed and every gradient of a block of channels found in one launch.

The steps are those of README.md. Planes: the inputs of the levels ctx_0..ctx_{L-1}, then z_1..z_L, each of which
dz_l takes the place of. What crosses channels or images goes to partial sums (triton_reduce.py).
"""

import triton
import triton.language as tl

from ..triton.functions import gelu, gelu_slope, in_map, pixel
from .triton_chain import (
    COUNTS,
    clear,
    compute_level,
    convolve,
    copy_in,
    count_tiles,
    in_plane,
    segments,
    tap_offset,
)


@triton.jit(do_not_specialize=COUNTS)
def context_bwd_kernel(
    grad_out, ctx, gates,  # views of (B, C, *spatial), (B, C, *spatial), (B, L+1, *spatial)
    mean,  # (B, C) float32, the forward's
    weights,  # L of (C, 1, *k), contiguous
    scratch, grad_means,  # (slots, max(1, 2 L), G * NB planes); (slots, G * NB + NB * WINDOW * 8) float32
    grad_ctx, ctx_all,  # views of (B, C, *spatial), written where wanted
    grad_gates,  # (channel groups, B, L+1, T*M*W) float32: partial sums, written where wanted
    grad_weights,  # (image groups * strips, C, ALL_TAPS) float32: partial sums, written where wanted
    B, C, T, M, W, tasks, strips, strip_rows, TOP, plane_size, G, blocks_per_task,  # not in tuples: see the forward
    KERNELS: tl.constexpr, NORMALIZE: tl.constexpr, EXACT: tl.constexpr, PADDING: tl.constexpr, PIXELS: tl.constexpr,
    TILE: tl.constexpr, REACH: tl.constexpr, ALL_TAPS: tl.constexpr, WANT: tl.constexpr,
):  # fmt: skip
    """Tasks and slots as in context_fwd_kernel, but a task is `blocks_per_task` blocks of channels, one by one, which
    adds their partial sums of the gates' gradients up. REACH is the sum of all radii along T; WANT: whether the
    gradients of ctx, gates and weights, and ctx_all again, are wanted.
    """
    L: tl.constexpr = len(KERNELS)
    PLANES: tl.constexpr = 2 * L if L > 0 else 1
    NB: tl.constexpr = TILE[0]
    WANT_CTX: tl.constexpr = WANT[0]
    WANT_GATES: tl.constexpr = WANT[1]
    WANT_WEIGHTS: tl.constexpr = WANT[2]
    WANT_ALL: tl.constexpr = WANT[3]
    size = (T, M, W)
    MP = M + 2 * PADDING[2]
    WP = (W + 7) // 8 * 8 + PADDING[0] + PADDING[1]
    blocks = (C + NB - 1) // NB
    channel_groups = (blocks + blocks_per_task - 1) // blocks_per_task
    level_size = G * NB * plane_size
    slot = scratch + tl.program_id(0).to(tl.int64) * (PLANES * level_size)
    grad_means += tl.program_id(0) * (G * NB + NB * TILE[3] * 8)
    scale = 1.0 / (L + 1) if NORMALIZE else 1.0
    clear(slot, PLANES * level_size)

    # without hoisting: what one step needs would be held in registers through all the others
    for task in tl.range(tl.program_id(0), tasks, tl.num_programs(0), disable_licm=True):
        strip = task // channel_groups % strips
        group = task // (channel_groups * strips)
        b = group.to(tl.int64) * G
        n_images = tl.minimum(B - b, G).to(tl.int32)
        t0 = strip * strip_rows
        t1 = tl.minimum(t0 + strip_rows, T)
        own = (t0, t1)
        lowest = tl.where(strips == 1, 0, t0 - TOP)
        highest = tl.where(strips == 1, T, t1 + TOP)
        layout = (size, (TOP - t0, PADDING[2], MP, WP, PADDING[0]), plane_size)
        part = grad_gates + (task % channel_groups * B + b) * ((L + 1) * T * M * W)
        first = task % channel_groups * blocks_per_task
        for at in tl.range(first, tl.minimum(first + blocks_per_task, blocks), disable_licm=True):
            channel = (at * NB + tl.arange(0, NB)).to(tl.int64)
            block = (b, n_images, channel, channel < C)
            # here and below, `if`s that always hold: see context_fwd_kernel
            ahead = 2 * REACH
            rows = (tl.maximum(lowest, t0 - ahead), tl.minimum(highest, t1 + ahead))
            if L > 0 and rows[0] < rows[1]:
                copy_in(ctx, slot, block, rows, layout, PIXELS, TILE)
            for k in tl.static_range(L):
                ahead -= KERNELS[k][0] // 2
                rows = (tl.maximum(lowest, t0 - ahead), tl.minimum(highest, t1 + ahead))
                if rows[0] < rows[1]:
                    compute_level(
                        slot + k * level_size, level_size, L * level_size, weights[k], block, rows, layout,
                        tl.constexpr(KERNELS[k]), k + 1 < L, True, EXACT, TILE,
                    )  # fmt: skip
            if n_images > 0:
                _mean_gradient(grad_out, gates, mean, grad_means, C, block, size, scale, L, PIXELS, TILE)
            if (WANT_GATES or WANT_ALL) and t0 < t1:
                _gates_gradient(
                    grad_out, gates, mean, slot + L * level_size, level_size, part, at - first, ctx_all, C, block, own,
                    layout, scale, L, EXACT, WANT_GATES, WANT_ALL, PIXELS, TILE,
                )  # fmt: skip
            if WANT_CTX or WANT_WEIGHTS:
                ahead = REACH
                for down in tl.static_range(L):
                    rows = (tl.maximum(lowest, t0 - ahead), tl.minimum(highest, t1 + ahead))
                    if rows[0] < rows[1]:
                        _level_gradient(
                            slot + (2 * L - 1 - down) * level_size, level_size,
                            weights[L - 1 if down == 0 else L - down], grad_out, gates, grad_means, block, rows,
                            layout, scale, L - 1 - down, tl.constexpr(KERNELS[L - 1 if down == 0 else L - down]),
                            down == 0, EXACT, TILE,
                        )  # fmt: skip
                    ahead -= KERNELS[L - 1 - down][0] // 2
            if WANT_WEIGHTS and t0 < t1:
                to = grad_weights + ((group * strips + strip).to(tl.int64) * C + channel) * ALL_TAPS
                for k in tl.static_range(L):
                    _weight_gradient(
                        slot + k * level_size, slot + (L + k) * level_size, to, grad_means + G * NB, block, own, layout,
                        tl.constexpr(KERNELS[k]), TILE,
                    )  # fmt: skip
                    to += KERNELS[k][0] * KERNELS[k][1] * KERNELS[k][2]
            if WANT_CTX and n_images > 0:
                _write_gradient(slot + L * level_size, weights, grad_means, grad_ctx, block, own, layout, KERNELS, TILE)
            tl.debug_barrier()


@triton.jit
def _mean_gradient(
    grad_out, gates, mean, grad_means, C, block, size, scale, L: tl.constexpr, PIXELS: tl.constexpr, TILE: tl.constexpr
):
    """What every pixel of the last level receives through the mean: from all rows of the map, whosever strip."""
    NB: tl.constexpr = TILE[0]
    grad_pointer, grad_strides = grad_out
    gates_pointer, gates_strides = gates
    b, n_images, channel, channels_inside = block
    T, M, W = size
    n = T * M * W
    for g in range(0, n_images):
        grad_at = grad_pointer + (b + g) * grad_strides[0] + channel[:, None] * grad_strides[1]
        gate_at = gates_pointer + L * gates_strides[1] + (b + g) * gates_strides[0]
        total = tl.zeros([NB, PIXELS], tl.float32)
        for start in range(0, n, PIXELS):
            i = start + tl.arange(0, PIXELS)
            t, m, w = pixel(i, 0, W, M)
            factor = tl.load(gate_at + in_map(t, m, w, gates_strides), mask=i < n, other=0.0)
            mask = channels_inside[:, None] & (i < n)[None, :]
            grad = tl.load(grad_at + in_map(t, m, w, grad_strides)[None, :], mask=mask, other=0.0)
            total += factor.to(tl.float32)[None, :] * grad.to(tl.float32)
        mu = tl.load(mean + (b + g) * C + channel, mask=channels_inside, other=0.0)
        value = gelu_slope(mu, True) * tl.sum(total, 1) * (scale / n)
        tl.store(grad_means + g * NB + tl.arange(0, NB), value)
    tl.debug_barrier()


@triton.jit
def _gates_gradient(
    grad_out, gates, mean, z_planes, level_size, grad_gates, add, ctx_all, C, block, rows, layout, scale,
    L: tl.constexpr, EXACT: tl.constexpr, WANT_GATES: tl.constexpr, WANT_ALL: tl.constexpr, PIXELS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The gates' gradients, summed over this block's channels (on top of what is there if add > 0), and ctx_all once
    more, of these rows."""
    NB: tl.constexpr = TILE[0]
    grad_pointer, grad_strides = grad_out
    gates_pointer, gates_strides = gates
    all_pointer, all_strides = ctx_all
    b, n_images, channel, channels_inside = block
    t0, t1 = rows
    size, frame, plane_size = layout
    T, M, W = size
    pixels = T * M * W
    n = (t1 - t0) * M * W
    for g in range(0, n_images):
        glob = gelu(tl.load(mean + (b + g) * C + channel, mask=channels_inside, other=0.0), True)
        planes = z_planes + (g * NB + tl.arange(0, NB))[:, None] * plane_size
        for start in range(0, n, PIXELS):
            i = start + tl.arange(0, PIXELS)
            t, m, w = pixel(i, t0, W, M)
            at = in_plane(t, m, w, frame)[None, :]
            mask = channels_inside[:, None] & (i < n)[None, :]
            grad_at = grad_pointer + (b + g) * grad_strides[0] + channel[:, None] * grad_strides[1]
            grad = tl.load(grad_at + in_map(t, m, w, grad_strides)[None, :], mask=mask, other=0.0).to(tl.float32)
            gate_at = gates_pointer + (b + g) * gates_strides[0] + in_map(t, m, w, gates_strides)
            part = grad_gates + g * ((L + 1) * pixels) + t0 * M * W + i
            everything = tl.zeros([NB, PIXELS], tl.float32)
            for k in tl.static_range(L + 1):
                if k < L:
                    z = tl.load(planes + k * level_size + at, mask=(i < n)[None, :], other=0.0)
                    level = gelu(z.to(tl.float32), EXACT).to(z.dtype).to(tl.float32)
                else:
                    level = tl.zeros([NB, PIXELS], tl.float32) + glob[:, None]
                if WANT_GATES:
                    before = tl.load(part + k * pixels, mask=(i < n) & (i * 0 + add > 0), other=0.0)
                    tl.store(part + k * pixels, before + tl.sum(grad * level, 0) * scale, mask=i < n)
                if WANT_ALL:
                    gate = tl.load(gate_at + k * gates_strides[1], mask=i < n, other=0.0).to(tl.float32)
                    everything += gate[None, :] * level
            if WANT_ALL:
                to = all_pointer + (b + g) * all_strides[0] + channel[:, None] * all_strides[1]
                to += in_map(t, m, w, all_strides)[None, :]
                tl.store(to, (everything * scale).to(all_pointer.dtype.element_ty), mask=mask)
    tl.debug_barrier()


@triton.jit
def _level_gradient(
    z_planes, level_size, weight_above, grad_out, gates, grad_means, block, rows, layout, scale,
    LEVEL: tl.constexpr, KERNEL_ABOVE: tl.constexpr, LAST: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dz_l = (gate_l G + e) GELU'(z_l) over z_l, with e from the level above, or of the LAST level from the mean."""
    NB: tl.constexpr = TILE[0]
    ROWS: tl.constexpr = TILE[2]
    grad_pointer, grad_strides = grad_out
    gates_pointer, gates_strides = gates
    b, n_images, channel, channels_inside = block
    hi = rows[1]
    size, frame, plane_size = layout
    T, W = size[0], size[2]
    pitch = frame[2] * frame[3]
    column = tl.arange(0, 8)
    gate = gates_pointer + LEVEL * gates_strides[1]
    z_planes += tl.arange(0, NB)[:, None, None] * plane_size
    for tile in range(0, count_tiles(rows, n_images, size, TILE)):
        g, t, m, w, live = segments(tile, rows, n_images, size, TILE)
        center = g * (NB * plane_size) + in_plane(t, m, w, frame)
        if LAST:
            sums = _from_mean(grad_means, g, TILE)
        else:
            sums = convolve(z_planes + level_size, center, weight_above, block, frame, KERNEL_ABOVE, True, TILE)
        columns = w[:, None] + column[None, :]
        z_at = z_planes + center[None, :, None] + column[None, None, :]
        gate_at = gate + ((b + g) * gates_strides[0])[:, None]
        grad_at = grad_pointer + ((b + g) * grad_strides[0])[None, :, None]
        grad_at += channel[:, None, None] * grad_strides[1]
        for r in tl.static_range(ROWS):
            row = (t + r)[:, None]
            written = (live & (t + r < hi))[:, None]
            inside = written & (columns < W) & (row >= 0) & (row < T)
            mask = channels_inside[:, None, None] & inside[None, :, :]
            factor = tl.load(gate_at + in_map(row, m[:, None], columns, gates_strides), mask=inside, other=0.0)
            grad_offset = in_map(row, m[:, None], columns, grad_strides)[None, :, :]
            grad = tl.load(grad_at + grad_offset, mask=mask, other=0.0).to(tl.float32)
            z = tl.load(z_at + r * pitch, mask=mask, other=0.0)
            dz = (sums[r] + factor.to(tl.float32)[None, :, :] * grad * scale) * gelu_slope(z.to(tl.float32), EXACT)
            tl.store(z_at + r * pitch, tl.where(mask, dz, 0.0).to(z.dtype), mask=written[None, :, :])
    tl.debug_barrier()


@triton.jit
def _from_mean(grad_means, g, TILE: tl.constexpr):
    """The mean's gradient of each segment's image, in the form of `convolve`'s result."""
    NB: tl.constexpr = TILE[0]
    SEG: tl.constexpr = TILE[1]
    ROWS: tl.constexpr = TILE[2]
    value = tl.load(grad_means + g[None, :] * NB + tl.arange(0, NB)[:, None])[:, :, None]
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([NB, SEG, 8], tl.float32) + value,)
    return sums


@triton.jit
def _write_gradient(
    dz_planes, weights, grad_means, grad_ctx, block, rows, layout, KERNELS: tl.constexpr, TILE: tl.constexpr
):
    """The gradient of ctx, of these rows: from dz_1, or where there is no level from the mean."""
    NB: tl.constexpr = TILE[0]
    ROWS: tl.constexpr = TILE[2]
    pointer, strides = grad_ctx
    b, n_images, channel, channels_inside = block
    t1 = rows[1]
    size, frame, plane_size = layout
    W = size[2]
    dz_planes += tl.arange(0, NB)[:, None, None] * plane_size
    for tile in range(0, count_tiles(rows, n_images, size, TILE)):
        g, t, m, w, live = segments(tile, rows, n_images, size, TILE)
        if len(KERNELS) == 0:
            sums = _from_mean(grad_means, g, TILE)
        else:
            center = g * (NB * plane_size) + in_plane(t, m, w, frame)
            sums = convolve(dz_planes, center, weights[0], block, frame, tl.constexpr(KERNELS[0]), True, TILE)
        columns = w[:, None] + tl.arange(0, 8)[None, :]
        to = pointer + ((b + g) * strides[0])[None, :, None] + channel[:, None, None] * strides[1]
        for r in tl.static_range(ROWS):
            inside = (live & (t + r < t1))[:, None] & (columns < W)
            offset = in_map((t + r)[:, None], m[:, None], columns, strides)[None, :, :]
            mask = channels_inside[:, None, None] & inside[None, :, :]
            tl.store(to + offset, sums[r].to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _weight_gradient(source, dz_planes, to, diagonals, block, rows, layout, KERNEL: tl.constexpr, TILE: tl.constexpr):
    """The sum over these rows of dz(p) ctx(p + tap), for every tap."""
    if TILE[3]:
        _weight_gradient_by_windows(source, dz_planes, to, diagonals, block, rows, layout, KERNEL, TILE)
    else:
        _weight_gradient_by_taps(source, dz_planes, to, block, rows, layout, KERNEL, TILE)


@triton.jit
def _weight_gradient_by_windows(
    source, dz_planes, to, diagonals, block, rows, layout, KERNEL: tl.constexpr, TILE: tl.constexpr
):
    """windows^T [WINDOW, SEG] times dz [SEG, 8] holds every product of a kernel row; what belongs to one tap lies on
    one diagonal, summed when all tiles are done on a way through `diagonals` (NB, WINDOW, 8)."""
    NB: tl.constexpr = TILE[0]
    ROWS: tl.constexpr = TILE[2]
    WINDOW: tl.constexpr = TILE[3]
    KT: tl.constexpr = KERNEL[0]
    KW: tl.constexpr = KERNEL[2]
    LEFT: tl.constexpr = WINDOW // 4
    AT_ONCE: tl.constexpr = KT if WINDOW == 16 and KT <= 9 else 1  # kernel rows whose products registers hold
    n_images, channels_inside, t1 = block[1], block[3], rows[1]
    size, frame, plane_size = layout
    pitch = frame[2] * frame[3]
    column = tl.arange(0, 8)
    plane = tl.arange(0, NB)[:, None, None] * plane_size
    tiles = count_tiles(rows, n_images, size, TILE)
    i = tl.arange(0, WINDOW)
    tap = tl.arange(0, 16)
    plane_of_products = tl.arange(0, NB)[:, None, None] * WINDOW
    for k in range(0, KT, AT_ONCE):
        products = ()
        for _ in tl.static_range(AT_ONCE):
            products = products + (tl.zeros([NB, WINDOW, 8], tl.float32),)
        for tile in range(0, tiles):
            g, t, m, w, live = segments(tile, rows, n_images, size, TILE)
            center = g * (NB * plane_size) + in_plane(t, m, w, frame)
            dz_at = dz_planes + plane + center[None, :, None] + column[None, None, :]
            window_at = source + plane + center[None, None, :] + i[None, :, None] + ((k - KT // 2) * pitch - LEFT)
            dz = ()
            for r in tl.static_range(ROWS):
                written = (live & (t + r < t1))[None, :, None]
                dz = dz + (tl.load(dz_at + r * pitch, mask=written, other=0.0),)
            for j in tl.static_range(ROWS + AT_ONCE - 1):
                window = tl.load(window_at + j * pitch)
                new = ()
                for row in tl.static_range(AT_ONCE):
                    if row <= j and j - row < ROWS:
                        new = new + (tl.dot(window, dz[j - row], products[row]),)
                    else:
                        new = new + (products[row],)
                products = new
        for row in tl.static_range(AT_ONCE):
            tl.debug_barrier()
            at = (plane_of_products + i[None, :, None]) * 8 + column[None, None, :]
            tl.store(diagonals + at, products[row])
            tl.debug_barrier()
            on_diagonal = plane_of_products + tap[None, :, None] + column[None, None, :] + (LEFT - KW // 2)
            value = tl.load(
                diagonals + on_diagonal * 8 + column[None, None, :], mask=(tap < KW)[None, :, None], other=0.0
            )
            to_tap = to[:, None] + (k + row) * KW + tap[None, :]
            tl.store(to_tap, tl.sum(value, 2), mask=channels_inside[:, None] & (tap < KW)[None, :])


@triton.jit
def _weight_gradient_by_taps(source, dz_planes, to, block, rows, layout, KERNEL: tl.constexpr, TILE: tl.constexpr):
    """For any kernel, one tap at a time."""
    NB: tl.constexpr = TILE[0]
    SEG: tl.constexpr = TILE[1]
    n_images, channels_inside, t1 = block[1], block[3], rows[1]
    size, frame, plane_size = layout
    plane = tl.arange(0, NB)[:, None, None] * plane_size
    tiles = count_tiles(rows, n_images, size, TILE)
    for tap in range(0, KERNEL[0] * KERNEL[1] * KERNEL[2]):
        products = tl.zeros([NB, SEG, 8], tl.float32)
        for tile in range(0, tiles):
            g, t, m, w, live = segments(tile, rows, n_images, size, TILE)
            center = g * (NB * plane_size) + in_plane(t, m, w, frame)
            at = plane + center[None, :, None] + tl.arange(0, 8)[None, None, :]
            own = (live & (t < t1))[None, :, None]
            dz = tl.load(dz_planes + at, mask=own, other=0.0).to(tl.float32)
            value = tl.load(source + at + tap_offset(tap, frame, KERNEL), mask=own, other=0.0).to(tl.float32)
            products += dz * value
        tl.store(to + tap, tl.sum(tl.sum(products, 2), 1), mask=channels_inside)
