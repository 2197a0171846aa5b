"""focal_context in plain PyTorch: the backend of last resort, the oracle, and what we are measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _depthwise(ctx: Tensor, weight: Tensor) -> Tensor:
    conv = _CONV[ctx.ndim - 2]
    padding = [k // 2 for k in weight.shape[2:]]
    bias = None
    if weight.shape[1] == 2:  # see op.py
        bias = weight[:, 1].flatten(1)[:, weight[0, 0].numel() // 2]
        weight = weight[:, :1]
    if ctx.ndim == 5 and ctx.dtype == torch.bfloat16 and ctx.device.type == "cpu":
        # PyTorch's own is wrong there (2.15): garbage weight gradients where a map is smaller than its kernel
        bias = None if bias is None else bias.float()
        return conv(ctx.float(), weight.float(), bias, padding=padding, groups=ctx.shape[1]).to(ctx.dtype)
    return conv(ctx, weight, bias, padding=padding, groups=ctx.shape[1])


def focal_context_reference(ctx: Tensor, gates: Tensor, weights: Sequence[Tensor], normalize: bool = False) -> Tensor:
    """See `focalnet_kernels.focal_context`: same arguments, same result, differentiable to any order."""
    return mix_levels(ctx, gates, [partial(_level, weight=weight) for weight in weights], normalize)


def _level(ctx: Tensor, weight: Tensor) -> Tensor:
    return F.gelu(_depthwise(ctx, weight))


def mix_levels(ctx: Tensor, gates: Tensor, levels: Sequence[Callable[[Tensor], Tensor]], normalize: bool) -> Tensor:
    """`focal_context` with levels of any kind, modules perhaps: each takes the one before it, the first takes ctx."""
    spatial = list(range(2, ctx.ndim))
    ctx_all: Any = 0
    for i, level in enumerate(levels):
        ctx = level(ctx)
        ctx_all = ctx_all + gates[:, i : i + 1] * ctx
    ctx_global = F.gelu(ctx.mean(dim=spatial, keepdim=True))
    ctx_all = ctx_all + gates[:, len(levels) :] * ctx_global
    return ctx_all / (len(levels) + 1) if normalize else ctx_all
