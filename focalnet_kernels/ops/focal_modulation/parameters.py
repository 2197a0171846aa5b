"""The parameters of a focal modulation layer: one flat tuple in one order, read by name."""

from __future__ import annotations

from torch import Tensor


class LayerParameters(tuple):
    """What a focal modulation layer learns, whoever's module it comes from.

    Everything that takes or returns parameters, up to the raw ops and C++ (csrc/common/parameters.h), has them in this
    order: `f_weight` (2C+L+1, C), `f_bias` (2C+L+1,) or None, the L `focal_weights` (C, 1, *k), `h_weight` (C, C),
    `h_bias` (C,) or None, `proj_weight` (C, C), `proj_bias` (C,) or None, `ln_weight` and `ln_bias` (C,), both None
    where there is no post-LN. A matrix may have the further axes, of size 1, of a 1x1 convolution's weight.
    """

    __slots__ = ()

    @staticmethod
    def names(levels: int) -> tuple[str, ...]:
        """What each is called where there are so many levels."""
        return ("f_weight", "f_bias", *[f"focal_weights[{i}]" for i in range(levels)], *_AFTER_LEVELS)

    def as_matrices(self) -> LayerParameters:
        """With matrices where the projections are 1x1 convolutions."""
        if not any([t is not None and t.ndim > 2 for t in (self[0], *self[-6:])]):
            return self
        f_weight, f_bias, *levels = self[:-6]
        others = [t if t is None else as_matrix(t) for t in self[-6:]]
        return LayerParameters((as_matrix(f_weight), f_bias, *levels, *others))

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


def as_matrix(weight: Tensor) -> Tensor:
    """A vector or matrix as it is, a 1x1 convolution's weight with its ones dropped."""
    if weight.ndim <= 2:
        return weight
    # DDP wants the gradient with the weight's strides, those of the ones too: flattened in the weight's own order
    # (contiguous or channels_last), it comes back so
    return (weight if weight.stride(-1) == 1 else weight.movedim(1, -1)).flatten(1)
