"""The whole network of the summary's pseudo-code, over a sequence of patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn.block import Mlp
from ..nn.patch_embed import PatchEmbed
from ..nn.patch_merging import PatchMerging1d, PatchSplitting1d
from .similarity import SimilarityFocalModulation

MERGING_BEFORE, SPLITTING_BEFORE = (3, 7), (9,)  # layers, counted from 1


class SequenceFocalNetLayer(nn.Module):
    """x = x + modulation(norm1(x), norm1(x)); x = x + mlp(norm2(x)): (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int, num_contexts: int, hidden_dim: int, dropout: float, scale_factor: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.modulation = SimilarityFocalModulation(dim, num_contexts, scale_factor)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_dim, drop=dropout)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm1(x)
        x = x + self.dropout(self.modulation(tokens, tokens))
        return x + self.mlp(self.norm2(x))


class SequenceFocalNet(nn.Module):
    """The network of the summary's pseudo-code (docs/forms.md): a classifier over the sequence of an image's patches.

    Pairs of tokens merge before layers 3 and 7 (n/2 tokens of doubled width), and tokens split before layer 9 (4n
    tokens of a quarter of the width), counted from 1 and as far as `depth` reaches. So layers 1-2 are `dim` wide,
    3-6 twice, 7-8 four times, and from 9 on tokens are as many and as wide as at first. For the paper's network, the
    one with published weights, see `FocalNet`.

    Args:
        image_size: of the images; an int or (height, width), multiples of `patch_size`. It fixes the number of tokens,
            each of which has a learnt position.
        patch_size: an int or (height, width).
        num_classes: width of the head.
        dim: channels of a patch's token.
        depth: number of layers.
        num_contexts: context levels of every layer, see `SimilarityFocalModulation`.
        hidden_dim: hidden width of the MLPs where tokens are `dim` wide; where they are wider it grows alike.
        dropout: after positions, modulation and in the MLPs.
        in_chans: channels of the images.
        scale_factor: see `SimilarityFocalModulation`.

    Shape:
        (B, in_chans, *image_size) -> (B, num_classes).

    Raises:
        ValueError: image_size is no multiple of patch_size, or its patches do not merge in pairs as often as `depth`
            asks; x has another shape.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        num_contexts: int,
        hidden_dim: int,
        dropout: float = 0.0,
        *,
        in_chans: int = 3,
        scale_factor: float = 1.0,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.image_size = _pair(image_size)
        tokens = 1
        for n, patch in zip(_pair(image_size), _pair(patch_size), strict=True):
            if n < patch or n % patch:
                raise ValueError(f"image_size: expected multiples of patch_size {patch_size}, got {image_size}")
            tokens *= n // patch
        self.positions = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.dropout = nn.Dropout(dropout)

        self.layers = nn.ModuleList()
        self.resizing = nn.ModuleDict()  # by the number of the layer that follows
        width = dim
        for number in range(1, depth + 1):
            if number in MERGING_BEFORE:
                if tokens % 2:
                    raise ValueError(
                        f"image_size, patch_size: expected patches that merge in pairs before layer {number}, "
                        f"got {tokens} tokens there"
                    )
                self.resizing[str(number)] = PatchMerging1d(width)
                tokens, width = tokens // 2, 2 * width
            elif number in SPLITTING_BEFORE:
                self.resizing[str(number)] = PatchSplitting1d(width)
                tokens, width = 4 * tokens, width // 4
            hidden = hidden_dim * width // dim
            self.layers.append(SequenceFocalNetLayer(width, num_contexts, hidden, dropout, scale_factor))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean(1))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last layer's tokens after the final norm: (B, N, width)."""
        in_chans = getattr(self.patch_embed, "in_chans", None)  # of the stem that is there; None where it does not say
        expected = (*(x.shape[1:2] if in_chans is None else (in_chans,)), *self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x: expected shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        x = self.dropout(self.patch_embed(x).flatten(1, 2) + self.positions)
        for number, layer in enumerate(self.layers, start=1):
            if str(number) in self.resizing:
                x = self.resizing[str(number)](x)
            x = layer(x)
        return self.norm(x)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
