"""The parameters of a focal modulation layer: one flat tuple in one order, read by name."""

from __future__ import annotations

from torch import Tensor


class LayerParameters(tuple):
    """What a focal modulation layer learns, as plain matrices, whoever's module it comes from.

    Everything that takes or returns parameters, up to the raw ops and C++ (csrc/common/parameters.h), has them in this
    order: `f_weight` (2C+L+1, C), `f_bias` (2C+L+1,) or None, the L `focal_weights` (C, 1, *k), `h_weight` (C, C),
    `h_bias` (C,) or None, `proj_weight` (C, C), `proj_bias` (C,) or None, `ln_weight` and `ln_bias` (C,), both None
    where there is no post-LN.
    """

    __slots__ = ()

    @staticmethod
    def names(levels: int) -> tuple[str, ...]:
        """What each is called where there are so many levels."""
        return ("f_weight", "f_bias", *[f"focal_weights[{i}]" for i in range(levels)], *_AFTER_LEVELS)

    @property
    def f_weight(self) -> Tensor:
        return self[0]

    @property
    def f_bias(self) -> Tensor | None:
        return self[1]

    @property
    def focal_weights(self) -> tuple[Tensor, ...]:
        return self[2:-6]

    @property
    def h_weight(self) -> Tensor:
        return self[-6]

    @property
    def h_bias(self) -> Tensor | None:
        return self[-5]

    @property
    def proj_weight(self) -> Tensor:
        return self[-4]

    @property
    def proj_bias(self) -> Tensor | None:
        return self[-3]

    @property
    def ln_weight(self) -> Tensor | None:
        return self[-2]

    @property
    def ln_bias(self) -> Tensor | None:
        return self[-1]


_AFTER_LEVELS = ("h_weight", "h_bias", "proj_weight", "proj_bias", "ln_weight", "ln_bias")


def why_mixed(parameters: LayerParameters) -> str | None:
    """What a kernel, which knows one dtype, cannot take."""
    if parameters.ln_weight is None or parameters.ln_weight.dtype == parameters.f_weight.dtype:
        return None
    found = f"{parameters.ln_weight.dtype} in a layer of {parameters.f_weight.dtype}"
    return f"its LayerNorm is {found}: left to the reference"
