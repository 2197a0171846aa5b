"""A patch embedding as one op, whoever's module it is: a convolution, and the norm of what it makes.

As for a layer (`_parts.py`), weights are read where both modules are plain; otherwise they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import dispatch
from ._parts import Module, why_call, why_call_norm
from ._snapshot import Snapshot
from .functional import patch_embed


class PatchParts(NamedTuple):
    """The inner modules of a patch embedding, by role."""

    proj: Module
    norm: Module | None

    def snapshot(self) -> Snapshot:
        return Snapshot(self, [module for module in self if module is not None])

    def why_call(self, forwards: Mapping[type, Callable] | None = None) -> str | None:
        """What sets them apart from a plain 2-D convolution and LayerNorm."""
        forwards = forwards or {}
        reason = why_call(self.proj, forwards)
        if reason is None:
            reason = _why_call_convolution(self.proj)
        if reason is not None:
            return f"proj {reason}"
        if self.norm is None:
            return None
        reason = why_call_norm(self.norm, self.proj._parameters["weight"].shape[0], forwards)
        return None if reason is None else f"norm {reason}"

    def takes(self, x: Tensor) -> bool:
        """Whether the op does with these plain parts what they do: all numbers are of one kind, and nothing casts.

        Not in training mode: gradients may be off for now alone, and checkpointing counts on the same bits once they
        are on.
        """
        if x.ndim != 4 or self.proj.training or torch.is_autocast_enabled(x.device.type):
            return False
        tensors = [self.proj._parameters["weight"], *([] if self.norm is None else [self.norm._parameters["weight"]])]
        return all([t.dtype == x.dtype and t.device == x.device for t in tensors])

    def run(self, x: Tensor, backend: str | None = None) -> Tensor:
        """(B, C, H, W) -> (B, H', W', N) by our op."""
        proj: Any = self.proj
        norm: Any = self.norm
        name = dispatch.requested_backend() if backend is None else backend
        of_norm = {}
        if norm is not None:
            parameters = norm._parameters
            of_norm = {"norm_weight": parameters["weight"], "norm_bias": parameters["bias"], "norm_eps": norm.eps}
        backend = name if name in ("auto", "cpu") else "reference"  # a GPU's convolutions are cuDNN's
        weights = proj._parameters["weight"], proj._parameters["bias"]
        return patch_embed(x, *weights, stride=proj.stride, padding=proj.padding, **of_norm, backend=backend)


def _why_call_convolution(proj: Module) -> str | None:
    if type(proj) is not nn.Conv2d:
        return f"is a {type(proj).__name__}, expected a Conv2d"
    if proj._parameters.get("weight") is None or "bias" not in proj._parameters:
        return "has no weight or bias among its parameters"
    weight = proj._parameters["weight"]
    plain = proj.groups == 1 and proj.dilation == (1, 1) and proj.padding_mode == "zeros"
    if not plain or isinstance(proj.padding, str) or weight.ndim != 4 or weight.shape[1] != proj.in_channels:
        return "is not a plain convolution with padding in numbers"
    return None
