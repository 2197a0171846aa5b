"""patch_embed: a convolution that cuts a map into patches, and its norm. A kernel for inference on a CPU."""

from __future__ import annotations

from math import prod

from torch import Tensor

from ... import dispatch
from ..._calls import Call
from .._autograd import needs_grad
from .._flops import linear
from .._library import define
from . import native
from .reference import patch_embed_reference

# patches: (B, C, *grid, *kernel), any strides, they may overlap; weight: (N, C, *kernel) -> (B, *grid, N)


def _flops(patches, weight, bias, norm_weight, norm_bias, norm_eps, **results) -> int:
    N, *of_patch = weight
    return linear(prod(patches) // prod(of_patch), N, prod(of_patch))


@define(
    "patch_embed_fwd(Tensor patches, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias,"
    " float norm_eps) -> Tensor",
    flops=_flops,
)
def _(patches, weight, bias, norm_weight, norm_bias, norm_eps):
    grid = patches.shape[2 : 2 + (patches.ndim - 2) // 2]
    return patches.new_empty((patches.shape[0], *grid, weight.shape[0]))


def patch_embed(call: Call, tensors: tuple, options: tuple, backend: str | None) -> Tensor:
    """The checked op: see `focalnet_kernels.patch_embed`."""
    training = needs_grad(tensors)
    chosen = dispatch.select(call, training, backend)
    # on every backend: PyTorch's convolution keeps for its backward what a kernel would have to make again
    forward = patch_embed_reference if training else chosen.forward
    return forward(*tensors, *options)


dispatch.register(
    "patch_embed", native.IMPLEMENTATION, dispatch.Implementation("reference", lambda call: None, patch_embed_reference)
)
