"""The parameters of a focal modulation layer, named by their role."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LayerParameters(NamedTuple):
    """What a focal modulation layer learns, as plain matrices, whoever's module it comes from.

    `f_weight` (2C+L+1, C), `f_bias` (2C+L+1,) or None, `h_weight` (C, C), `h_bias` (C,) or None,
    `proj_weight` (C, C), `proj_bias` (C,) or None, `focal_weights`: L tensors (C, 1, *k),
    `ln_weight` and `ln_bias` (C,), both None where there is no post-LN.
    """

    f_weight: Tensor
    f_bias: Tensor | None
    h_weight: Tensor
    h_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    focal_weights: tuple[Tensor, ...]
    ln_weight: Tensor | None = None
    ln_bias: Tensor | None = None

    def flat(self) -> tuple[Tensor | None, ...]:
        """One flat tuple, the focal weights last: what an autograd.Function takes."""
        return (*self[:6], self.ln_weight, self.ln_bias, *self.focal_weights)

    def why_mixed(self) -> str | None:
        """What a kernel, which knows one dtype, cannot take."""
        if self.ln_weight is None or self.ln_weight.dtype == self.f_weight.dtype:
            return None
        return f"its LayerNorm is {self.ln_weight.dtype} in a layer of {self.f_weight.dtype}: left to the reference"

    @classmethod
    def from_flat(cls, tensors) -> LayerParameters:
        return cls(*tensors[:6], tuple(tensors[8:]), *tensors[6:8])
