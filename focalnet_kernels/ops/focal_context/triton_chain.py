"""What the forward and the backward kernel share: planes in scratch memory, and the depthwise convolution.

A program owns NB channels of G images (or of a strip of one image). It keeps every level's map in a slot of global
scratch memory of its own, small enough to stay in the caches, as planes padded by zeros, so that no later step knows
the strides of the user's tensors, masks a border or waits for another program:

    plane[row t][mid m][column w]   at ((t + top) * MP + m + RM) * WP + left + w

One to three spatial axes are (T, M, W): a sequence is (1, 1, N), an image (H, 1, W), a volume (D, H, W). Segments of 8
columns are the unit of work: SEG of them at once, each over ROWS rows. What many functions take goes in tuples:

    a view    (pointer, strides) of a user's tensor, strides (b, c, t, m, w)
    block     (b, n_images, channel, channels_inside): the images from b on, and the channels [NB] and which exist
    rows      (lo, hi): rows lo..hi of the map
    layout    (size, frame, plane_size): size = (T, M, W), frame = (top, RM, MP, WP, left)
    TILE      (NB, SEG, ROWS, WINDOW), constants
"""

import triton
import triton.language as tl

from ..triton.functions import gelu, in_map, pixel

# Arguments of kernels whose divisors and ones Triton shall not compile for: one machine code for many shapes, for
# compiling takes seconds.
COUNTS = (
    "B", "C", "T", "W", "tasks", "strips", "strip_rows", "TOP", "G", "blocks_per_task", "gate_programs", "blocks",
    "groups",
)  # fmt: skip


@triton.jit
def in_plane(t, m, w, frame):
    """Offset of a pixel in its plane."""
    top, RM, MP, WP, left = frame
    return ((t + top) * MP + m + RM) * WP + left + w


@triton.jit
def count_tiles(rows, n_images, size, TILE: tl.constexpr):
    """How many tiles of SEG segments cover these rows of n_images images."""
    M, W = size[1], size[2]
    lo, hi = rows
    SEG: tl.constexpr = TILE[1]
    ROWS: tl.constexpr = TILE[2]
    return (n_images * ((hi - lo + ROWS - 1) // ROWS) * M * ((W + 7) // 8) + SEG - 1) // SEG


@triton.jit
def segments(tile, rows, n_images, size, TILE: tl.constexpr):
    """A tile's segments: image, first row, mid, first column, and whether there is such a segment at all."""
    M, W = size[1], size[2]
    lo, hi = rows
    SEG: tl.constexpr = TILE[1]
    ROWS: tl.constexpr = TILE[2]
    i = tile * SEG + tl.arange(0, SEG)
    n_w = (W + 7) // 8
    w = i % n_w * 8
    i = i // n_w
    m = i % M
    i = i // M
    groups = (hi - lo + ROWS - 1) // ROWS
    g = i // groups
    live = g < n_images
    return tl.where(live, g, 0), lo + i % groups * ROWS, m, w, live


@triton.jit
def clear(slot, size):
    """Padding is never written later, and must be zero."""
    for start in range(0, size, 1024):
        i = start + tl.arange(0, 1024)
        tl.store(slot + i, tl.zeros([1024], slot.dtype.element_ty), mask=i < size)
    tl.debug_barrier()


@triton.jit
def convolve(source, center, weight, block, frame, KERNEL: tl.constexpr, FLIP: tl.constexpr, TILE: tl.constexpr):
    """Depthwise convolution (FLIP: its transpose) of segments: a tuple of ROWS float32 tiles [NB, SEG, 8].

    Args:
        source: pointers to the planes' channels, [NB, 1, 1].
        center: offset of each segment's first output, [SEG].
        weight: (C, 1, *k), contiguous.
    """
    if TILE[3]:
        return _convolve_by_bands(source, center, weight, block, frame, KERNEL, FLIP, TILE)
    else:
        return _convolve_by_taps(source, center, weight, block, frame, KERNEL, FLIP, TILE)


@triton.jit
def _convolve_by_taps(
    source, center, weight, block, frame, KERNEL: tl.constexpr, FLIP: tl.constexpr, TILE: tl.constexpr
):
    """For any kernel, one row at a time."""
    NB: tl.constexpr = TILE[0]
    SEG: tl.constexpr = TILE[1]
    KW: tl.constexpr = KERNEL[2]
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KW
    channel, channels_inside = block[2], block[3]
    sums = tl.zeros([NB, SEG, 8], tl.float32)
    at = source + center[None, :, None] + tl.arange(0, 8)[None, None, :]
    first = tl.minimum(frame[3], 0)  # is 0, but compilers who know that unroll all rows, more than registers hold
    for row in range(first, KERNEL[0] * KERNEL[1]):
        for column in tl.static_range(KW):
            tap = row * KW + column
            from_tap = TAPS - 1 - tap if FLIP else tap
            factor = tl.load(weight + channel * TAPS + from_tap, mask=channels_inside, other=0.0).to(tl.float32)
            value = tl.load(at + tap_offset(tap, frame, KERNEL)).to(tl.float32)
            sums += factor[:, None, None] * value
    return (sums,)


@triton.jit
def tap_offset(tap, frame, KERNEL: tl.constexpr):
    """Where, from an output, the input of its tap lies."""
    MP = frame[2]
    WP = frame[3]
    t = tap // (KERNEL[1] * KERNEL[2]) - KERNEL[0] // 2
    m = tap // KERNEL[2] % KERNEL[1] - KERNEL[1] // 2
    return (t * MP + m) * WP + tap % KERNEL[2] - KERNEL[2] // 2


@triton.jit
def _convolve_by_bands(
    source, center, weight, block, frame, KERNEL: tl.constexpr, FLIP: tl.constexpr, TILE: tl.constexpr
):
    """As matrix products, for tensor cores. The 8 outputs of a segment's row read a window of WINDOW inputs around
    them; windows [SEG, WINDOW] times one kernel row as a band [WINDOW, 8] are those outputs. A row of narrow windows is
    loaded once and used by every output row it reaches."""
    NB: tl.constexpr = TILE[0]
    SEG: tl.constexpr = TILE[1]
    ROWS: tl.constexpr = TILE[2]
    WINDOW: tl.constexpr = TILE[3]
    KT: tl.constexpr = KERNEL[0]
    KW: tl.constexpr = KERNEL[2]
    LEFT: tl.constexpr = WINDOW // 4  # inputs of the window before its first output
    channel, channels_inside = block[2], block[3]
    pitch = frame[2] * frame[3]
    i = tl.arange(0, WINDOW)
    tap = i[:, None] - tl.arange(0, 8)[None, :] - (LEFT - KW // 2)
    in_band = (tap >= 0) & (tap < KW)
    if FLIP:
        tap = KW - 1 - tap
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([NB, SEG, 8], tl.float32),)
    at = source + center[None, :, None] - LEFT + i[None, None, :]
    from_row = weight + channel[:, None, None] * (KT * KW) + tap[None, :, :]
    in_band = in_band[None, :, :] & channels_inside[:, None, None]
    if WINDOW == 16:
        bands = ()
        for k in tl.static_range(KT):
            row = KT - 1 - k if FLIP else k
            bands = bands + (tl.load(from_row + row * KW, mask=in_band, other=0.0),)
        for j in tl.static_range(ROWS + KT - 1):
            window = tl.load(at + (j - KT // 2) * pitch)
            new = ()
            for r in tl.static_range(ROWS):
                if j >= r and j - r < KT:
                    new = new + (tl.dot(window, bands[j - r], sums[r]),)
                else:
                    new = new + (sums[r],)
            sums = new
    else:  # more than 9 rows of wide bands are more than registers hold
        for k in tl.range(0, KT, num_stages=1):
            row = KT - 1 - k if FLIP else k
            band = tl.load(from_row + row * KW, mask=in_band, other=0.0)
            new = ()
            for r in tl.static_range(ROWS):
                new = new + (tl.dot(tl.load(at + (k + r - KT // 2) * pitch), band, sums[r]),)
            sums = new
    return sums


@triton.jit
def copy_in(ctx, plane, block, rows, layout, PIXELS: tl.constexpr, TILE: tl.constexpr):
    """Rows of the user's map, a view, into planes [image][NB]; rows outside the map as zeros."""
    NB: tl.constexpr = TILE[0]
    pointer, strides = ctx
    b, n_images, channel, channels_inside = block
    lo, hi = rows
    size, frame, plane_size = layout
    T, M, W = size
    n = (hi - lo) * M * W
    for g in range(0, n_images):
        from_image = pointer + (b + g) * strides[0] + channel[:, None] * strides[1]
        to_image = plane + (g * NB + tl.arange(0, NB))[:, None] * plane_size
        for start in range(0, n, PIXELS):
            i = start + tl.arange(0, PIXELS)
            t, m, w = pixel(i, lo, W, M)
            inside = channels_inside[:, None] & ((i < n) & (t >= 0) & (t < T))[None, :]
            value = tl.load(from_image + in_map(t, m, w, strides)[None, :], mask=inside, other=0.0)
            tl.store(to_image + in_plane(t, m, w, frame)[None, :], value, mask=(i < n)[None, :])
    tl.debug_barrier()


@triton.jit
def compute_level(
    source, to_next, to_z, weight, block, rows, layout,
    KERNEL: tl.constexpr, WANT_NEXT: tl.constexpr, WANT_Z: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows of a level from the planes of its input at `source`: GELU(z) `to_next` further on, z `to_z`."""
    NB: tl.constexpr = TILE[0]
    ROWS: tl.constexpr = TILE[2]
    n_images, hi = block[1], rows[1]
    size, frame, plane_size = layout
    T, W = size[0], size[2]
    pitch = frame[2] * frame[3]
    source += tl.arange(0, NB)[:, None, None] * plane_size
    column = tl.arange(0, 8)
    for tile in range(0, count_tiles(rows, n_images, size, TILE)):
        g, t, m, w, live = segments(tile, rows, n_images, size, TILE)
        center = g * (NB * plane_size) + in_plane(t, m, w, frame)
        sums = convolve(source, center, weight, block, frame, KERNEL, False, TILE)
        to = source + center[None, :, None] + column[None, None, :]
        in_columns = w[:, None] + column[None, :] < W
        for r in tl.static_range(ROWS):
            inside = (in_columns & ((t + r >= 0) & (t + r < T))[:, None])[None, :, :]
            written = (live & (t + r < hi))[None, :, None]
            z = tl.where(inside, sums[r], 0.0)  # and so is GELU(z)
            if WANT_Z:
                tl.store(to + to_z + r * pitch, z.to(source.dtype.element_ty), mask=written)
            if WANT_NEXT:
                tl.store(to + to_next + r * pitch, gelu(z, EXACT).to(source.dtype.element_ty), mask=written)
    tl.debug_barrier()
