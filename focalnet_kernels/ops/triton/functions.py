"""Device functions of several ops' kernels: where elements lie, GELU, LayerNorm."""

import triton
import triton.language as tl


@triton.jit
def pixel(i, t0, W, M):
    """Pixel i of a map whose first row is t0."""
    return t0 + i // (W * M), i // W % M, i % W


@triton.jit
def in_map(t, m, w, strides):
    """Offset of a pixel in a tensor with strides (b, c, t, m, w), in 64 bits."""
    return t.to(tl.int64) * strides[2] + m.to(tl.int64) * strides[3] + w.to(tl.int64) * strides[4]


@triton.jit
def token_offsets(i, strides, size):
    """Offsets of tokens i = (b, t, m, w) in a tensor with strides (b, c, t, m, w)."""
    T, M, W = size
    pixels = T * M * W
    t, m, w = pixel(i % pixels, 0, W, M)
    return (i // pixels).to(tl.int64) * strides[0] + in_map(t, m, w, strides)


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """x * Phi(x). Not EXACT: Phi as the logistic function of an odd quintic, 3e-5 off at most: a bfloat16's rounding
    of values near 1 is 100 times that, and the exact form costs three times the instructions."""
    if EXACT:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * _logistic_phi(x)


@triton.jit
def gelu_slope(x, EXACT: tl.constexpr):
    """The derivative of gelu: Phi(x) + x phi(x)."""
    if EXACT:
        bell = tl.exp2(x * x * -0.7213475204444817) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * bell
    phi = _logistic_phi(x)
    s = tl.minimum(x * x, 42.25)
    return phi + x * phi * (1.0 - phi) * (1.59501577 + s * (0.22203387 - s * 0.00351515))


@triton.jit
def _logistic_phi(x):
    s = tl.minimum(x * x, 42.25)  # beyond |x| = 6.5 the polynomial would turn back
    logit = x * (1.59501577 + s * (0.07401129 - s * 0.00070303))
    return 1.0 / (1.0 + tl.exp2(logit * -1.4426950408889634))


@triton.jit
def layer_norm(z, row, C, weight, bias, eps):
    """LayerNorm of every column of z [rows, tokens] over its first C rows."""
    normal, _ = normalized(z, row, C, eps)
    gamma = tl.load(weight + row, mask=row < C, other=0.0).to(tl.float32)
    beta = tl.load(bias + row, mask=row < C, other=0.0).to(tl.float32)
    return normal * gamma[:, None] + beta[:, None]


@triton.jit
def normalized(z, row, C, eps):
    """Every column of z, over its first C rows, with mean 0 and variance 1; and what it was multiplied by for that."""
    z = tl.where((row < C)[:, None], z, 0.0)
    z = tl.where((row < C)[:, None], z - (tl.sum(z, 0) / C)[None, :], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(z * z, 0) / C + eps)
    return z * rstd[None, :], rstd


@triton.jit
def normalized_rows(z, c, C, eps):
    """Every row of z [rows, channels c], over its first C channels, with mean 0 and variance 1; and what it was
    multiplied by for that."""
    z = tl.where((c < C)[None, :], z - (tl.sum(z, 1) / C)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(z * z, 1) / C + eps)
    return z * rstd[:, None], rstd


@triton.jit
def norm_bwd(d, normal, rstd, C):
    """The gradient of the rows that `normalized_rows` made `normal` of, from that of `normal`; 0 beyond C."""
    mean, along = tl.sum(d, 1) / C, tl.sum(d * normal, 1) / C
    return (d - mean[:, None] - normal * along[:, None]) * rstd[:, None]


@triton.jit
def channels(vector, c, C):
    """(C,) as a row to multiply rows by; 0 beyond C."""
    return tl.load(vector + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
