"""LN?(q * modulator) and its backward, where the matrix products around it are cuBLAS's."""

import triton
import triton.language as tl

from ..triton.functions import layer_norm, normalized


@triton.jit
def rows_fwd_kernel(
    q, q_strides, modulator, modulator_strides,  # (C, tokens), (channel, token)
    ln_weight, ln_bias, ln_eps,  # (C,), adjacent
    out, out_strides,  # as q; written
    tokens, C,
    LN: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = LN?(q * modulator). LN: ROWS >= C."""
    row_tiles = (C + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    row = pid % row_tiles * ROWS + tl.arange(0, ROWS)
    i = pid // row_tiles * BN + tl.arange(0, BN)
    mask = (row < C)[:, None] & (i < tokens)[None, :]
    z = tl.load(element(q, q_strides, row, i), mask=mask, other=0.0).to(tl.float32)
    z *= tl.load(element(modulator, modulator_strides, row, i), mask=mask, other=0.0).to(tl.float32)
    if LN:
        z = layer_norm(z, row, C, ln_weight, ln_bias, ln_eps)
    tl.store(element(out, out_strides, row, i), z.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rows_bwd_kernel(
    q, q_strides, modulator, modulator_strides,  # (C, tokens), (channel, token)
    grad, grad_strides,  # as q; z is written over it
    ln_weight, ln_bias, ln_eps,  # (C,), adjacent
    grad_q, grad_q_strides, grad_modulator, grad_modulator_strides,  # as q; written
    sums,  # (token_programs, 3, C) float32, adjacent; written
    tokens, C, token_programs,
    LN: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of q and modulator from that of z = LN?(q * modulator); z itself over `grad`.

    sums (token_programs, 3, C): each program's partial sums over tokens of grad_modulator (the gradient of h's
    bias) and, with LN, of the gradients of LN's weight and bias.
    """
    DTYPE: tl.constexpr = q.dtype.element_ty
    row_tiles = (C + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    row = pid % row_tiles * ROWS + tl.arange(0, ROWS)
    first = pid // row_tiles
    for_bias = tl.zeros([ROWS], tl.float32)
    for_ln_weight = tl.zeros([ROWS], tl.float32)
    for_ln_bias = tl.zeros([ROWS], tl.float32)
    start = first * BN
    while start < tokens:
        i = start + tl.arange(0, BN)
        mask = (row < C)[:, None] & (i < tokens)[None, :]
        query = tl.load(element(q, q_strides, row, i), mask=mask, other=0.0).to(tl.float32)
        mod = tl.load(element(modulator, modulator_strides, row, i), mask=mask, other=0.0).to(tl.float32)
        dz = tl.load(element(grad, grad_strides, row, i), mask=mask, other=0.0).to(tl.float32)
        z = query * mod
        if LN:
            normal, rstd = normalized(z, row, C, ln_eps)
            gamma = tl.load(ln_weight + row, mask=row < C, other=0.0).to(tl.float32)[:, None]
            beta = tl.load(ln_bias + row, mask=row < C, other=0.0).to(tl.float32)[:, None]
            for_ln_weight += tl.sum(dz * normal, 1)
            for_ln_bias += tl.sum(dz, 1)
            z = normal * gamma + beta
            dz *= gamma
            mean = tl.sum(dz, 0) / C
            along = tl.sum(dz * normal, 0) / C
            dz = (dz - mean[None, :] - normal * along[None, :]) * rstd[None, :]
        grad_mod = (dz * query).to(DTYPE)
        for_bias += tl.sum(tl.where(mask, grad_mod.to(tl.float32), 0.0), 1)
        tl.store(element(grad, grad_strides, row, i), z.to(DTYPE), mask=mask)
        tl.store(element(grad_q, grad_q_strides, row, i), (dz * mod).to(DTYPE), mask=mask)
        tl.store(element(grad_modulator, grad_modulator_strides, row, i), grad_mod, mask=mask)
        start += token_programs * BN
    to = sums + first * (3 * C) + row
    tl.store(to, for_bias, mask=row < C)
    tl.store(to + C, for_ln_weight, mask=row < C)
    tl.store(to + 2 * C, for_ln_bias, mask=row < C)


@triton.jit
def element(matrix, strides, row, i):
    """Pointers to (row, token i)."""
    return matrix + row.to(tl.int64)[:, None] * strides[0] + i.to(tl.int64)[None, :] * strides[1]


@triton.jit
def sum_programs_kernel(
    sums,  # (programs, 3, C) float32, adjacent
    outs,  # three of (C,), adjacent; written
    programs, C, BLOCK: tl.constexpr,
):  # fmt: skip
    """outs[j] = the sum over programs of sums[:, j], in order. Three tensors: results must not share memory."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for program in range(0, programs):
        total += tl.load(sums + program * 3 * C + i, mask=i < 3 * C, other=0.0)
    for j in tl.static_range(3):
        out = outs[j]
        tl.store(out + i - j * C, total.to(out.dtype.element_ty), mask=(i >= j * C) & (i < (j + 1) * C))
