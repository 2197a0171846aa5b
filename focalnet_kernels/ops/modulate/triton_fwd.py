"""q * (h ctx_all + b) in one launch, with LayerNorm and the output projection where a tile holds every channel."""

import triton
import triton.language as tl

from ..triton.functions import layer_norm, token_offsets


@triton.jit
def modulate_fwd_kernel(
    q, q_strides, ctx_all, ctx_all_strides,  # (B, C, *spatial), (b, c, t, m, w) as `size` has t, m, w
    h, h_strides, h_bias,  # (C, C), (out, in); (C,), adjacent
    modulator, modulator_strides,  # as q; written if SAVE
    ln_weight, ln_bias, ln_eps,  # (C,), adjacent
    proj, proj_strides, proj_bias,  # as h
    out, out_strides,  # as q; written
    tokens, C, size,
    HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, LN: tl.constexpr, PROJ: tl.constexpr, PROJ_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile is ROWS output channels of BN tokens: all channels with LN or PROJ. Channels are rows so that channel
    planes, as focal_context leaves them, are read and written along the tokens."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    row_tiles = (C + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    row = pid % row_tiles * ROWS + tl.arange(0, ROWS)
    i = pid // row_tiles * BN + tl.arange(0, BN)
    mask = (row < C)[:, None] & (i < tokens)[None, :]
    from_ctx = ctx_all + token_offsets(i, ctx_all_strides, size)[None, :]
    sums = tl.zeros([ROWS, BN], tl.float32)
    for start in range(0, C, BK):
        k = start + tl.arange(0, BK)
        at = h + row.to(tl.int64)[:, None] * h_strides[0] + k[None, :] * h_strides[1]
        weight = tl.load(at, mask=(row < C)[:, None] & (k < C)[None, :], other=0.0)
        at = from_ctx + k.to(tl.int64)[:, None] * ctx_all_strides[1]
        sums = tl.dot(
            weight, tl.load(at, mask=(k < C)[:, None] & (i < tokens)[None, :], other=0.0), sums, input_precision="ieee"
        )
    if HAS_BIAS:
        sums += tl.load(h_bias + row, mask=row < C, other=0.0).to(tl.float32)[:, None]
    channel = row.to(tl.int64)[:, None]
    if SAVE:
        to = modulator + token_offsets(i, modulator_strides, size)[None, :] + channel * modulator_strides[1]
        tl.store(to, sums.to(DTYPE), mask=mask)
    at = q + token_offsets(i, q_strides, size)[None, :] + channel * q_strides[1]
    z = sums * tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if LN:
        z = layer_norm(z, row, C, ln_weight, ln_bias, ln_eps)
    to = out + token_offsets(i, out_strides, size)[None, :] + channel * out_strides[1]
    if PROJ:
        at = proj + row.to(tl.int64)[:, None] * proj_strides[0] + row[None, :] * proj_strides[1]
        weight = tl.load(at, mask=(row < C)[:, None] & (row < C)[None, :], other=0.0)
        y = tl.dot(weight, tl.where(mask, z, 0.0).to(DTYPE), input_precision="ieee")
        if PROJ_BIAS:
            y += tl.load(proj_bias + row, mask=row < C, other=0.0).to(tl.float32)[:, None]
        tl.store(to, y.to(DTYPE), mask=mask)
    else:
        tl.store(to, z.to(DTYPE), mask=mask)
