"""Patch embedding in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def patch_embed_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], norm_eps: float,
) -> Tensor:  # fmt: skip
    """See `focalnet_kernels.patch_embed`: differentiable to any order."""
    y = _CONV[x.ndim - 2](x, weight, bias, tuple(stride), tuple(padding)).movedim(1, -1).contiguous()
    return y if norm_weight is None else F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, norm_eps)
