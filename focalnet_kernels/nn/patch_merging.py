"""Merging neighbouring tokens into fewer, wider ones, and splitting tokens again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

_LAYOUT = {1: "(B, N, C)", 2: "(B, H, W, C)"}


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """Every `factor` neighbours per axis side by side: (B, *n, C) -> (B, *(n / factor), factor^d * C).

    The channels of a token are (*offset within the block, C), the last axis of the offset fastest.
    """
    spatial = x.shape[1:-1]
    ndim = len(spatial)
    for axis, n in enumerate(spatial):
        x = x.unflatten(1 + 2 * axis, (n // factor, factor))
    blocks, offsets = range(1, 2 * ndim, 2), range(2, 2 * ndim + 1, 2)
    return x.permute(0, *blocks, *offsets, -1).flatten(1 + ndim)


def depth_to_space(x: Tensor, factor: int) -> Tensor:
    """What undoes `space_to_depth`: (B, *n, factor^d * C) -> (B, *(n * factor), C).

    In 2-D it is `F.pixel_shuffle` for channels last; there the offset is the faster part of the channels, here the
    slower one, so that a token's channels stay together in memory.
    """
    ndim = x.ndim - 2
    x = x.unflatten(-1, (factor,) * ndim + (-1,))
    x = x.permute(0, *(axis for i in range(ndim) for axis in (1 + i, 1 + ndim + i)), -1)
    for axis in range(ndim):
        x = x.flatten(1 + axis, 2 + axis)
    return x


class PatchMergingNd(nn.Module):
    """Merging over `ndim` spatial axes."""

    ndim: int

    def __init__(self, dim: int, out_dim: int | None = None, norm_layer: Callable[[int], nn.Module] | None = None):
        super().__init__()
        self.dim = dim
        self.out_dim = 2 * dim if out_dim is None else out_dim
        merged = 2**self.ndim * dim
        self.norm = norm_layer(merged) if norm_layer is not None else None
        self.reduction = nn.Linear(merged, self.out_dim)

    def forward(self, x: Tensor) -> Tensor:
        spatial = x.shape[1:-1]
        if x.ndim != self.ndim + 2 or x.shape[-1] != self.dim or any(n % 2 for n in spatial):
            raise ValueError(
                f"x: expected shape {_LAYOUT[self.ndim]} with C = {self.dim} and only even spatial sizes, "
                f"got {tuple(x.shape)}"
            )
        x = space_to_depth(x, 2)
        return self.reduction(x if self.norm is None else self.norm(x))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, out_dim={self.out_dim}"


class PatchMerging(PatchMergingNd):
    """Merge the 2x2 neighbours of a map into one token of doubled width (Swin's, arXiv 2103.14030).

    Args:
        dim: channels C.
        out_dim: channels of the merged tokens; None for 2C.
        norm_layer: called with the 4C channels side by side; None for no norm.

    Shape:
        (B, H, W, C) -> (B, H/2, W/2, out_dim)

    Raises:
        ValueError: x has another shape, or an odd height or width.
    """

    ndim = 2


class PatchMerging1d(PatchMergingNd):
    """`PatchMerging` of a sequence's pairs: (B, N, C) -> (B, N/2, out_dim), same arguments."""

    ndim = 1


class PatchSplittingNd(nn.Module):
    """Splitting over `ndim` spatial axes, by `factor` parts per axis where the user names no other number."""

    ndim: int
    factor: int

    def __init__(self, dim: int, out_dim: int | None = None, factor: int | None = None):
        super().__init__()
        self.dim = dim
        if factor is not None:
            self.factor = factor
        parts = self.factor**self.ndim
        if out_dim is None and dim % parts:
            raise ValueError(f"dim: expected a multiple of the {parts} parts of a token, got {dim}; or give out_dim")
        self.out_dim = dim // parts if out_dim is None else out_dim
        self.expansion = nn.Linear(dim, parts * self.out_dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != self.ndim + 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected shape {_LAYOUT[self.ndim]} with C = {self.dim}, got {tuple(x.shape)}")
        return depth_to_space(self.expansion(x), self.factor)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, out_dim={self.out_dim}, factor={self.factor}"


class PatchSplitting(PatchSplittingNd):
    """Split each token of a map into 2x2 of a quarter of its width: a linear layer, then a pixel shuffle.

    Args:
        dim: channels C.
        out_dim: channels of the parts; None for C / factor^2. C / 2 undoes the shapes of a `PatchMerging`.
        factor: parts per axis; None for 2.

    Shape:
        (B, H, W, C) -> (B, factor*H, factor*W, out_dim)

    Raises:
        ValueError: dim is no multiple of the parts and out_dim is not given, or x has another shape.
    """

    ndim = 2
    factor = 2


class PatchSplitting1d(PatchSplittingNd):
    """`PatchSplitting` of a sequence: (B, N, C) -> (B, factor*N, out_dim), same arguments.

    A factor of None is 4, as in the summary's pseudo-code; 2 undoes the shapes of a `PatchMerging1d`.
    """

    ndim = 1
    factor = 4
