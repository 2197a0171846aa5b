"""Tensors as the kernels take them: sizes (T, M, W), strides (b, c, t, m, w), of one to three axes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

Strides = tuple[int, int, int, int, int]  # (b, c, t, m, w)


def padded_size(spatial: Sequence[int]) -> tuple[int, int, int]:
    """One to three spatial sizes as (T, M, W)."""
    if len(spatial) == 1:
        return 1, 1, spatial[0]
    return (spatial[0], 1, spatial[1]) if len(spatial) == 2 else (spatial[0], spatial[1], spatial[2])


def view(tensor: Tensor) -> tuple[Tensor, Strides]:
    """A (B, C, *spatial) tensor and its strides (b, c, t, m, w): how the chain's kernels take what users hand over."""
    (b, c, *strides), ndim = tensor.stride(), tensor.ndim - 2
    if ndim == 1:
        return tensor, (b, c, 0, 0, strides[0])
    return tensor, (b, c, strides[0], strides[1] if ndim == 3 else 0, strides[-1])


def token_axes(*maps: Tensor) -> tuple[tuple[int, int, int], tuple[Strides, ...]]:
    """The axes over which (B, C, *spatial) maps of one size count their tokens, as few as all the maps' strides allow:
    the size of all but the outermost, which stands in the batch's place, and every map's strides. Mostly one axis is
    left: without divisions in its indices the compiler sees which tokens are adjacent, and loads them together."""
    return _token_axes(maps[0].shape, tuple([m.stride() for m in maps]))


@functools.lru_cache(maxsize=1024)
def _token_axes(
    sizes: tuple[int, ...], maps: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, int, int], tuple[Strides, ...]]:
    axes: list[tuple[int, tuple[int, ...]]] = []  # size and the maps' strides, innermost first
    strides = list(zip(*maps, strict=True))
    for dim in (*range(len(sizes) - 1, 1, -1), 0):
        if axes and strides[dim] == tuple(axes[-1][0] * inner for inner in axes[-1][1]):
            axes[-1] = axes[-1][0] * sizes[dim], axes[-1][1]
        elif sizes[dim] != 1:
            axes.append((sizes[dim], strides[dim]))
    b, t, m, w = axes[-1:] + [(1, (0,) * len(maps))] * (4 - len(axes)) + axes[-2::-1]
    return (t[0], m[0], w[0]), tuple(zip(b[1], strides[1], t[1], m[1], w[1], strict=True))


def strided_like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """`gradient` with the strides of `tensor`, which gradient buckets (DDP) count on: mostly as it is."""
    like = torch.empty_like(tensor)
    return gradient if gradient.stride() == like.stride() else like.copy_(gradient)
