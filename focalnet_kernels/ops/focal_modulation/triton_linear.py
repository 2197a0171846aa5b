"""A Linear whose result is channel planes: out[f, n] = sum_k weight[f, k] x[n, k] + bias[f].

cuBLAS adds a bias along the other axis only; this one adds it where the sums are.
"""

import triton
import triton.language as tl

from ..triton.functions import token_offsets


@triton.jit
def linear_planes_kernel(
    x, x_strides,  # (B, K, *spatial), (b, c, t, m, w) as `size` has t, m, w
    weight, weight_strides, bias,  # (F, K), (out, in); (F,), adjacent
    out,  # (F, tokens), adjacent; written
    tokens, F, K, size,
    HAS_BIAS: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tiles of the same tokens are neighbours: x is read
    once from memory."""
    f_tiles = (F + BF - 1) // BF
    pid = tl.program_id(0)
    f = pid % f_tiles * BF + tl.arange(0, BF)
    i = pid // f_tiles * BN + tl.arange(0, BN)
    from_x = x + token_offsets(i, x_strides, size)[None, :]
    sums = tl.zeros([BF, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at = weight + f.to(tl.int64)[:, None] * weight_strides[0] + k[None, :] * weight_strides[1]
        a = tl.load(at, mask=(f < F)[:, None] & (k < K)[None, :], other=0.0)
        at = from_x + k.to(tl.int64)[:, None] * x_strides[1]
        b = tl.load(at, mask=(k < K)[:, None] & (i < tokens)[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)[:, None]
    to = out + f.to(tl.int64)[:, None] * tokens + i[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=(f < F)[:, None] & (i < tokens)[None, :])
