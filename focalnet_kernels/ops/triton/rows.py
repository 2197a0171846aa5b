"""Token rows around the body of a residual branch: norm, scale and residual, one program for some whole rows."""

import triton
import triton.language as tl

from .functions import channels, gelu, gelu_slope, norm_bwd, normalized_rows


@triton.jit
def residual_fwd_kernel(
    x, u, norm_weight, norm_bias, norm_eps, gamma, drop_path,  # (tokens, C) twice; (C,) thrice; (B,); all adjacent
    y,  # (tokens, C), adjacent; written
    next_weight, next_bias, next_eps, z,  # of a norm of y, and its result, alike: written where FOLLOWING
    tokens, pixels, C,
    NORM: tl.constexpr, GAMMA: tl.constexpr, DROP_PATH: tl.constexpr, FOLLOWING: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y = x + drop_path * gamma * norm?(u)."""
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    at = i.to(tl.int64)[:, None] * C + c[None, :]
    mask = (i < tokens)[:, None] & (c < C)[None, :]
    v = tl.load(u + at, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        v, _ = normalized_rows(v, c, C, norm_eps)
        v = v * channels(norm_weight, c, C) + channels(norm_bias, c, C)
    if GAMMA:
        v *= channels(gamma, c, C)
    if DROP_PATH:
        v *= tl.load(drop_path + i // pixels, mask=i < tokens, other=0.0).to(tl.float32)[:, None]
    v += tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    rounded = v.to(y.dtype.element_ty)
    tl.store(y + at, rounded, mask=mask)
    if FOLLOWING:
        v, _ = normalized_rows(rounded.to(tl.float32), c, C, next_eps)
        v = v * channels(next_weight, c, C) + channels(next_bias, c, C)
        tl.store(z + at, v.to(z.dtype.element_ty), mask=mask)


@triton.jit
def norm_bwd_kernel(
    rows, grad, residual,  # (tokens, C), adjacent: the norm's input; the gradient of what comes out; what is added
    norm_weight, norm_bias, norm_eps, gamma, drop_path,  # (C,) thrice; (B,)
    grad_rows,  # (tokens, C), adjacent; written
    sums,  # (programs, 4, C) float32, adjacent; written
    tokens, pixels, C, programs,
    NORM: tl.constexpr, GAMMA: tl.constexpr, DROP_PATH: tl.constexpr, RESIDUAL: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The backward of drop_path * gamma * norm?(rows), plus `residual`.

    sums: each program's sums over its tokens of the gradients of norm_weight, norm_bias, gamma, and, where nothing is
    added, of `rows`. Each thread sums up its own elements until the last tile: nothing crosses threads before.
    """
    c = tl.arange(0, BC)
    in_row = (c < C)[None, :]
    scale = tl.full([1, BC], 1.0, tl.float32)
    if GAMMA:
        scale = channels(gamma, c, C)
    if NORM:
        weight = channels(norm_weight, c, C)
    total = tl.zeros([BN, BC], tl.float32)  # of d
    along = tl.zeros([BN, BC], tl.float32)  # of d times what comes in, normalized
    for_rows = tl.zeros([BN, BC], tl.float32)
    start = tl.program_id(0) * BN
    while start < tokens:
        i = start + tl.arange(0, BN)
        at = i.to(tl.int64)[:, None] * C + c[None, :]
        mask = (i < tokens)[:, None] & in_row
        d = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if DROP_PATH:
            d *= tl.load(drop_path + i // pixels, mask=i < tokens, other=0.0).to(tl.float32)[:, None]
        if NORM or GAMMA:
            u = tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            u, rstd = normalized_rows(u, c, C, norm_eps)
            total += d
        if NORM or GAMMA:
            along += d * u
        if GAMMA:
            d *= scale
        if NORM:
            d = norm_bwd(d * weight, u, rstd, C)
        if RESIDUAL:
            d += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        else:
            for_rows += d
        tl.store(grad_rows + at, d.to(grad_rows.dtype.element_ty), mask=mask)
        start += programs * BN
    to = sums + tl.program_id(0) * (4 * C) + c[None, :]
    along = tl.sum(along, 0)[None, :]
    total = tl.sum(total, 0)[None, :]
    tl.store(to, along * scale, mask=in_row)
    tl.store(to + C, total * scale, mask=in_row)
    if NORM:  # gamma multiplies normal * weight + bias
        along = along * weight + total * channels(norm_bias, c, C)
    tl.store(to + 2 * C, along, mask=in_row)
    tl.store(to + 3 * C, tl.sum(for_rows, 0)[None, :], mask=in_row)


@triton.jit
def gelu_bwd_kernel(
    pre, hidden, grad,  # (tokens, M), adjacent: the pre-activation; written: GELU's value (may be in pre's place), and
    # over its gradient the pre-activation's
    sums,  # (programs, M) float32, adjacent; written
    tokens, M, programs,
    EXACT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """GELU's value and gradient. sums: each program's sums over its tokens of the pre-activation's gradient."""
    tiles = (M + BM - 1) // BM
    pid = tl.program_id(0)
    m = pid % tiles * BM + tl.arange(0, BM)
    first = pid // tiles
    total = tl.zeros([BM], tl.float32)
    start = first * BN
    while start < tokens:
        i = start + tl.arange(0, BN)
        at = i.to(tl.int64)[:, None] * M + m[None, :]
        mask = (i < tokens)[:, None] & (m < M)[None, :]
        p = tl.load(pre + at, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        d *= gelu_slope(p, EXACT)
        total += tl.sum(d, 0)
        tl.store(hidden + at, gelu(p, EXACT).to(hidden.dtype.element_ty), mask=mask)
        tl.store(grad + at, d.to(grad.dtype.element_ty), mask=mask)
        start += programs * BN
    tl.store(sums + first * M + m, total, mask=m < M)
