"""patch_embed through the C++ kernels: csrc/cpu/patch_embed.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch.nn.functional as F
from torch import Tensor

from ..._calls import Call
from ...dispatch import Implementation
from .._native import raw_op, why_not_native


def patch_embed_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], norm_eps: float,
) -> Tensor:  # fmt: skip
    if any(padding):
        x = F.pad(x, [side for n in reversed(padding) for side in (n, n)])
    patches = x
    for axis, (kernel, step) in enumerate(zip(weight.shape[2:], stride, strict=True), 2):
        patches = patches.unfold(axis, kernel, step)
    return raw_op("patch_embed_fwd", "cpu")(patches, weight, bias, norm_weight, norm_bias, norm_eps)


def why_slow(call: Call, training: bool) -> str | None:
    size, stride = call.kernels
    if training:
        return "in training PyTorch's convolution is as fast"
    overlap = any([k > step for k, step in zip(size, stride, strict=True)])
    many = not (call.sizes_are_known() and prod(call.shape) <= 512)  # as csrc/cpu/few_rows_ops.h has it
    return "patches overlap and are many: PyTorch's convolution reads them in place" if overlap and many else None


IMPLEMENTATION = Implementation("cpu", partial(why_not_native, "cpu"), patch_embed_fwd, why_slow=why_slow)
