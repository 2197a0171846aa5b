"""The whole MLP branch of some token rows in one program, for few channels: hidden values never reach memory.

As in attention, a chunk of hidden channels at a time: one product makes it, the other uses it up.
"""

import triton
import triton.language as tl

from ..triton.functions import channels, gelu, gelu_slope, norm_bwd, normalized_rows


@triton.jit
def mlp_fwd_kernel(
    x, norm_weight, norm_bias, norm_eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, drop_path,
    y, u,  # (tokens, C), adjacent, as x; written
    tokens, pixels, C, M,
    NORM: tl.constexpr, POST: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, GAMMA: tl.constexpr,
    DROP_PATH: tl.constexpr, SAVE: tl.constexpr, EXACT: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y = x + drop_path * gamma * post_norm?(fc2(GELU(fc1(pre_norm?(x))))); SAVE: fc2's result into u."""
    DTYPE: tl.constexpr = fc1_weight.dtype.element_ty
    pid = tl.program_id(0)
    n = tl.arange(0, BN)
    i = pid * BN + n
    c = tl.arange(0, BC)
    at = n[:, None] * C + c[None, :]  # within the program's rows: 32 bits, half the registers
    first = pid.to(tl.int64) * BN * C
    x += first
    mask = (i < tokens)[:, None] & (c < C)[None, :]
    z = tl.load(x + at, mask=mask, other=0.0)
    if NORM and not POST:
        normal, _ = normalized_rows(z.to(tl.float32), c, C, norm_eps)
        z = normal * channels(norm_weight, c, C) + channels(norm_bias, c, C)
    z = z.to(DTYPE)
    out = tl.zeros([BN, BC], tl.float32)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        w = tl.load(fc1_weight + m[None, :] * C + c[:, None], mask=(c < C)[:, None] & (m < M)[None, :], other=0.0)
        hidden = tl.dot(z, w)
        if BIAS1:
            hidden += channels(fc1_bias, m, M)
        w = tl.load(fc2_weight + c[None, :] * M + m[:, None], mask=(m < M)[:, None] & (c < C)[None, :], other=0.0)
        out = tl.dot(gelu(hidden, EXACT).to(DTYPE), w, out)
    if BIAS2:
        out += channels(fc2_bias, c, C)
    if SAVE:
        tl.store(u + first + at, out.to(DTYPE), mask=mask)
    if NORM and POST:
        normal, _ = normalized_rows(out, c, C, norm_eps)
        out = normal * channels(norm_weight, c, C) + channels(norm_bias, c, C)
    if GAMMA:
        out *= channels(gamma, c, C)
    if DROP_PATH:
        out *= tl.load(drop_path + i // pixels, mask=i < tokens, other=0.0).to(tl.float32)[:, None]
    # x again: saying how it is cached, as it is anyway, makes it another load: or the first's registers would be kept
    out += tl.load(x + at, mask=mask, other=0.0, cache_modifier=".ca").to(tl.float32)
    tl.store(y + first + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def mlp_bwd_kernel(
    x, grad_y, grad_u,  # (tokens, C), adjacent; grad_u: of fc2's result
    norm_weight, norm_bias, norm_eps, fc1_weight, fc1_bias, fc2_weight,
    z, grad_x,  # (tokens, C), adjacent: fc1's input, x's gradient; written
    hidden, grad_hidden,  # (tokens, M), adjacent: after GELU, before GELU; written
    sums, hidden_sums,  # (programs, 2, C), (programs, M) float32, adjacent; written
    tokens, C, M,
    NORM: tl.constexpr, BIAS1: tl.constexpr, EXACT: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """From fc2's result back to x, fc1 made again; the weights' gradients are left to two products.

    sums: each program's sums over its tokens of the gradients of norm_weight and norm_bias; hidden_sums: of fc1_bias.
    """
    DTYPE: tl.constexpr = fc1_weight.dtype.element_ty
    pid = tl.program_id(0)
    n = tl.arange(0, BN)
    i = pid * BN + n
    c = tl.arange(0, BC)
    at = n[:, None] * C + c[None, :]
    first = pid.to(tl.int64) * BN * C
    x += first
    hidden += pid.to(tl.int64) * BN * M
    grad_hidden += pid.to(tl.int64) * BN * M
    mask = (i < tokens)[:, None] & (c < C)[None, :]
    rows = tl.load(x + at, mask=mask, other=0.0)
    if NORM:
        normal, _ = normalized_rows(rows.to(tl.float32), c, C, norm_eps)
        rows = normal * channels(norm_weight, c, C) + channels(norm_bias, c, C)
    rows = rows.to(DTYPE)
    tl.store(z + first + at, rows, mask=mask)
    d = tl.load(grad_u + first + at, mask=mask, other=0.0)
    grad_z = tl.zeros([BN, BC], tl.float32)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        in_weights = (c < C)[:, None] & (m < M)[None, :]
        w = tl.load(fc1_weight + m[None, :] * C + c[:, None], mask=in_weights, other=0.0)
        p = tl.dot(rows, w)
        if BIAS1:
            p += channels(fc1_bias, m, M)
        to = n[:, None] * M + m[None, :]
        in_hidden = (i < tokens)[:, None] & (m < M)[None, :]
        tl.store(hidden + to, gelu(p, EXACT).to(DTYPE), mask=in_hidden)
        v = tl.load(fc2_weight + c[:, None] * M + m[None, :], mask=in_weights, other=0.0)
        grad = tl.dot(d, v) * gelu_slope(p, EXACT)
        tl.store(hidden_sums + pid * M + m, tl.sum(grad, 0), mask=m < M)
        grad = grad.to(DTYPE)
        tl.store(grad_hidden + to, grad, mask=in_hidden)
        # again, as another load: where both products had one buffer Triton 3.8's code for sm_90 gave wrong gradients
        w = tl.load(fc1_weight + m[None, :] * C + c[:, None], mask=in_weights, other=0.0, cache_modifier=".ca")
        grad_z = tl.dot(grad, tl.trans(w), grad_z)
    if NORM:
        normal, rstd = normalized_rows(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), c, C, norm_eps)
        to = sums + pid * (2 * C) + c
        tl.store(to, tl.sum(grad_z * normal, 0), mask=c < C)
        tl.store(to + C, tl.sum(grad_z, 0), mask=c < C)
        grad_z = norm_bwd(grad_z * channels(norm_weight, c, C), normal, rstd, C)
    grad_z += tl.load(grad_y + first + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x + first + at, grad_z.to(grad_x.dtype.element_ty), mask=mask)
