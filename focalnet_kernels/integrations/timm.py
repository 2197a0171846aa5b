"""timm's FocalModulation: channels first, 1x1 convolutions for projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._parts import Module, Parts, dropped, why_call
from .adapter import Adapter


class Timm(Adapter):
    form = "timm"
    norm, norm_flag = "norm", "use_post_norm"
    projection = nn.Conv2d

    def examples(self, module: Module, C: int) -> list[tuple[tuple[int, ...], ...]]:
        return [((2, C, 5, 4),)]

    def post_norm(self, module: Module) -> nn.Module | None:
        norm = self.called_norm(module)  # called whatever the flag says
        return None if type(norm) is nn.Identity and why_call(norm) is None else norm

    def channels_last(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)

    def as_original(self, module: Module, parts: Parts, y: Tensor, x: Tensor) -> Tensor:
        # its own convolutions pass on the order of x or of their weights; its post norm permutes to and
        # fro, so that proj sees channels_last whatever the layer was given
        last = parts.norm is not None or is_channels_last(x) or is_channels_last(parts.f._parameters["weight"])
        return dropped(getattr(module, self.drop), channels_first(y, last))


def channels_first(y: Tensor, channels_last: bool) -> Tensor:
    """(B, H, W, C) as (B, C, H, W), in that memory order or contiguous."""
    y = y.permute(0, 3, 1, 2)
    if not channels_last:
        return y.contiguous()
    # vmap can neither ask for this order nor make it; nobody sees the order of its batches
    return y if torch._C._are_functorch_transforms_active() else y.contiguous(memory_format=torch.channels_last)


def is_channels_last(x: Tensor) -> bool:
    """Whether a convolution takes this for channels_last: torch's rule on strides, so for slices too."""
    (_, C, H, W), (b, c, h, w) = x.shape, x.stride()
    rows = h * max(H, 1)
    return c > 0 and w >= c * max(C, 1) and h >= w * max(W, 1) and b >= rows != c
