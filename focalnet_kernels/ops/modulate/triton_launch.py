"""modulate through the Triton kernels (triton_fwd.py, triton_rows.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._namespace import OPS
from ..triton.geometry import token_axes
from ..triton.launch import cdiv, implement_triton, launch, multiprocessors, next_power_of_2, shared_memory
from ..triton.replay import replayed


def modulate_fwd(q: Tensor, ctx_all: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return OPS.modulate_fwd_triton(q, ctx_all, weight, bias)


@replayed
def modulate_fwd_impl(q, ctx_all, weight, bias):
    out = torch.empty_like(q)
    if q.dtype == torch.float32:  # `tl.dot` is no match for cuBLAS there
        return torch.mul(q, F.linear(ctx_all.movedim(1, -1), weight, bias).movedim(-1, 1), out=out)
    modulate(q, ctx_all, weight, bias, out)
    return out


implement_triton("modulate_fwd_triton", modulate_fwd_impl)


class Tail(NamedTuple):
    """What may follow q * modulator in the same tile: LayerNorm, the output projection."""

    ln_weight: Tensor | None = None
    ln_bias: Tensor | None = None
    ln_eps: float = 0.0
    proj_weight: Tensor | None = None
    proj_bias: Tensor | None = None


# A tile with every channel: LayerNorm needs one column's sums; the projection needs its weight in shared memory too.
LARGEST_LN, LARGEST_PROJ = 256, 128


def modulate(
    q: Tensor, ctx_all: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, modulator: Tensor | None = None,
    tail: Tail = Tail(),  # noqa: B008 (immutable)
) -> None:  # fmt: skip
    """Writes proj?(LN?(q * (weight @ ctx_all + bias))) into `out`, and the modulator where given: (B, C, *spatial)."""
    from .triton_fwd import modulate_fwd_kernel

    C, tokens = q.shape[1], q.numel() // max(1, q.shape[1])
    maps = (q, ctx_all, _or(modulator, out), out)
    size, (q_strides, ctx_all_strides, modulator_strides, out_strides) = token_axes(*maps)
    whole = tail.ln_weight is not None or tail.proj_weight is not None
    rows = max(16, next_power_of_2(C)) if whole else min(128, max(16, next_power_of_2(C)))
    BN, BK, warps, stages = _tile(rows, q, tail.proj_weight is not None)
    nothing = weight  # stands for what is absent
    launch(
        modulate_fwd_kernel, cdiv(C, rows) * cdiv(tokens, BN), q.device,
        q, q_strides, ctx_all, ctx_all_strides, weight, weight.stride(), _or(bias, nothing),
        _or(modulator, out), modulator_strides,
        _or(tail.ln_weight, nothing), _or(tail.ln_bias, nothing), tail.ln_eps,
        _or(tail.proj_weight, nothing), _or(tail.proj_weight, nothing).stride(), _or(tail.proj_bias, nothing),
        out, out_strides, tokens, C, size,
        HAS_BIAS=bias is not None, SAVE=modulator is not None, LN=tail.ln_weight is not None,
        PROJ=tail.proj_weight is not None, PROJ_BIAS=tail.proj_bias is not None, ROWS=rows, BN=BN, BK=BK,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


# rows of a tile -> BN, BK, warps, stages; the first that fits the device's shared memory
_TILES = {
    64: [(64, 32, 4, 3), (32, 32, 4, 2)],
    128: [(64, 32, 8, 3), (32, 32, 8, 2)],
    256: [(32, 32, 8, 3), (32, 16, 8, 2)],
}


def _tile(rows: int, q: Tensor, with_proj: bool) -> tuple[int, int, int, int]:
    tiles = _TILES[min(r for r in _TILES if rows <= r)]
    for tile in tiles:
        BN, BK, _, stages = tile
        elements = stages * BK * (rows + BN) + (rows * rows if with_proj else 0)
        if elements * q.element_size() <= shared_memory(q.device):
            return tile
    return tiles[-1]


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor.contiguous() if tensor.ndim == 1 else tensor


def _rows_tile(C: int, tokens_adjacent: bool, ln: bool) -> dict:
    """ROWS x BN: 4096 elements with LN, otherwise 2048, wide along whichever axis is adjacent in memory."""
    if ln:
        rows = next_power_of_2(C)
        return {"ROWS": rows, "BN": max(1, 4096 // rows), "num_warps": 8}
    rows, columns = (32, 64) if tokens_adjacent else (64, 32)
    return {"ROWS": rows, "BN": columns, "num_warps": 8}


def rows_fwd(
    q: Tensor, modulator: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, ln_eps: float, out: Tensor
) -> Tensor:
    """LN?(q * modulator) of (C, tokens) matrices, into `out`, which may be `modulator`."""
    from .triton_rows import rows_fwd_kernel

    C, tokens = q.shape
    tile = _rows_tile(C, q.stride(1) == 1, ln_weight is not None)
    launch(
        rows_fwd_kernel, cdiv(C, tile["ROWS"]) * cdiv(tokens, tile["BN"]), q.device,
        q, q.stride(), modulator, modulator.stride(), _or(ln_weight, q), _or(ln_bias, q), ln_eps,
        out, out.stride(), tokens, C, LN=ln_weight is not None, **tile,
    )  # fmt: skip
    return out


def rows_bwd(
    q: Tensor, modulator: Tensor, grad: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, ln_eps: float,
    grad_q: Tensor, grad_modulator: Tensor,
) -> Tensor:  # fmt: skip
    """Backward of `rows_fwd`, see rows_bwd_kernel: z goes over `grad`; returns the (programs, 3, C) sums."""
    from .triton_rows import rows_bwd_kernel

    C, tokens = q.shape
    tile = _rows_tile(C, q.stride(1) == 1, ln_weight is not None)
    row_tiles, token_tiles = cdiv(C, tile["ROWS"]), cdiv(tokens, tile["BN"])
    programs = max(1, min(token_tiles, cdiv(4 * multiprocessors(q.device), row_tiles)))
    sums = torch.empty((programs, 3, C), dtype=torch.float32, device=q.device)
    launch(
        rows_bwd_kernel, row_tiles * programs, q.device,
        q, q.stride(), modulator, modulator.stride(), grad, grad.stride(), _or(ln_weight, q), _or(ln_bias, q), ln_eps,
        grad_q, grad_q.stride(), grad_modulator, grad_modulator.stride(), sums, tokens, C, programs,
        LN=ln_weight is not None, **tile,
    )  # fmt: skip
    return sums


def sum_programs(sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(programs, 3, C) of `rows_bwd` -> three (C,) of that dtype, in one launch."""
    from .triton_rows import sum_programs_kernel

    programs, _, C = sums.shape
    outs = sums.new_empty(C, dtype=dtype), sums.new_empty(C, dtype=dtype), sums.new_empty(C, dtype=dtype)
    BLOCK = 128
    launch(sum_programs_kernel, cdiv(3 * C, BLOCK), sums.device, sums, outs, programs, C, BLOCK=BLOCK)
    return outs
