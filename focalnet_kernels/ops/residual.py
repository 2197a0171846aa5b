"""What a block has around the body of either branch: y = x + drop_path * gamma * post_norm?(body(pre_norm?(x)))."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Residual(NamedTuple):
    """The tensors of a residual branch; each may be missing, weight and bias of the norm together.

    norm_weight, norm_bias, gamma: (C,). drop_path: (B,), a factor per sample: 0 where the branch is dropped, otherwise
    1 / (1 - rate). No gradient is made of it.
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    gamma: Tensor | None
    drop_path: Tensor | None


def residual_reference(
    x: Tensor, body: Callable[[Tensor], Tensor], residual: Residual, norm_eps: float, post: bool
) -> Tensor:
    """In plain PyTorch, in the order of operations of the authors' block. x: (B, *spatial, C).

    Args:
        body: maps channels-last tokens to as many; it may answer in another dtype.
        post: whether the norm follows the body.
    """

    def norm(z: Tensor) -> Tensor:
        if residual.norm_weight is None:
            return z
        weight, bias = residual.norm_weight, residual.norm_bias
        # a float32 norm of 16 bits is layer_norm's on a CPU alone
        return F.layer_norm(z.to(weight.dtype), z.shape[-1:], weight, bias, norm_eps).to(z.dtype)

    u = norm(body(x).to(x.dtype)) if post else body(norm(x)).to(x.dtype)
    if residual.gamma is not None:
        u = residual.gamma * u
    if residual.drop_path is not None:
        u = u * residual.drop_path.reshape(-1, *[1] * (x.ndim - 1))
    return x + u
