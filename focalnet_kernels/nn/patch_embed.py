"""Cutting an image, or a stage's map, into patches."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .._parts import why_call_any
from .._patches import PatchParts


class PatchEmbed(nn.Module):
    """Embed patches by a strided convolution (paper, section 3.3): the stem, and the step between two stages.

    Args:
        patch_size: side of the square patches; an int or a pair.
        in_chans: channels of the input.
        embed_dim: channels of the output.
        use_conv_embed: overlapping patches: 7x7 at stride 4 in the stem, else 3x3 at stride 2, whatever
            `patch_size` says.
        norm_layer: called with `embed_dim`; None for no norm.
        is_stem: whether this is the model's first embedding.
        pad: fill up the last patches of each row and column with zeros, where the size is no multiple of the
            stride; otherwise trailing pixels that fill no patch are lost.

    Shape:
        (B, in_chans, H, W) -> (B, H', W', embed_dim), contiguous
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int] = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        use_conv_embed: bool = False,
        norm_layer: Callable[[int], nn.Module] | None = None,
        is_stem: bool = False,
        pad: bool = False,
    ):
        super().__init__()
        kernel_size: int | tuple[int, int]
        stride: int | tuple[int, int]
        if use_conv_embed:
            # the authors pad a 7x7 stem by 2, not 3: published weights count on it
            kernel_size, stride, padding = (7, 4, 2) if is_stem else (3, 2, 1)
        else:
            kernel_size, stride, padding = patch_size, patch_size, 0
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size, stride, padding)
        self.stride = self.proj.stride
        self.norm = norm_layer(embed_dim) if norm_layer is not None else None
        self.pad = pad

    @property
    def in_chans(self) -> int | None:
        """Channels of the input, as `proj` says; None where something else took its place that does not say."""
        return getattr(self.proj, "in_channels", None)

    def output_size(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """(H', W') for an input of (H, W), below 1 where the input holds no patch; None where `proj` does not say."""
        conv = self.proj
        if type(conv) is not nn.Conv2d or isinstance(conv.padding, str):
            return None
        padded = [n + more for n, more in zip(size, self._missing(size), strict=True)]
        geometry = zip(padded, conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
        height, width = (
            (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for n, kernel, stride, padding, dilation in geometry
        )
        return height, width

    def _missing(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of zeros to add."""
        strides = self.proj.stride if isinstance(self.proj, nn.Conv2d) else self.stride  # others may not say
        height, width = (-n % stride if self.pad else 0 for n, stride in zip(size, strides, strict=True))
        return height, width

    def forward(self, x: Tensor) -> Tensor:
        height, width = self._missing((x.shape[2], x.shape[3]))
        if height or width:
            x = F.pad(x, (0, width, 0, height))
        parts = PatchParts(self.proj, self.norm)
        if isinstance(x, Tensor) and why_call_any(self, parts, PatchParts.why_call) is None and parts.takes(x):
            return parts.run(x)
        # one copy at most, and none where the convolution already answers channels-last
        x = self.proj(x).permute(0, 2, 3, 1).contiguous()
        return x if self.norm is None else self.norm(x)
